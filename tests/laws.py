"""Laws that every pass obeys, G1-G13; ``test_pass_laws`` tests them on every registered pass.

Hypothesis draws a pool of programs; each is taken through the whole pipeline once (the manager verifies on the
way), and every law looks at the programs between two passes.  A new pass needs an entry in ``PIPELINE`` and nothing
here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import fx

import strategies
from mixcomp import budget as counting
from mixcomp.config import Budget
from mixcomp.errors import PassError, PassOrderError
from mixcomp.lowering.lower import LowerLinears
from mixcomp.manager import run
from mixcomp.packed import PackedWeight
from mixcomp.passes import PIPELINE, InsertSideBranch
from mixcomp.passes.directions import branch_bits, most_directions
from mixcomp.passes.strategies import STRATEGIES, passes_of
from mixcomp.printer import digest, module_tensors
from mixcomp.program import META, Fact, Program, Site
from mixcomp.protocol import Context, Pass, Semantics
from mixcomp.snapshot import Snapshot, arguments, is_linear, is_mixed, signature
from mixcomp.verify import check
from programs import ABSORBING, EVERYTHING, GATED, Blueprint, build, context, own, tokens

#: the default pipeline, and what other strategies put between its first pass and its reordering
MAIN: tuple[type[Pass], ...] = (*PIPELINE, LowerLinears)
OTHERS = tuple(passes_of(name, Budget(4.4)) for name in STRATEGIES if name not in ("joint", "uniform"))
PASSES: tuple[type[Pass], ...] = (*MAIN, *(type(p) for measuring, deciding in OTHERS for p in (*measuring, deciding)))
#: whole pipelines are slow next to single functions
EXAMPLES = max(2, settings.default.max_examples // 15)
#: a share of the way from the least to the most bits a program can take
SHARE = Fraction(2, 5)


@dataclass(frozen=True)
class Stage:
    """One pass at work: the program before and after it."""

    blueprint: Blueprint
    one: Pass
    before: Program
    after: Program

    @property
    def context(self) -> Context:
        return context(self.blueprint)


def prepared(kind: type[Pass], program: Program) -> Pass:
    """The pass with its defaults; a budget that small odd weights can meet."""
    one = kind()
    if "budget" not in {f.name for f in fields(one)}:
        return one
    limits = counting.limits(program.sites, {}, {}, "stored")
    bits = limits.floor + SHARE * (limits.ceiling - limits.floor)
    return replace(one, budget=Budget(float(bits // 8), "bytes"))  # type: ignore[call-arg]


def branching(program: Program) -> Program:
    """One direction planned wherever a weight has room for it: the default strategy plans none."""
    room = {s.name: max(0, min(1, most_directions(s.rows, s.columns))) for s in program.open_sites()}
    bits = sum(rank * branch_bits(*program.site(name).weight.shape) for name, rank in room.items())
    ranks = {f"{name}/planned_rank": torch.tensor(rank) for name, rank in room.items()}
    return program.with_tensors({**ranks, "budget/bits": program.tensors["budget/bits"] + bits})


def previous(number: int) -> int:
    """The pass that ``PASSES[number]`` follows; another strategy starts from the statistics."""
    starts = {PASSES.index(type((*measuring, deciding)[0])) for measuring, deciding in OTHERS}
    return 0 if number in starts else number - 1


@lru_cache(maxsize=1024)
def stage(blueprint: Blueprint, number: int) -> Stage:
    """Pass ``number`` after all passes before it; failures of later passes do not show in it."""
    before = stage(blueprint, previous(number)).after if number else build(blueprint)
    if PASSES[number] is InsertSideBranch:
        before = branching(before)
    one = prepared(PASSES[number], before)
    return Stage(blueprint, one, before, run(before, [one], context(blueprint)))


@cache
def pool() -> tuple[Blueprint, ...]:
    """The same examples for all laws, so that each goes through the pipeline once."""
    found = [GATED, ABSORBING, EVERYTHING]

    @settings(max_examples=EXAMPLES, phases=[Phase.generate])
    @given(strategies.blueprints(max_layers=2))
    def collect(blueprint: Blueprint) -> None:
        found.append(blueprint)

    collect()
    return tuple(dict.fromkeys(found))


def renamed(program: Program, old: str, new: str) -> Program:
    """Other names for the same sites; the graph's own names stay."""
    program = program.clone()
    for node in program.graph_module.graph.nodes:
        if META in node.meta:
            node.meta[META] = node.meta[META].replace(old, new)
    sites = tuple(replace(s, name=s.name.replace(old, new)) for s in program.sites)
    tensors = {k.replace(old, new): t for k, t in program.tensors.items()}
    return replace(program, sites=sites, tensors=tensors)


