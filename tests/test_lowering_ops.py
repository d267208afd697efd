"""The operator: which path it takes, what it refuses, and how it behaves under torch.compile and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from formats import Drawn, draw
from lowering_cases import Case, case
from mixcomp.errors import ConfigError, MixCompError
from mixcomp.format import NAMES, Scales, Segment, SiteFormat
from mixcomp.lowering import gpu, ops, select
from mixcomp.lowering.module import MixedLinear
from mixcomp.lowering.ops import MIXED_LINEAR
from mixcomp.lowering.select import (
    MAX_BAG_TOKENS,
    MAX_FUSED_TOKENS,
    MIN_BAG_COLUMNS,
    Path,
    choose_path,
    explain,
    takes_fragments,
)

MADE = case([(16, 3), (17, 5)], 70, scatter=True, rank=2, bias=True, dyadic=True)
FORMAT = SiteFormat(8, 128, (Segment(8, 4),))


def arguments(made: Case, x: torch.Tensor) -> tuple[Any, ...]:
    w = made.weight
    segments = [n for s in w.fmt.segments for n in (s.rows, s.width)]
    branch = w.branch_a, w.branch_b, w.branch_scale
    return x, w.codes, w.scales, w.factors, w.row_index, *branch, made.bias, segments, w.fmt.columns


def call(made: Case, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = MIXED_LINEAR(*arguments(made, x))
    return out


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "wanted"),
    [
        ("cpu", torch.float32, 1, Path.CPU_BAGS),
        ("cpu", torch.bfloat16, MAX_BAG_TOKENS, Path.CPU_BAGS),
        ("cpu", torch.float16, MAX_BAG_TOKENS + 1, Path.CPU_GEMM),
        ("cpu", torch.float64, 1, Path.REFERENCE),
        ("cuda", torch.bfloat16, 1, Path.TRITON),
        ("cuda", torch.float32, MAX_FUSED_TOKENS, Path.TRITON),
        ("cuda", torch.float16, MAX_FUSED_TOKENS + 1, Path.TRITON_GEMM),
        ("cuda", torch.float64, 1, Path.REFERENCE),
        ("mps", torch.float16, 1, Path.REFERENCE),
    ],
)
def test_path(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, tokens: int, wanted: Path) -> None:
    monkeypatch.setattr(select, "triton_installed", lambda: True)
    assert choose_path(device, dtype, FORMAT, tokens) is wanted
    assert explain(device, dtype, FORMAT, tokens).startswith(f"{wanted.value}: ")


def test_who_takes_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "triton_installed", lambda: True)
    assert [takes_fragments(device, FORMAT) for device in ("cuda", "cpu", "meta", "mps")] == [True, False, False, False]
    assert not takes_fragments("cuda", SiteFormat(8, 128, (Segment(8, 4),), group=64))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not takes_fragments("cuda", FORMAT)
    assert "NVIDIA" in explain("cuda", torch.float16, FORMAT, 1)
    monkeypatch.setattr(select, "triton_installed", lambda: False)
    assert not takes_fragments("cuda", FORMAT)


def test_path_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = SiteFormat(8, MIN_BAG_COLUMNS - 1, (Segment(8, 4),))
    assert choose_path("cpu", torch.float32, narrow, 1) is Path.CPU_GEMM
    monkeypatch.setattr(select, "bags_available", lambda: False)
    assert choose_path("cpu", torch.float32, FORMAT, 1) is Path.REFERENCE
    monkeypatch.setattr(select, "triton_installed", lambda: False)
    assert explain("cuda", torch.float16, FORMAT, 1) == "reference: triton is not installed"


def test_this_torch_has_the_bags() -> None:
    assert select.bags_available()


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2,), (17,), (2, 0), (2, 3), (2, 1, 3)])
def test_any_leading_shape(leading: Sequence[int]) -> None:
    x = MADE.activations(*leading, dyadic=True)
    assert torch.equal(call(MADE, x), MADE.product(x).float())


@pytest.mark.parametrize("path", [Path.CPU_BAGS, Path.CPU_GEMM, Path.REFERENCE])
def test_any_strides(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    for x in (
        MADE.activations(3, dyadic=True)[:, None].expand(3, 4, 70),
        MADE.activations(5, 6, dyadic=True)[1::2, ::3],
        MADE.activations(2, 3, dyadic=True).mT.contiguous().mT,
        torch.cat((MADE.activations(4, dyadic=True), torch.full((4, 5), torch.nan)), 1)[:, :70],
    ):
        assert not x.is_contiguous()
        assert torch.equal(call(MADE, x), MADE.product(x).float())


def test_each_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(ops.cpu, "by_bags", lambda x, *_: taken.append("bags") or x.new_zeros(len(x), 33))
    monkeypatch.setattr(ops.cpu, "by_gemm", lambda x, *_: taken.append("gemm") or x.new_zeros(len(x), 33))
    for tokens in (0, 1, MAX_BAG_TOKENS + 1):
        call(MADE, MADE.activations(tokens))
    assert taken == ["bags", "gemm"]
    assert torch.equal(call(MADE, MADE.activations(1).double()), MADE.product(MADE.activations(1)))


def fragments(made: Case, x: torch.Tensor) -> tuple[Any, ...]:
    """``arguments`` as a module on a GPU gives them."""
    _, codes, scales, *rest = arguments(made, x)
    return x, *gpu.to_fragments(codes, scales, made.weight.fmt), *rest


@pytest.mark.parametrize(
    ("path", "name"), [(Path.TRITON, "mixed_linear"), (Path.TRITON_GEMM, "expanded_linear")], ids=lambda p: str(p)
)
def test_triton_gets_flat_activations_and_the_format(monkeypatch: pytest.MonkeyPatch, path: Path, name: str) -> None:
    launch = pytest.importorskip("mixcomp.kernels.launch")
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    monkeypatch.setattr(launch, name, lambda *args: seen.append(args) or args[0].new_zeros(6, 33))
    x = MADE.activations(2, 3)
    given = fragments(MADE, x)
    assert MIXED_LINEAR(*given).shape == (2, 3, 33)
    assert torch.equal(seen[0][0], x.view(6, 70))
    assert all(got is operand for got, operand in zip(seen[0][1:-1], given[1:-2], strict=True))
    assert seen[0][-1] == MADE.weight.fmt
    x = MADE.activations(4, dyadic=True)
    assert torch.equal(call(MADE, x), MADE.product(x).float()), "stored bytes have no kernel on a GPU, but a result"
    assert len(seen) == 1


@pytest.mark.parametrize("tokens", [1, MAX_BAG_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whoever_cannot_read_fragments_unpacks_them(tokens: int, dtype: torch.dtype) -> None:
    x = MADE.activations(tokens, dyadic=True).to(dtype)
    assert torch.equal(MIXED_LINEAR(*fragments(MADE, x)), MADE.product(x).to(dtype))


def test_opcheck_of_fragments() -> None:
    torch.library.opcheck(MIXED_LINEAR, fragments(MADE, MADE.activations(2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype: torch.dtype, bias: bool) -> None:
    made = case([(9, 4), (4, 6)], 70, scatter=bias, rank=int(bias), bias=bias)
    torch.library.opcheck(MIXED_LINEAR, arguments(made, made.activations(2, 3).to(dtype)))


def other_forms() -> list[tuple[str, Drawn]]:
    """A site for every way to depart from the default format, each with the reason for the reference path."""
    table = torch.tensor([[2, 4, 8]] * 5 + [[1, 1, 4]] * 4, dtype=torch.uint8)
    rows = torch.tensor([4] * 5 + [8] * 4, dtype=torch.uint8)
    float_group, more = Scales.FLOAT_GROUP, {"scatter": True, "rank": 2, "dyadic": True}
    return [
        ("several widths along a row", draw(table, 70, **more)),
        ("float-group scales", draw(rows, 70, scales=float_group, **more)),
        ("float-group scales", draw(table, 150, group=64, scales=float_group, **more)),
        ("groups of 128 columns", draw(rows, 70, group=128, **more)),
        ("rows of 1 bit", draw(torch.ones(9, dtype=torch.uint8), 70, **more)),
    ]


@pytest.mark.parametrize(("reason", "made"), other_forms())
def test_what_no_fast_path_reads_goes_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, reason: str, made: Drawn
) -> None:
    monkeypatch.setattr(select, "triton_installed", lambda: True)
    for device in ("cpu", "cuda"):
        assert explain(device, torch.float16, made.weight.fmt, 1) == f"reference: no fast path reads {reason}"
    bias = torch.arange(9) / 4
    x = torch.randint(-4, 5, (2, 3, made.weight.fmt.columns), generator=torch.Generator().manual_seed(3)).float()
    layer = MixedLinear(made.weight, bias)
    wanted = (x.double() @ made.output().T + bias).float()
    assert torch.equal(layer(x), wanted)
    fmt, held = made.weight.fmt, [getattr(made.weight, name) for name in NAMES]
    constants = fmt.constants(), fmt.columns
    operands = (x, *held[:7], bias, *constants, *held[7:], fmt.group, int(fmt.scales))
    assert torch.equal(MIXED_LINEAR(*operands), wanted)
    torch.library.opcheck(MIXED_LINEAR, operands)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), wanted)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch._dynamo.config.patch(only_allow_pt2_compliant_ops=True)
def test_compiles_whole_with_dynamic_shapes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    made = case([(16, 3), (17, 5)], 70, scatter=True, bias=True, dyadic=True)
    forms: list[object] = []
    make = ops.cpu.make_form
    monkeypatch.setattr(ops.cpu, "make_form", lambda weight: forms.append(weight) or make(weight))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda x: call(made, x * 2) + 1, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (3, 2, 17, 5, MAX_BAG_TOKENS + 1):
            x = made.activations(tokens, dyadic=True) / 2
            assert torch.equal(compiled(x), (made.product(x * 2) + 1).float())
    assert counter.frame_count == 1
    assert len(forms) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_going_back_through_it_is_an_error(compiled: bool) -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda x: call(MADE, x), backend="aot_eager") if compiled else lambda x: call(MADE, x)
    x = MADE.activations(2, dyadic=True).requires_grad_()
    out = run(x)
    assert torch.equal(out, MADE.product(x).float())
    with pytest.raises(MixCompError, match=r"inference only.*no_grad"):
        out.sum().backward()
    with torch.no_grad():
        assert not run(x).requires_grad


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_form_made_in_inference_mode_serves_everywhere(tokens: int) -> None:
    made = case([(16, 3), (17, 5)], 70, scatter=True, rank=2, bias=True, dyadic=True)
    x = made.activations(tokens, dyadic=True)
    with torch.inference_mode():
        first = call(made, x)
    with torch.no_grad():
        assert torch.equal(call(made, x), first)
    assert torch.equal(call(made, x.requires_grad_()), first)


def test_autocast_does_not_round_inside() -> None:
    made = case([(33, 6)], 129)
    x = made.activations(20)
    for tokens in (1, 20):
        with torch.autocast("cpu", torch.bfloat16):
            got = call(made, x[:tokens])
        assert ((got.double() - made.product(x[:tokens])).abs() <= made.bound(x[:tokens], torch.float32)).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 69), r"\[2, 69\].*must be 70"),
        (torch.zeros(()), r"\[\].*must be 70"),
        (torch.zeros(2, 70, dtype=torch.int64), "int64.*floating-point"),
        (torch.zeros(2, 70, device="meta"), "meta.*cpu.*move"),
    ],
)
def test_refuses_what_does_not_fit(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(MADE, x)


def test_meta_tensors_have_the_right_shape() -> None:
    given = arguments(MADE, MADE.activations(2, 5).half())
    out = MIXED_LINEAR(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in given])
    assert (out.shape, out.dtype, out.device.type) == ((2, 5, 33), torch.float16, "meta")
