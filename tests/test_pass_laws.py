"""Laws that every pass obeys, tested on every registered pass: G1-G14.

Programs are drawn by hypothesis; each is taken through the whole pipeline once (the manager verifies everything on the
way), and every law looks at the programs between two passes.  A new pass needs an entry in ``PIPELINE`` and nothing here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import pytest
import strategies
import torch
from hypothesis import Phase, given, settings
from programs import EVERYTHING, GATED, Blueprint, Kind, Layer, Values, build, context, own, tokens
from torch import fx

from mixcomp import budget as counting
from mixcomp.config import Budget
from mixcomp.errors import MixCompError, PassError, PassOrderError
from mixcomp.lowering.lower import LowerLinears
from mixcomp.manager import run
from mixcomp.packed import PackedWeight
from mixcomp.passes import PIPELINE
from mixcomp.printer import Digests, digest, module_tensors, render
from mixcomp.program import META, Fact, Program, Site
from mixcomp.protocol import Context, Pass, Semantics
from mixcomp.snapshot import Snapshot, is_linear, signature
from mixcomp.verify import check

PASSES: tuple[type[Pass], ...] = (*PIPELINE, LowerLinears)
STAGES = [pytest.param(i, id=p.name) for i, p in enumerate(PASSES)]
#: two sites at pinned widths, the rest free
FIXED = (GATED, EVERYTHING)
#: whole pipelines are slow next to single functions
EXAMPLES = max(2, settings.default.max_examples // 5)
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


@lru_cache(maxsize=64)
def stages(blueprint: Blueprint) -> tuple[Stage, ...]:
    found = []
    program = build(blueprint)
    for kind in PASSES:
        one = prepared(kind, program)
        after = run(program, [one], context(blueprint), level=2)
        found.append(Stage(blueprint, one, program, after))
        program = after
    return tuple(found)


def integers(program: Program) -> dict[str, list[Any]]:
    """Decisions: every integer tensor of the table."""
    return {k: t.tolist() for k, t in sorted(program.tensors.items()) if not t.is_floating_point()}


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

    try:
        run(program, [stage.one], replace(stage.context, progress=interrupt))
    except PassError as error:
        assert "InterruptedError" in str(error)
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
    other = stages(replace(stage.blueprint, folder="blocks"))[PASSES.index(type(stage.one))]
    renamed = {k.replace("blocks.", "layers."): v for k, v in integers(other.after).items()}
    assert renamed == integers(stage.after)


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
    """EXACT passes keep the function; a lossy one makes it what the stored weights say; orders cancel out."""
    ids = tokens(stage.blueprint)
    with torch.no_grad():
        before, after = Meaning(stage.before).run(ids), Meaning(stage.after).run(ids)
        if stage.one.semantics is Semantics.EXACT and not Fact.LOWERED in stage.after.facts:
            assert torch.equal(stage.after.graph_module(ids), stage.before.graph_module(ids))
        if stage.one.semantics is Semantics.EXACT:
            torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
        if Fact.LOWERED in stage.after.facts:
            wanted = Meaning(stage.before, wide=False).run(ids)
            torch.testing.assert_close(stage.after.graph_module(ids), wanted, rtol=0.02, atol=0.02)


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


class Meaning(fx.Interpreter):
    """What a program computes by its tables: stored weights where there are any, orders applied as decided.

    In fp64 throughout, so that only real differences show.
    """

    def __init__(self, program: Program, wide: bool = True) -> None:
        super().__init__(program.graph_module)
        self.program, self.wide = program, wide

    def run_node(self, n: fx.Node) -> Any:
        ...