def decisions_of(program: Program) -> dict[str, list[Any]]:
    """Every integer tensor of the table, but for the factors of side branches: those come from an iteration."""
    table = {k: t.tolist() for k, t in program.tensors.items() if not t.is_floating_point()}
    return {k: v for k, v in table.items() if "/branch_" not in k}


# the laws, each a function of one stage


def g01_every_invariant_holds(stage: Stage) -> None:
    check(stage.after, level=2)
    assert stage.after.facts == (stage.before.facts - stage.one.clobbers) | stage.one.ensures


def g02_input_is_untouched(stage: Stage) -> None:
    program = own(stage.before)
    before, snapshot = digest(program), Snapshot.of(program, level=2)
    stage.one.run(program.clone(), stage.context)
    assert digest(program) == before
    assert Snapshot.of(program, level=2) == snapshot


def g02_input_is_untouched_when_it_fails(stage: Stage) -> None:
    program = own(stage.before)
    before, snapshot = digest(program), Snapshot.of(program, level=2)

    def interrupt(what: str, done: int, total: int) -> None:
        if done:
            raise InterruptedError(what)

    with suppress(PassError):  # passes that report no second step are not interrupted
        run(program, [stage.one], replace(stage.context, progress=interrupt), level=0)
    assert digest(program) == before
    assert Snapshot.of(program, level=2) == snapshot


def g03_same_input_same_output(stage: Stage) -> None:
    again = run(own(stage.before), [stage.one], stage.context, level=0)
    assert digest(again) == digest(stage.after)


def g04_twice_is_once(stage: Stage) -> None:
    twice = run(stage.after, [stage.one], stage.context, level=0)
    assert digest(twice) == digest(stage.after)
    assert twice.history[-1].changed is False


def g05_names_decide_nothing(stage: Stage) -> None:
    twin = renamed(stage.before, "layers.", "blocks.")
    after = run(twin, [stage.one], stage.context, level=0)
    assert decisions_of(renamed(after, "blocks.", "layers.")) == decisions_of(stage.after)


def g06_missing_facts_are_named(stage: Stage) -> None:
    for fact in stage.one.requires:
        with pytest.raises(PassOrderError, match=rf"{stage.one.name} requires the fact '{fact.value}', which "):
            run(replace(stage.before, facts=stage.before.facts - {fact}), [stage.one], stage.context)
    assert stage.one.requires <= stage.before.facts


def g07_signature_and_aliases_stay(stage: Stage) -> None:
    assert signature(stage.after) == signature(stage.before)
    held = module_tensors(stage.after.graph_module)
    for site in stage.after.sites:
        present = [held[path] for path in (site.weight.key, *site.weight.aliases) if path in held]
        assert len({t.data_ptr() for t in present}) <= 1


def g10_other_tensors_are_bit_identical(stage: Stage) -> None:
    original = module_tensors(build(stage.blueprint).graph_module)
    for path, tensor in module_tensors(stage.after.graph_module).items():
        if path in original:
            assert torch.equal(tensor, original[path]), path
    compiled = {s.name for s in stage.after.open_sites()} if Fact.LOWERED in stage.after.facts else set()
    gone = set(original) - set(module_tensors(stage.after.graph_module))
    assert {path.rpartition(".")[0] for path in gone} <= compiled


def g11_runs_for_every_batch_and_length(stage: Stage) -> None:
    for shape in ((0, 3), (1, 1), (3, 2), (2, 7)):
        ids = torch.zeros(shape, dtype=torch.int64)
        with torch.no_grad():
            assert stage.after.graph_module(ids).shape == (*shape, stage.blueprint.vocab)


