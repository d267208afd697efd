"""Laws that every pass obeys (see ``laws``), tested on every registered pass, and on passes that break them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import laws
import mutants
from laws import LAWS, MAIN, PASSES, Stage, digests, pool, stage
from mixcomp.errors import MixCompError
from mixcomp.manager import run
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context, Pass
from programs import ABSORBING, PLAIN, THIN, build, context, own
from toys import Do, Idle, Salience

STAGES = [pytest.param(i, id=p.name) for i, p in enumerate(PASSES)]


@pytest.mark.parametrize("number", STAGES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(number: int, law: Callable[[Stage], None]) -> None:
    for blueprint in pool():
        try:
            law(stage(blueprint, number))
        except BaseException as error:
            error.add_note(f"with {blueprint}")
            raise


def test_the_pool_absorbs_and_branches() -> None:
    """Or the laws would say nothing about either."""
    last = [stage(blueprint, len(MAIN) - 1).after for blueprint in pool()]
    assert any(key.endswith("/column_order") for program in last for key in program.tensors)
    assert any(site.format is not None and site.format.rank for program in last for site in program.sites)


def test_thin_weights_get_no_branch() -> None:
    """A branch as thick as the weight costs more than the weight; found by drawing small programs."""
    assert all(s.format and not s.format.rank for s in stage(THIN, len(MAIN) - 1).after.open_sites())


@pytest.fixture(scope="module")
def elsewhere() -> list[str]:
    """Digests of a small program after every pass, from a process with another hash seed."""
    script = "import json, laws; print(json.dumps(laws.digests(laws.ABSORBING)))"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "PYTHONHASHSEED": "99"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", STAGES)
def test_g03_another_process_gives_the_same(number: int, elsewhere: list[str]) -> None:
    assert elsewhere[number] == digests(ABSORBING)[number]


@pytest.mark.parametrize("kind", PASSES, ids=lambda p: p.name)
def test_a_pass_is_a_frozen_value(kind: type[Pass]) -> None:
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    assert kind.__dataclass_params__.frozen
    assert re.fullmatch("[a-z]+(-[a-z]+)+", kind.name)


def test_the_pipeline_provides_what_it_requires_and_every_fact_once() -> None:
    have: set[Fact] = set()
    for kind in MAIN:
        assert kind.requires <= have, kind.name
        assert not kind.ensures & have, kind.name
        have |= kind.ensures
    assert have == set(Fact)
    assert len({kind.name for kind in PASSES}) == len({*PASSES})


# the laws bite: for each a pass that breaks it


def writing(program: Program) -> Program:
    next(iter(program.tensors.values())).mul_(2)
    return program


def by_name(program: Program) -> Program:
    """Decides by the spelling of the name, as a hash or a sort over names would."""
    order = {s.name: torch.tensor(sum(map(ord, s.name))) for s in program.open_sites()}
    return program.with_tensors({f"{name}/planned_rank": n for name, n in order.items()})


def one_size(program: Program) -> Program:
    relu = mutants.node_of(program, torch.ops.aten.relu.default)
    new = mutants.insert_after(relu, torch.ops.aten.view.default, relu, [2, 5, -1])
    relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return mutants.recompiled(program)


def one_more(program: Program) -> Program:
    relu = mutants.node_of(program, torch.ops.aten.relu.default)
    new = mutants.insert_after(relu, torch.ops.aten.relu.default, relu)
    relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return mutants.recompiled(program)


def other_embedding(program: Program) -> Program:
    embedding = program.graph_module.get_parameter("embed.weight").detach()
    return mutants.set_parameter(program, "embed.weight", embedding + 1)


def half_a_reorder(program: Program) -> Program:
    name = program.open_sites()[0].name
    rows = torch.arange(program.site(name).rows).flip(0)
    return program.with_tensors({f"{name}/row_order": rows, f"{name}/absorbed": torch.tensor(True)})


@dataclass(frozen=True)
class Moody(Do):
    """Different every time, and not what its spec says."""

    name: ClassVar[str] = "moody"
    count: ClassVar[Iterator[int]] = iter(range(100))

    def run(self, program: Program, context: Context) -> Program:
        context.progress("moody", 0, 2)
        result = writing(program.with_tensors({"budget/mood": torch.tensor(next(self.count))}))
        context.progress("moody", 1, 2)
        return result

    def spec(self) -> str:
        return "cheerful"


@dataclass(frozen=True)
class Demanding(Idle):
    """Ran although a fact it requires was missing."""

    name: ClassVar[str] = "demanding"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.BRANCHED})


FAULTS: dict[Callable[[Stage], None], Pass] = {
    laws.g01_every_invariant_holds: Salience(scale=-1.0),
    laws.g02_input_is_untouched: Do(writing),
    laws.g02_input_is_untouched_when_it_fails: Moody(),
    laws.g03_same_input_same_output: Moody(),
    laws.g04_twice_is_once: Do(one_more),
    laws.g05_names_decide_nothing: Do(by_name),
    laws.g06_missing_facts_are_named: Demanding(),
    laws.g07_signature_and_aliases_stay: Do(mutants.renamed_input),
    laws.g10_other_tensors_are_bit_identical: Do(other_embedding),
    laws.g11_runs_for_every_batch_and_length: Do(one_size),
    laws.g12_every_weight_is_accounted_for_once: Do(mutants.site_lost),
    laws.g13_spec_text_builds_an_equal_pass: Moody(),
    laws.outputs_are_what_the_tables_say: Do(half_a_reorder),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws_bite(law: Callable[[Stage], None]) -> None:
    before = run(build(PLAIN), [Salience()], context(PLAIN))
    one = FAULTS[law]
    after = replace(one.run(own(before), context(PLAIN)), facts=before.facts | one.ensures)
    law(Stage(PLAIN, Idle(), before, before))
    with pytest.raises((AssertionError, MixCompError, RuntimeError)):
        law(Stage(PLAIN, one, before, after))
