"""``MixedLinear`` as a citizen of a module tree: state, moves, casts, copies and what it says about itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from formats import draw
from lowering_cases import case
from mixcomp.format import Scales, SiteFormat
from mixcomp.lowering import gpu
from mixcomp.lowering import module as module_file
from mixcomp.lowering.module import MixedLinear
from mixcomp.lowering.ops import MIXED_LINEAR, may_skip_dispatcher

SHAPE = [(10, 3), (13, 5), (4, 2), (6, 3)]


def on_gpu(device_type: str, fmt: SiteFormat) -> bool:
    """``takes_fragments`` as if a CPU were a GPU."""
    return device_type == "cpu" and not fmt.departure


@pytest.fixture(params=["stored", "fragments"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything here holds for both forms of codes; what computes with fragments on a CPU unpacks them."""
    if request.param == "fragments":
        monkeypatch.setattr(module_file, "takes_fragments", on_gpu)
    return str(request.param)


def module(seed: int = 0, *, rank: int = 2, scatter: bool = True, bias: bool = True) -> MixedLinear:
    made = case(SHAPE, 70, scatter=scatter, rank=rank, bias=bias, seed=seed)
    return MixedLinear(made.weight, made.bias)


def x(tokens: int = 3) -> torch.Tensor:
    return torch.randn(tokens, 70, generator=torch.Generator().manual_seed(5))


def bytes_of(layer: MixedLinear) -> dict[str, torch.Tensor]:
    return {name: t.clone().view(torch.uint8) for name, t in layer.packed().tensors().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_computes_the_linear() -> None:
    made = case(SHAPE, 70, scatter=True, rank=3, bias=True, dyadic=True)
    layer = MixedLinear(made.weight, made.bias)
    data = made.activations(2, 4, dyadic=True)
    assert torch.equal(layer(data), made.product(data).float())
    assert (layer.in_features, layer.out_features) == (70, 33)


def test_state_has_the_names_of_the_format() -> None:
    layer = module()
    assert list(layer.state_dict()) == [*layer.fmt.tensors(), "bias"]
    assert "row_index" not in module(scatter=False).state_dict()
    assert list(module(rank=0, scatter=False, bias=False).state_dict()) == ["codes", "scales", "factors"]
    assert not list(layer.parameters())
    assert not any(b.requires_grad for b in layer.buffers())


def test_its_tensors_are_the_packed_ones(form: str) -> None:
    made = case(SHAPE, 70, scatter=True, rank=1)
    layer = MixedLinear(made.weight)
    given = made.weight.tensors()
    changed = {"codes", "scales"} if form == "fragments" else set()
    assert {name for name, t in layer.packed().tensors().items() if t is not given[name]} == changed
    assert layer.bias is None


def test_it_holds_one_form_of_the_weight_and_shows_what_is_stored(form: str) -> None:
    made = case(SHAPE, 70, scatter=True, rank=2)
    layer = MixedLinear(made.weight)
    assert gpu.are_fragments(layer.codes) == (form == "fragments")
    wanted = layer.fmt.fragments() if form == "fragments" else layer.fmt.tensors()
    assert {name: (b.dtype, tuple(b.shape)) for name, b in layer.named_buffers()} == wanted
    shown = layer.state_dict()
    assert list(shown) == list(layer.fmt.tensors())
    assert all(torch.equal(shown[name], tensor) for name, tensor in made.weight.tensors().items())


def test_a_module_at_two_paths_shows_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = module()
    shown = nn.ModuleList((layer, layer)).state_dict(keep_vars=True)
    assert all(shown["0." + name] is shown["1." + name] for name in layer.fmt.tensors())
    monkeypatch.setattr(module_file, "takes_fragments", on_gpu)
    layer.settle()
    shown, wanted = layer.state_dict(), bytes_of(layer)
    shown["codes"].zero_()
    assert same(bytes_of(layer), wanted), "what was written to is not shown again"


def test_the_form_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = module()
    before, wanted = bytes_of(layer), layer(x())
    for takes, dtype in ((on_gpu, torch.int32), (lambda *_: False, torch.uint8)):
        monkeypatch.setattr(module_file, "takes_fragments", takes)
        assert layer.to("cpu").codes.dtype == dtype
        assert same(bytes_of(layer), before)
        assert torch.equal(layer(x()), wanted)


def test_what_was_filled_in_buffer_by_buffer_is_settled(form: str) -> None:
    made, layer = case(SHAPE, 70, scatter=True, rank=2, seed=3), module(bias=False)
    for name, tensor in made.weight.tensors().items():
        setattr(layer, name, tensor)
    assert torch.equal(layer(x()), MixedLinear(made.weight)(x()))
    layer.settle()
    assert gpu.are_fragments(layer.codes) == (form == "fragments")
    assert torch.equal(layer(x()), MixedLinear(made.weight)(x()))


def test_loading_does_not_write_to_what_was_shown_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_file, "takes_fragments", on_gpu)
    layer, other = module(0), module(1)
    shown = layer.packed().tensors()
    before = {name: shown[name].clone() for name in ("codes", "scales")}
    layer.load_state_dict(other.state_dict())
    assert same({name: shown[name] for name in before}, before)
    assert same(bytes_of(layer), bytes_of(other))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_whoever_watches_still_sees_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, data = module(), x()
    with torch.no_grad():
        direct = layer(data)
        with _Recorder() as recorder:
            watched = layer(data)
        assert MIXED_LINEAR in recorder.seen
        assert torch.equal(direct, watched)
    answers: list[bool] = []
    torch.func.vmap(lambda row: answers.append(may_skip_dispatcher(row)) or row)(data)
    assert answers == [False]
    assert may_skip_dispatcher(data)
    assert not may_skip_dispatcher(data.clone().requires_grad_())
    assert not may_skip_dispatcher(nn.Parameter(data))
    monkeypatch.setattr(module_file, "may_skip_dispatcher", lambda _: False)
    assert torch.equal(layer(data), direct)