def g12_every_weight_is_accounted_for_once(stage: Stage) -> None:
    original = module_tensors(build(stage.blueprint).graph_module)
    keys = [s.weight.key for s in stage.after.sites]
    assert sorted(keys) == sorted(k for k, t in original.items() if t.dim() == 2 and k != "embed.weight")
    assert sum(s.rows * s.columns for s in stage.after.sites) == sum(original[k].numel() for k in keys)
    for site in stage.after.sites:
        if site.format is not None:
            assert (site.format.rows, site.format.columns) == site.weight.shape
            assert sorted(site.format.row_widths()) == sorted(stage.after.tensor(site.name, "widths").tolist())


def g13_spec_text_builds_an_equal_pass(stage: Stage) -> None:
    name, _, options = stage.one.spec().partition("{")
    assert name == stage.one.name
    kind = type(stage.one)
    names = {kind.__name__: kind, "Budget": Budget}
    assert eval(f"{kind.__name__}({options.removesuffix('}')})", names) == stage.one  # noqa: S307


def outputs_are_what_the_tables_say(stage: Stage) -> None:
    """Exact passes keep the function, orders cancel out, and lowering computes with the stored weights."""
    ids, lowered = tokens(stage.blueprint), Fact.LOWERED in stage.after.facts
    wanted, got = Meaning(stage.before).run(ids), Meaning(stage.after).run(ids)
    if stage.one.semantics is Semantics.EXACT:
        assert_near(got, wanted, 1e-9)
    with torch.no_grad():
        before, after = stage.before.graph_module(ids), stage.after.graph_module(ids)
    if not lowered:
        assert torch.equal(after, before)
    elif all(layer.dtype is torch.float32 for layer in stage.blueprint.layers):
        assert_near(after.double(), wanted, 1e-4)


def assert_near(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    limit = tolerance * float(wanted.abs().max())
    assert float((got - wanted).abs().max()) <= limit, f"differs by more than {limit}"


class Meaning(fx.Interpreter):
    """What a program computes by its tables, in fp64: stored weights where there are any, orders and scales as decided,
    new norms."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.program, self.norms = program, program.norms()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            value = self.norms.get(str(n.target), super().run_node(n).detach())
            return value.double() if value.is_floating_point() else value
        if n.target is torch.ops.aten.to.dtype:
            return self.env[n.all_input_nodes[0]]
        if is_linear(n) or is_mixed(n):
            site = self.program.site(n.meta[META])
            return torch.nn.functional.linear(self.env[n.args[0]], *self.weight_and_bias(site, n))
        return super().run_node(n)

    def weight_and_bias(self, site: Site, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor | None]:
        """fp64[rows, columns] and fp64[rows] as the consumers of the site and its input expect them."""
        find = self.program.find
        rows = find(site.name, "row_order") if find(site.name, "absorbed") is not None else None
        columns = find(site.name, "column_order")
        source = arguments(node)["bias"]
        bias = None if source is None else self.env[source]
        if bias is not None and rows is not None and is_linear(node):
            bias = bias[rows]
        if site.format is not None:
            names = site.format.tensors()
            stored = PackedWeight(site.format, **{k: self.program.tensor(site.name, k) for k in names})
            return stored.dequantize().double(), bias
        weight = self.program.weight(site).detach().double()
        scale, row_scale = find(site.input, "scale"), find(site.name, "row_scale")
        weight = weight if scale is None else weight * scale.double()
        weight = weight if row_scale is None else weight / row_scale.double()[:, None]
        weight = weight if rows is None else weight[rows]
        return weight if columns is None else weight[:, columns], bias


LAWS: tuple[Callable[[Stage], None], ...] = (
    g01_every_invariant_holds,
    g02_input_is_untouched,
    g02_input_is_untouched_when_it_fails,
    g03_same_input_same_output,
    g04_twice_is_once,
    g05_names_decide_nothing,
    g06_missing_facts_are_named,
    g07_signature_and_aliases_stay,
    g10_other_tensors_are_bit_identical,
    g11_runs_for_every_batch_and_length,
    g12_every_weight_is_accounted_for_once,
    g13_spec_text_builds_an_equal_pass,
    outputs_are_what_the_tables_say,
)


def digests(blueprint: Blueprint) -> list[str]:
    """One digest per pass: what two processes must agree on."""
    return [digest(stage(blueprint, number).after) for number in range(len(PASSES))]
