"""Capture against its oracle, the user's own module: same outputs, right sites, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from families import build
from formats import draw
from mixcomp import verify
from mixcomp.capture import capture, capture_dynamo
from mixcomp.errors import CaptureError, ConfigError, InvariantError
from mixcomp.format import Scales, Segment, SiteFormat
from mixcomp.lowering import gpu
from mixcomp.lowering import module as module_file
from mixcomp.lowering.module import MixedLinear
from mixcomp.ops import LINEAR
from mixcomp.packed import PackedWeight, pack_codes
from mixcomp.patterns import match, matches
from mixcomp.profiles import profiles
from mixcomp.program import META, Fact, Program
from nets import Branching, Net, Noisy, Shifted, ids, open_names, run

pytest_plugins = ["nets"]
pytestmark = pytest.mark.usefixtures("seeded")

#: family -> (linears in all, of which the parameter is transposed)
REPRESENTATIVE = {"llama-tied": (8, 0), "gpt2": (9, 8), "falcon": (5, 0)}


@cache
def captured(family: str) -> tuple[nn.Module, Program]:
    model = build(family, **({} if family == "gpt2" else {"num_hidden_layers": 1}))
    return model, capture(model)


# ---- transformers models


@pytest.mark.parametrize("family", REPRESENTATIVE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (2, 33)], ids=str)
def test_graph_computes_what_the_model_computes(family: str, shape: tuple[int, int]) -> None:
    model, program = captured(family)
    with torch.no_grad():
        wanted = model(ids(*shape)).logits
    torch.testing.assert_close(run(program, ids(*shape)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_sites_are_the_linear_modules(family: str) -> None:
    model, program = captured(family)
    modules = {n: m for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2}
    modules = {n: m for n, m in modules.items() if not isinstance(m, nn.Embedding)}
    count, transposed = REPRESENTATIVE[family]
    assert {s.name for s in program.sites} == set(modules)
    assert len(program.sites) == count
    assert sum(s.weight.transposed for s in program.sites) == transposed
    for site in program.sites:
        weight, bias = modules[site.name].weight, getattr(modules[site.name], "bias", None)
        assert (site.rows, site.columns) == tuple(weight.T.shape if site.weight.transposed else weight.shape)
        assert site.bias == (None if bias is None else f"{site.name}.bias")
        assert model.get_parameter(site.weight.key) is weight
        assert site.open == (site.name != "lm_head")


@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_program_obeys_the_laws_and_shares_parameters(family: str) -> None:
    model, program = captured(family)
    verify.check(program, level=2)
    own = {id(p) for p in model.parameters()}
    copy = program.clone()
    verify.check(copy, before=program)
    for one in (program, copy):
        assert {id(p) for p in one.graph_module.parameters()} == own
        for site in one.open_sites():
            weight = model.get_parameter(site.weight.key)
            assert one.weight(site).data_ptr() == weight.data_ptr()
            assert torch.equal(one.weight(site), weight.T if site.weight.transposed else weight)


def test_clone_keeps_names_meta_and_calling_convention_and_is_independent() -> None:
    _, program = captured("gpt2")
    copy = program.clone()
    old, new = list(program.graph_module.graph.nodes), list(copy.graph_module.graph.nodes)
    assert [n.name for n in new] == [n.name for n in old]
    assert [n.meta for n in new] == [n.meta for n in old]
    assert torch.equal(copy.graph_module(input_ids=ids(2, 3)).logits, program.graph_module(ids(2, 3)).logits)
    copy.graph_module.graph.erase_node(new[-1])
    assert next(reversed(program.graph_module.graph.nodes)).op == "output"


def test_projections_of_one_activation_have_one_input() -> None:
    _, program = captured("llama-tied")
    layer = {s.name.removeprefix("model.layers.0."): s.input for s in program.sites}
    attention = {layer[f"self_attn.{p}_proj"] for p in "qkv"}
    assert len(attention) == 1
    assert layer["mlp.gate_proj"] == layer["mlp.up_proj"]
    assert len({*attention, layer["mlp.gate_proj"], layer["self_attn.o_proj"], layer["mlp.down_proj"]}) == 4
    _, program = captured("gpt2")  # its projections see the activation through a view
    for site in program.sites:
        node, x = program.node(site.input), program.node(site.calls[0]).args[0]
        assert "view" not in str(node.target)
        assert node.meta["val"].shape[-1] == x.meta["val"].shape[-1] == site.columns  # type: ignore[union-attr]


def test_biases_added_apart_become_part_of_the_linear() -> None:
    _, program = captured("falcon")
    calls = [n for n in program.graph_module.graph.nodes if n.target is LINEAR]
    assert sum(n.args[2] is not None for n in calls) == 4
    assert all(program.site(n.meta[META]).bias == n.args[2].target for n in calls if n.args[2] is not None)


def test_a_shift_of_another_module_is_no_bias() -> None:
    model = Net(Shifted())
    program = capture(model)
    assert [(s.name, s.bias, s.reason) for s in program.sites] == [("layers.0.inner", None, None)]
    assert torch.equal(run(program, ids(2, 3)), model(ids(2, 3)))


def test_a_head_tied_to_the_embedding_is_left_alone() -> None:
    _, program = captured("llama-tied")
    head = program.site("lm_head")
    assert (head.weight.key, head.weight.aliases) == ("lm_head.weight", ("model.embed_tokens.weight",))
    assert not head.in_scope
    assert head.reason == "tied to the embedding model.embed_tokens.weight"


def test_experts_are_refused_by_name() -> None:
    message = (
        r"(?s)only 11\.1% .* min_coverage is 90\.0%.*"
        r"model\.layers\.\*\.mlp\.experts\.gate_up_proj \(1 parameters, 65,536 weights\): a stacked weight .*"
        r"model\.layers\.\*\.mlp\.gate \(1 parameters, 256 weights\).*Pass min_coverage=0\.11"
    )
    with pytest.raises(CaptureError, match=message):
        capture(build("mixtral", num_hidden_layers=1))


# ---- weight identity


def test_one_module_called_twice_is_one_site() -> None:
    layer = nn.Linear(32, 32)
    program = capture(Net(layer, nn.ReLU(), layer, nn.Linear(32, 16)))
    assert [(s.name, len(s.calls), s.reason) for s in program.sites] == [("layers.0", 2, None), ("layers.3", 1, None)]
    assert program.sites[0].weight.aliases == ("layers.2.weight",)
    verify.check(program)


def test_one_parameter_in_two_modules_is_one_site() -> None:
    first, second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    second.weight = nn.Parameter(first.weight.data)  # another Parameter object over the same memory
    program = capture(Net(first, nn.ReLU(), second))
    assert [(s.name, len(s.calls), s.reason) for s in program.sites] == [("layers.0", 2, None)]
    assert program.sites[0].weight.aliases == ("layers.2.weight",)
    verify.check(program)


def test_weights_of_any_layout_and_dtype_work_as_they_are() -> None:
    columns_first = nn.Linear(32, 48)
    columns_first.weight = nn.Parameter(torch.randn(32, 48).T)
    sliced = nn.Linear(48, 32)
    sliced.weight = nn.Parameter(torch.randn(64, 96)[::2, ::2])
    model = Net(columns_first, sliced).to(torch.bfloat16)
    program = capture(model)
    assert [s.reason for s in program.sites] == [None, None]
    assert {s.weight.dtype for s in program.sites} == {torch.bfloat16}
    assert torch.equal(run(program, ids(2, 5)), model(ids(2, 5)))


# ---- scope


class WithHead(Net):
    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 32), nn.Linear(32, 32))
        self.head = nn.Linear(32, 32, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(super().forward(ids))


def test_include_and_exclude() -> None:
    model = WithHead()
    program = capture(model)
    assert open_names(program) == ["layers.0", "layers.1"]
    assert not program.site("head").in_scope
    assert open_names(capture(model, include=["head"])) == ["layers.0", "layers.1", "head"]
    program = capture(model, include=["head"], exclude=["re:layers\\.[1-9]"])
    assert open_names(program) == ["layers.0", "head"]
    assert program.site("layers.1").reason == "excluded by the pattern 're:layers\\\\.[1-9]'"
    with pytest.raises(ConfigError, match=r"exclude pattern 'layer\.1' matches no site; the nearest sites are layers"):
        capture(model, exclude=["layer.1"])
    model.head.weight = model.embed.weight
    tied = capture(model, include=["head"]).site("head")
    assert (tied.in_scope, tied.reason) == (False, "tied to the embedding embed.weight")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        *((pattern, True) for pattern in ("a.0.q", "a.0", "a", "*.q", "a.?.q", "re:a\\..*")),
        *((pattern, False) for pattern in ("a.0.", "q", "re:q", "re:a", "A.0.q", "a.00")),
    ],
)
def test_patterns(pattern: str, found: bool) -> None:
    assert matches(pattern, "a.0.q") == found


def test_broken_pattern() -> None:
    with pytest.raises(ConfigError, match=r"include 'head' is not a list of patterns"):
        capture(WithHead(), include="head")
    with pytest.raises(ConfigError, match=r"overrides pattern 're:\(' is not a regular expression"):
        match("overrides", "re:(", ["a"])


# ---- nothing is left behind


def state(model: nn.Module) -> object:
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    modes = [(n, m.training) for n, m in model.named_modules()]
    values = [(n, id(p), p.requires_grad, p._version, p.sum().item()) for n, p in model.named_parameters()]
    attributes = [(n, sorted(vars(m))) for n, m in model.named_modules()]
    return hooks, modes, values, attributes, torch.get_rng_state().tolist(), torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [Net, Branching, Noisy])
def test_the_model_is_as_before(kind: type[Net]) -> None:
    model = kind(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32)).train()
    model.layers[2].eval()
    before = state(model)
    if kind is Net:
        program = capture(model)
        assert torch.equal(run(program, ids(2, 3)), run(program, ids(2, 3)))  # dropout is off in the graph
    else:
        with pytest.raises(CaptureError):
            capture(model)
    assert state(model) == before


def test_gradients_flow_through_the_graph() -> None:
    model = Net(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    capture(model).graph_module(ids(2, 3)).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    model(ids(2, 3)).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(got, model.parameters(), strict=True))  # type: ignore[arg-type]


def test_writes_in_place_become_functional() -> None:
    class InPlace(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            x += 1
            return x.mul_(2)

    model = Net(nn.Linear(32, 32), InPlace(32, 32))
    program = capture(model, min_coverage=0.5)
    verify.check(Program(program.graph_module, program.sites))
    torch.testing.assert_close(run(program, ids(2, 3)), model(ids(2, 3)), rtol=1e-6, atol=1e-6)


# ---- Dynamo


def dynamo_programs(model: nn.Module, tokens: torch.Tensor) -> tuple[list[Program], torch.Tensor]:
    found: list[Program] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = module.code
        found.append(capture_dynamo(module, inputs))
        assert module.code == before
        return found[-1].graph_module.forward

    torch.compiler.reset()
    with torch.no_grad():
        out = torch.compile(model, backend=backend, dynamic=True)(tokens)
    return found, out


def test_plain_linears_of_a_dynamo_graph_are_left_alone() -> None:
    shared = nn.Linear(32, 32)
    model = Net(shared, nn.ReLU(), shared, nn.Linear(32, 16, bias=False))
    (program,), out = dynamo_programs(model, ids(2, 3))
    assert torch.equal(out, model(ids(2, 3)))
    assert [(s.name, s.weight.shape, len(s.calls)) for s in program.sites] == [
        ("layers.0", (32, 32), 2),
        ("layers.3", (16, 32), 1),
    ]
    assert all("call mixcomp.compile" in (s.reason or "") for s in program.sites)
    assert not program.facts


class Careless(nn.Module):
    """Computes what nobody reads, and writes in place with results that nobody reads either."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.arange(x.shape[0]) * 2
        x = x * 2
        x.add_(1)
        x[0] = 3
        torch.relu_(x)
        return x


