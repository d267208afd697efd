"""Every invariant holds for sound programs and fires, with its own id, for every mutant."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import decisions
import strategies
from mixcomp import table_laws
from mixcomp.errors import InvariantError
from mixcomp.lowering.lower import LowerLinears
from mixcomp.manager import run
from mixcomp.packed import pack_codes
from mixcomp.program import Fact, Program, Site, WeightRef
from mixcomp.protocol import Context
from mixcomp.snapshot import Case, Snapshot
from mixcomp.verify import TABLE, check, checks_of
from mutants import Mutant
from programs import EVERYTHING, Blueprint, build, own
from table_mutants import MUTANTS

IDS = [f"I{n:02d}" for n in range(1, 17)]


@cache
def built(kind: str) -> Program:
    if kind == "tied":
        return build(EVERYTHING)
    program = decisions.mixed() if kind.startswith("mixed") else decisions.decided()
    return run(program, [LowerLinears()], Context()) if kind in ("lowered", "mixed-lowered") else program


def base(kind: str) -> Program:
    return own(built(kind))


def snapshot(program: Program, mutant: Mutant, level: int) -> Snapshot | None:
    """None where the mutant stands alone, as do lowered ones: they are what lower-linears made, no pass comes after."""
    return None if mutant.alone else Snapshot.of(program, level)


@pytest.mark.parametrize("kind", ["decided", "lowered", "tied", "mixed", "mixed-lowered"])
def test_sound_programs_pass(kind: str) -> None:
    program = base(kind)
    check(program, level=2)
    check(program.clone(), level=2, before=program)


@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(strategies.blueprints())
def test_hand_built_programs_pass(blueprint: Blueprint) -> None:
    check(build(blueprint), level=2)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_makes_its_invariant_fire(mutant: Mutant) -> None:
    program = base(mutant.base)
    before, cheap = snapshot(program, mutant, mutant.level), snapshot(program, mutant, 1)
    broken = mutant.breaks(program.clone())
    with pytest.raises(InvariantError, match=rf"^{mutant.id}: ") as caught:
        check(broken, mutant.level, before)
    if mutant.level == 2:
        check(broken, 1, cheap)  # or the mutant should say that level 1 is enough
    assert "the law: " in str(caught.value)


def test_every_invariant_has_two_mutants() -> None:
    count = Counter(m.id for m in MUTANTS)
    assert set(count) == set(IDS) == {row.id for row in TABLE}
    assert min(count.values()) >= 2
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.id} {r.law}")
def test_every_row_fires_for_some_mutant(row: object) -> None:
    """A row that no mutant reaches could be deleted without a test noticing."""

    def fires(mutant: Mutant) -> bool:
        program = base(mutant.base)
        before = snapshot(program, mutant, mutant.level)
        case = Case(mutant.breaks(program.clone()), before, mutant.level)
        return row.applies(case) and next(row.holds(case), None) is not None

    assert any(fires(m) for m in MUTANTS if m.id == row.id and not m.missing)


@pytest.mark.parametrize("fact", Fact)
def test_every_fact_has_a_check(fact: Fact) -> None:
    assert checks_of(fact)
    assert all(row.fact is fact for row in checks_of(fact))


def test_facts_decide_which_rows_apply() -> None:
    mutant = next(m for m in MUTANTS if m.breaks.__name__ == "width_seven")
    broken = mutant.breaks(decisions.decided())
    check(replace(broken, facts=frozenset({Fact.STATISTICS, Fact.SALIENCE})))


def test_message_shows_the_line_and_its_neighbours() -> None:
    mutant = next(m for m in MUTANTS if m.breaks.__name__ == "in_place_op")
    with pytest.raises(InvariantError) as caught:
        check(mutant.breaks(decisions.decided()))
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 3
    assert [line[0] for line in lines].count(">") == 1
    assert "aten.relu_" in next(line for line in lines if line[0] == ">")


HEAD = st.sampled_from(([0, 1, 2], [1, 0, 2], [2, 1, 0]))


def blocks(order: list[int], size: int) -> list[list[int]]:
    return [[i - start for i in order[start : start + size]] for start in range(0, len(order), size)]


def agree(rows: list[int], columns: list[int]) -> bool:
    """Heads that move are the same ones in both; a producer's heads that stay need no consumer."""
    sizes = (d for d in range(1, len(columns) + 1) if len(columns) % d == 0)
    size = next(d for d in sizes if all(sorted(b) == [*range(d)] for b in blocks(columns, d)))
    wanted, given_ = blocks(columns, size), blocks(rows, size)
    moved = [b for b in given_ if b != [*range(size)]]
    return len(rows) % size == 0 and all(b in given_ for b in wanted) and all(b in wanted for b in moved)


@given(
    st.lists(st.lists(HEAD, min_size=1, max_size=2), max_size=5),
    st.lists(st.lists(HEAD, min_size=1, max_size=3), max_size=5),
)
def test_absorbed_orders_find_their_columns(made: list[list[list[int]]], read: list[list[list[int]]]) -> None:
    """As comparing every producer with every consumer does."""
    kinds = {"row_order": made, "column_order": read}
    orders = {
        f"{kind[:3]}{i}/{kind}": [3 * n + k for n, head in enumerate(heads) for k in head]
        for kind, several in kinds.items()
        for i, heads in enumerate(several)
    }
    tensors = {key: torch.tensor(order) for key, order in orders.items()}
    tensors |= {key.replace("row_order", "absorbed"): torch.tensor(True) for key in orders if key.endswith("row_order")}
    sites = tuple(
        Site(n, (), WeightRef(n, (), (len(orders[key]),) * 2, torch.float32), None, "x")
        for key in orders
        for n in [key.partition("/")[0]]
    )
    rows, columns = ({k: o for k, o in orders.items() if k.endswith(kind)} for kind in kinds)
    lonely = [k for k, o in rows.items() if not any(agree(o, other) for other in columns.values())]
    lonely += [k for k, o in columns.items() if not any(agree(other, o) for other in rows.values())]
    found = table_laws.orders_are_bijections(Case(replace(base("decided"), sites=sites, tensors=tensors)))
    assert [message.split()[1].rstrip(":") for message, _ in found] == [key.partition("/")[0] for key in lonely]


def test_a_broken_packer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = base("lowered")
    monkeypatch.setattr(table_laws, "pack_codes", lambda *args: pack_codes(*args) ^ 128)
    with pytest.raises(InvariantError, match=r"^I16: .*unpacking and packing again"):
        check(program, level=2)


def test_level_0_checks_nothing() -> None:
    for mutant in MUTANTS[:2]:
        check(mutant.breaks(decisions.decided()), level=0)