@pytest.mark.parametrize("assign", [False, True])
def test_state_round_trip_after_use(assign: bool) -> None:
    source = module(0)
    target = module(1)
    assert not torch.equal(source(x()), target(x()))
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(source(x()), target(x()))


def test_deepcopy_is_independent() -> None:
    layer = module()
    wanted = layer(x())
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x()), wanted)
    twin.factors.zero_()
    assert torch.equal(layer(x()), wanted)
    assert not torch.equal(twin(x()), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_casts_touch_the_bias_alone(dtype: torch.dtype) -> None:
    layer = module()
    before = bytes_of(layer)
    parent = nn.Sequential(layer).to(dtype)
    assert parent[0] is layer
    assert layer.bias.dtype == layer.weight.dtype == dtype
    assert same(bytes_of(layer), before)
    assert layer(x().to(dtype)).dtype == dtype


def test_shorthand_casts_and_moves() -> None:
    layer = module()
    before = bytes_of(layer)
    assert same(bytes_of(layer.half().bfloat16().double().float().cpu()), before)
    assert layer.bias.dtype == torch.float32
    empty = copy.deepcopy(layer).to("meta")
    assert {b.device.type for b in empty.buffers()} == {"meta"}
    assert (empty.factors.dtype, empty.branch_scale.dtype) == (torch.float16, torch.float32)
    with torch.device("cpu"):
        filled = empty.to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert torch.equal(filled(x()), layer(x()))


def test_a_failed_move_leaves_it_whole() -> None:
    layer = module()
    before, wanted = bytes_of(layer), layer(x())

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.int32:
            raise RuntimeError("out of memory")
        return tensor

    with pytest.raises(RuntimeError, match="out of memory"):
        layer._apply(fail)
    assert same(bytes_of(layer), before)
    assert torch.equal(layer(x()), wanted)


def test_weight_tells_shape_dtype_and_device_and_cannot_be_computed_with() -> None:
    layer = module()
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == ((33, 70), torch.float32, torch.device("cpu"))
    assert MixedLinear(case(SHAPE, 70).weight, None, torch.bfloat16).weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="OriginalWeight"):
        nn.functional.linear(x(), weight)
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(torch.zeros(33, 70))


@pytest.mark.parametrize("scales", Scales)
def test_every_form_survives_casts_moves_and_copies(scales: Scales) -> None:
    widths = torch.tensor([[1, 4, 8]] * 20 + [[2, 2, 4]] * 13, dtype=torch.uint8)
    layer = MixedLinear(draw(widths, 70, scales=scales, scatter=True, rank=2).weight, torch.ones(33))
    before, wanted = bytes_of(layer), layer(x())
    assert set(layer.state_dict()) == {*layer.fmt.tensors(), "bias"}
    assert same(bytes_of(layer.half().bfloat16().float()), before)
    assert torch.equal(copy.deepcopy(layer)(x()), wanted)
    filled = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert torch.equal(filled(x()), wanted)
    assert "(1+4+8x20 2+4x13)" in repr(layer)


def test_repr_is_one_short_line() -> None:
    bits = module().fmt.stored_bits() / (33 * 70)
    assert repr(module()) == f"MixedLinear(70 -> 33, {bits:.2f} bits (2x4 3x16 5x13), scatter, rank 2)"
    assert repr(module(rank=0, scatter=False)).endswith("(2x4 3x16 5x13), rank 0)")