def test_dead_nodes_of_a_dynamo_graph_go_and_writes_in_place_stay() -> None:
    model = Net(nn.Linear(32, 32), Careless())
    (program,), out = dynamo_programs(model, ids(2, 3))
    assert torch.equal(out, model(ids(2, 3)))
    verify.check(program, level=2)
    unused = [node.name for node in program.graph_module.graph.nodes if not node.users and node.op == "call_function"]
    assert len(unused) == 3


@pytest.mark.parametrize("scales", Scales)
def test_every_form_comes_back_from_a_dynamo_graph(scales: Scales) -> None:
    widths = torch.tensor([[2, 4], [2, 4], [8, 8], [4, 1]] * 8, dtype=torch.uint8)
    layer = MixedLinear(draw(widths[profiles(widths).argsort(stable=True)], 64, scales=scales, scatter=True).weight)
    model = Net(nn.Linear(32, 64), layer)
    (program,), out = dynamo_programs(model, ids(2, 3))
    assert torch.equal(out, model(ids(2, 3)))
    assert program.site("layers.1").format == layer.fmt
    assert set(layer.fmt.tensors()) <= {key.rpartition("/")[2] for key in program.tensors}


def test_mixed_linears_of_a_dynamo_graph_are_lowered_sites() -> None:
    fmt = SiteFormat(32, 32, (Segment(24, 4), Segment(8, 8)), scatter=True, rank=2)
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 32), generator=draw, dtype=torch.uint8)
    order = torch.randperm(32, generator=draw)
    branch = torch.ones(32, 2, dtype=torch.int8), torch.ones(2, 32, dtype=torch.int8), torch.ones(2)
    scales = torch.ones(32, 1, dtype=torch.uint8)
    weight = PackedWeight(fmt, pack_codes(codes, fmt), scales, torch.ones(32).half(), order.to(torch.int16), *branch)
    layer = MixedLinear(weight, torch.ones(32))
    model = Net(layer, nn.ReLU(), layer)
    (program,), out = dynamo_programs(model, ids(2, 3))
    torch.testing.assert_close(out, model(ids(2, 3)), rtol=1e-6, atol=1e-6)
    (site,) = program.sites
    assert (site.name, site.format, len(site.calls), site.reason) == ("layers.0", fmt, 2, None)
    assert program.facts == {Fact.LOWERED}
    assert {name: program.tensor("layers.0", name).data_ptr() for name in fmt.tensors()} == {
        name: getattr(layer, name).data_ptr() for name in fmt.tensors()
    }


def test_fragments_of_a_dynamo_graph_pass_the_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU holds them; they are no stored bytes and stay out of the table."""
    monkeypatch.setattr(module_file, "takes_fragments", lambda device, _: device == "cpu")
    layer = MixedLinear(draw(torch.full((32, 1), 5, dtype=torch.uint8), 32, scatter=True, rank=2).weight)
    assert gpu.are_fragments(layer.codes)
    model = Net(layer)
    (program,), out = dynamo_programs(model, ids(2, 3))
    assert torch.equal(out, model(ids(2, 3)))
    verify.check(program, level=2)
    assert program.sites[0].format == layer.fmt
    assert {key.rpartition("/")[2] for key in program.tensors} == set(layer.fmt.tensors()) - {"codes", "scales"}
    codes = next(node for node in program.graph_module.graph.nodes if "codes" in node.name)
    codes.meta["val"] = codes.meta["val"][:-1]
    with pytest.raises(InvariantError, match=r"I16.*codes is no u8"):
        verify.check(program)
