"""lower-linears and write_back: the graph and the module tree compute what the stored tensors mean."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from lowering_cases import Case, case
from mixcomp.errors import InputError
from mixcomp.lowering.lower import PREFIX, LowerLinears, write_back
from mixcomp.lowering.module import MixedLinear
from mixcomp.lowering.ops import MIXED_LINEAR
from mixcomp.ops import LINEAR
from mixcomp.program import META, Program, Site, WeightRef
from mixcomp.protocol import Context
from programs import Blueprint, Kind, Layer, build, tokens

UP, GATE, DOWN = "layers.0.up", "layers.0.gate", "layers.0.down"
BLUEPRINT = Blueprint(
    (
        Layer(Kind.GATED, 24, bias=True),
        Layer(Kind.PLAIN, 33, bias=True),
        Layer(Kind.REUSED, 33),
        Layer(Kind.TRANSPOSED, 40, bias=True),
    ),
    width=33,
)


def stored(program: Program, absorb: bool = True) -> tuple[Program, dict[str, torch.Tensor]]:
    """The program with random formats, and what each weight now means: fp64, rows and columns in original order.

    ``up`` and ``gate`` keep a permutation that ``down`` takes over; the other sites scatter and have a side branch.
    """
    tensors: dict[str, torch.Tensor] = {}
    sites: dict[str, Site] = {}
    meaning: dict[str, torch.Tensor] = {}
    absorbed = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    for number, site in enumerate(program.open_sites()):
        free = absorb and site.name in (UP, GATE)
        segments = [(site.rows // 3, 3), (site.rows - site.rows // 3, 5)]
        made: Case = case(segments, site.columns, scatter=not free, rank=0 if free else 2, seed=number)
        weight = made.base + made.side
        index = made.weight.row_index
        tensors[f"{site.name}/row_order"] = absorbed if index is None else index.long()
        if free:
            weight = torch.empty_like(weight).index_copy_(0, absorbed, weight)
        if absorb and site.name == DOWN:
            tensors[f"{site.name}/column_order"] = absorbed
            weight = torch.empty_like(weight).index_copy_(1, absorbed, weight)
        meaning[site.name] = weight
        sites[site.name] = replace(site, format=made.weight.fmt)
        tensors |= {f"{site.name}/{name}": t for name, t in made.weight.tensors().items()}
    return program.with_sites(sites).with_tensors(tensors), meaning


class Meaning(fx.Interpreter):
    """Runs the graph before lowering with other weights, in fp64 where they are multiplied."""

    def __init__(self, program: Program, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(program.graph_module)
        self.weights = weights

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not LINEAR or n.meta[META] not in self.weights:
            return super().run_node(n)
        x, _, bias, _ = self.fetch_args_kwargs_from_env(n)[0]
        out = x.double() @ self.weights[n.meta[META]].t()
        return (out if bias is None else out + bias).to(x.dtype)


def lowered(program: Program) -> Program:
    return LowerLinears().run(program.clone(), Context())


@pytest.mark.parametrize("absorb", [True, False])
def test_graph_computes_what_is_stored(absorb: bool) -> None:
    program, meaning = stored(build(BLUEPRINT), absorb)
    after = lowered(program)
    after.graph_module.graph.lint()
    for samples, length in ((2, 5), (1, 1), (3, 0)):
        ids = tokens(BLUEPRINT, samples, length)
        got = after.graph_module(input_ids=ids)
        torch.testing.assert_close(got, Meaning(program, meaning).run(ids), rtol=1e-4, atol=1e-5)


def test_graph_rounds_activations_of_many_tokens() -> None:
    program, meaning = stored(build(BLUEPRINT))
    after = LowerLinears("int8").run(program.clone(), Context())
    assert {site.activations for site in after.sites if site.format} == {"int8"}
    few, many = tokens(BLUEPRINT, 2, 64), tokens(BLUEPRINT, 2, 65)
    assert torch.equal(after.graph_module(input_ids=few), lowered(program).graph_module(input_ids=few))
    got, wanted = after.graph_module(input_ids=many), Meaning(program, meaning).run(many)
    assert not torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_calls_keep_name_and_meta_and_originals_are_gone() -> None:
    program, _ = stored(build(BLUEPRINT))
    before = {n.name: n for n in program.graph_module.graph.nodes if n.target is LINEAR}
    after = lowered(program)
    calls = {n.name: n for n in after.graph_module.graph.nodes if n.target is MIXED_LINEAR}
    assert set(calls) == {call for site in program.open_sites() for call in site.calls}
    for name, node in calls.items():
        assert node.meta[META] == before[name].meta[META]
        assert node.meta["val"] is before[name].meta["val"]
    left = [n.meta[META] for n in after.graph_module.graph.nodes if n.target is LINEAR]
    assert left == ["lm_head"]
    held = {name for name, _ in (*after.graph_module.named_parameters(), *after.graph_module.named_buffers())}
    read = [str(n.target) for n in after.graph_module.graph.nodes if n.op == "get_attr"]
    assert sorted(held) == sorted(read)
    assert f"{DOWN}.weight" not in held
    assert f"{UP}.bias" not in held
    assert f"{DOWN}.bias" in held
    assert {f"{PREFIX}.{UP}.codes", f"{PREFIX}.{UP}.bias"} <= held


def test_packed_tensors_are_shared_and_the_given_program_is_not_changed() -> None:
    program, _ = stored(build(BLUEPRINT))
    text = program.graph_module.code
    after = lowered(program)
    assert program.graph_module.code == text
    assert after.graph_module.get_buffer(f"{PREFIX}.{DOWN}.codes") is program.tensor(DOWN, "codes")
    twice = LowerLinears().run(after.clone(), Context())
    assert twice.graph_module.code == after.graph_module.code


def test_new_nodes_carry_fake_values() -> None:
    after = lowered(stored(build(BLUEPRINT))[0])
    for node in after.graph_module.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith(PREFIX):
            value, real = node.meta["val"], after.graph_module.get_buffer(str(node.target))
            assert (value.shape, value.dtype) == (real.shape, real.dtype)


# write_back


class Block(nn.Module):
    """A gated block; ``again`` is ``down`` under a second name, ``tied`` another module with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(33, 24), nn.Linear(33, 24), nn.Linear(24, 33, bias=False)
        self.again = self.down
        self.tied = nn.Linear(24, 33, bias=False)
        self.tied.weight = self.down.weight
        self.conv = Conv(33, 16)
        self.head = nn.Linear(33, 13, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.nn.functional.silu(self.gate(x)) * self.up(x)
        return self.conv(x + self.down(inner) + self.again(inner) + self.tied(inner))


class Conv(nn.Module):
    """As GPT-2's Conv1D: the weight is (columns, rows)."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(columns, rows)), nn.Parameter(torch.randn(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


@pytest.fixture
def model() -> Block:
    torch.random.manual_seed(0)
    return Block().eval()


def compiled(model: Block) -> tuple[Program, dict[str, torch.Tensor]]:
    """A program about ``model`` (write_back reads no graph), and what each weight now means."""
    shapes = {"up": (24, 33), "gate": (24, 33), "down": (33, 24), "conv": (16, 33)}
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    sites, tensors, meaning = [], {}, {}
    for number, (name, shape) in enumerate(shapes.items()):
        free = name in ("up", "gate")
        made = case([(shape[0] - 3, 3), (3, 6)], shape[1], scatter=not free, rank=0 if free else 1, seed=number)
        aliases = ("again.weight", "tied.weight") if name == "down" else ()
        dtype = model.get_parameter(f"{name}.weight").dtype
        reference = WeightRef(f"{name}.weight", aliases, shape, dtype, transposed=name == "conv")
        bias = None if name == "down" else f"{name}.bias"
        sites.append(Site(name, (), reference, bias, "x", format=made.weight.fmt))
        weight = made.base + made.side
        if free:
            tensors[f"{name}/row_order"] = order
            weight = torch.empty_like(weight).index_copy_(0, order, weight)
        if name == "down":
            weight = torch.empty_like(weight).index_copy_(1, order, weight)
        tensors |= {f"{name}/{key}": t for key, t in made.weight.tensors().items()}
        meaning[name] = weight.float()
    head = Site("head", (), WeightRef("head.weight", (), (13, 33), torch.float32), None, "x", False, "not in scope")
    return Program(fx.GraphModule({}, fx.Graph()), (*sites, head), tensors), meaning


def test_write_back_computes_what_is_stored(model: Block) -> None:
    program, meaning = compiled(model)
    x = torch.randn(4, 33)
    with torch.no_grad():
        wanted = Block().eval()
        wanted.load_state_dict(model.state_dict())
        for name, weight in meaning.items():
            wanted.get_parameter(f"{name}.weight").copy_(weight.t() if name == "conv" else weight)
        write_back(program, model)
        torch.testing.assert_close(model(x), wanted(x), rtol=1e-4, atol=1e-4)


def test_every_path_gets_the_new_module(model: Block) -> None:
    model.train()
    model.gate.eval()
    head = model.head
    write_back(compiled(model)[0], model)
    assert all(isinstance(m, MixedLinear) for m in (model.up, model.gate, model.down, model.conv))
    assert model.down is model.again is model.tied
    assert model.head is head
    assert model.up.training
    assert not model.gate.training
    assert [n for n, _ in model.named_children()] == ["up", "gate", "down", "conv", "head"]
    assert {n for n, _ in model.named_parameters()} == {"head.weight"}


def test_dtypes_stay(model: Block) -> None:
    model.bfloat16()
    write_back(compiled(model)[0], model)
    assert model.down.weight.dtype == model.up.bias.dtype == torch.bfloat16
    assert model(torch.randn(2, 33).bfloat16()).dtype == torch.bfloat16


def test_originals_are_freed(model: Block) -> None:
    program, _ = compiled(model)
    weights = [weakref.ref(model.get_parameter(f"{name}.weight")) for name in ("up", "down", "conv")]
    write_back(program, model)
    gc.collect()
    assert [ref() for ref in weights] == [None] * 3


class Stubborn(Block):
    """Refuses to have ``conv``, the last site, replaced."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, MixedLinear) and name == "conv":
            raise RuntimeError("hands off")
        super().__setattr__(name, value)


def _missing(program: Program, model: Block) -> tuple[Program, nn.Module]:
    return program.with_tensors({}, frozenset({"conv/factors"})), model


def _other_shape(program: Program, model: Block) -> tuple[Program, nn.Module]:
    model.conv = Conv(33, 17)
    return program, model


def _no_such_path(program: Program, model: Block) -> tuple[Program, nn.Module]:
    del model.conv
    return program, model


def _twice(program: Program, model: Block) -> tuple[Program, nn.Module]:
    write_back(program, model)
    return program, model


def _stubborn(program: Program, model: Block) -> tuple[Program, nn.Module]:
    return program, Stubborn().eval()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing, "conv/factors"),
        (_other_shape, r"conv is \(33, 17\), the captured one was \(33, 16\)"),
        (_no_such_path, "conv.*was captured"),
        (_twice, "up.*was captured"),
        (_stubborn, "hands off"),
    ],
)
def test_all_or_none(model: Block, spoil: Callable[[Program, Block], tuple[Program, nn.Module]], message: str) -> None:
    program, victim = spoil(compiled(model)[0], model)
    before = list(victim.named_modules(remove_duplicate=False))
    with pytest.raises(Exception, match=message):
        write_back(program, victim)
    after = list(victim.named_modules(remove_duplicate=False))
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(old is new for (_, old), (_, new) in zip(before, after, strict=True))


def test_a_model_that_is_itself_the_linear_is_refused() -> None:
    layer = nn.Linear(33, 24)
    program, _ = compiled(Block())
    site = replace(program.site("up"), name="weight", weight=WeightRef("weight", (), (24, 33), torch.float32))
    tensors = {key.replace("up/", "weight/"): t for key, t in program.tensors.items()}
    with pytest.raises(InputError, match="itself"):
        write_back(Program(program.graph_module, (site,), tensors), layer)
