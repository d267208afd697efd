"""AMLQ: the exact min-max choice against brute force, option tables, the decision and its side branches."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixcomp import manager
from mixcomp.config import Budget
from mixcomp.errors import BudgetError, ConfigError
from mixcomp.format import Scales
from mixcomp.passes import CollectStatistics, amlq
from mixcomp.passes.allocate import allocate, spend_rest
from mixcomp.passes.amlq import MIXES, least_maximum, mix_widths, options, relative_error
from mixcomp.passes.assign_mixes import AssignMixes
from mixcomp.passes.directions import branch_bits
from mixcomp.passes.rounding import round_mix
from mixcomp.profiles import shared_format
from mixcomp.program import Program
from programs import Blueprint, Kind, Layer, build, context

MODEL = Blueprint((Layer(Kind.GATED, 300), Layer(Kind.PLAIN, 66, bias=True), Layer(Kind.REUSED, 80)), width=320)


@st.composite
def tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Errors and bits of up to 6 layers with 3 unsorted options, ties likely, and a feasible budget."""
    layers = draw(st.integers(1, 6))
    row = st.lists(st.integers(0, 9), min_size=3, max_size=3)
    errors = torch.tensor([draw(row) for _ in range(layers)]).double()
    bits = torch.tensor([draw(row) for _ in range(layers)])
    low, high = int(bits.amin(1).sum()), int(bits.amax(1).sum())
    return errors, bits, draw(st.integers(low, high))


def plans(errors: torch.Tensor, bits: torch.Tensor, budget: int) -> list[tuple[float, float]]:
    """(largest error, sum of errors) of every plan within the budget."""
    out = []
    for choice in itertools.product(range(errors.shape[1]), repeat=len(errors)):
        picked = torch.tensor(choice)[:, None]
        if int(bits.gather(1, picked).sum()) <= budget:
            own = errors.gather(1, picked)
            out.append((float(own.max()), float(own.sum())))
    return out


def minimizes_the_maximum(choose: Callable[..., torch.Tensor], table: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    errors, bits, budget = table
    choice = choose(errors, bits, budget)[:, None]
    assert int(bits.gather(1, choice).sum()) <= budget
    assert float(errors.gather(1, choice).max()) == min(worst for worst, _ in plans(errors, bits, budget))


@given(tables())
def test_against_brute_force(table: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    """Oracle 5."""
    minimizes_the_maximum(least_maximum, table)


def least_sum(errors: torch.Tensor, bits: torch.Tensor, budget: int) -> torch.Tensor:
    return spend_rest(errors, bits.double(), bits.argmin(1), budget)


TABLE = (torch.tensor([[8.0, 7.0, 0.0], [9.0, 5.0, 4.0]]).double(), torch.tensor([[1, 2, 3], [1, 3, 9]]), 4)
BUGS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "smallest sum instead": least_sum,
    "budget one too small": lambda e, b, n: least_maximum(e, b, n - 1),
    "budget one too large": lambda e, b, n: least_maximum(e, b, n + 5),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_oracle_bites(bug: str) -> None:
    minimizes_the_maximum(least_maximum, TABLE)
    with pytest.raises(AssertionError):
        minimizes_the_maximum(BUGS[bug], TABLE)


@given(tables())
def test_bounds_stand_in_order(table: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    """Oracle 6: price bound <= best sum <= the sum of the min-max plan, and filling up spoils neither."""
    errors, bits, budget = table
    order = torch.tensor([sorted(range(3), key=lambda i: (b[i], e[i])) for e, b in zip(errors, bits, strict=True)])
    errors, bits = errors.gather(1, order), bits.gather(1, order)  # as the pass sorts its tables
    best = allocate(errors, bits, budget)
    optimum = min(total for _, total in plans(errors, bits, budget))
    choice = least_maximum(errors, bits, budget)
    filled = spend_rest(errors, bits.double(), choice, budget)
    sums = [float(errors.gather(1, c[:, None]).sum()) for c in (filled, choice)]
    assert best.loss - best.gap <= optimum + 1e-9
    assert optimum <= sums[0] <= sums[1]
    assert float(errors.gather(1, filled[:, None]).max()) <= float(errors.gather(1, choice[:, None]).max())
    assert int(bits.gather(1, filled[:, None]).sum()) <= budget


def test_a_budget_below_the_cheapest_options_is_refused() -> None:
    with pytest.raises(BudgetError, match="1 bits"):
        least_maximum(TABLE[0], TABLE[1], 1)


def test_the_hottest_groups_are_widest() -> None:
    """The paper's example: 40 groups of 128 columns, 40 % at 2 bits, 30 % at 3, the rest at 4."""
    energy = torch.rand(5120, generator=torch.Generator().manual_seed(0))
    widths = torch.tensor(mix_widths(energy, 128, ((4, 0.3), (3, 0.3), (2, 0.4))))
    heat = energy.view(40, 128).mean(1)
    assert [int((widths == w).sum()) for w in (4, 3, 2)] == [12, 12, 16]
    assert heat[widths == 4].min() >= heat[widths == 3].max() >= heat[widths == 3].min() >= heat[widths == 2].max()
    assert mix_widths(torch.ones(70), 32, ((3, 0.1), (2, 0.9))) == (2, 2, 2)  # a third of a group is no group
    assert all(abs(sum(share for _, share in mix) - 1) < 1e-9 for mix in MIXES)
    assert all([w for w, _ in mix] == sorted((w for w, _ in mix), reverse=True) for mix in MIXES)


def test_options_are_different_and_their_errors_are_those_of_plain_rounding() -> None:
    random = torch.Generator().manual_seed(1)
    weight, x = torch.randn(9, 100, generator=random), torch.randn(300, 100, generator=random)
    sigma = (x.T @ x / 300).double()
    found = list(options(weight, sigma.diagonal(), (32, 64, 128), MIXES))
    assert len({(o.group, o.widths) for o in found}) == len(found) > 20
    for o in found:
        assert torch.equal(o.error, weight - round_mix(weight, o.group, o.widths))
        rho = relative_error(o.error.double(), weight.double(), sigma)
        x64 = x.double()
        wanted = (x64 @ o.error.double().T).norm() ** 2 / (x64 @ weight.double().T).norm() ** 2
        assert rho == pytest.approx(float(wanted))
    assert relative_error(weight * 0, weight * 0, sigma.float()) == 0.0


@pytest.fixture(scope="module")
def known() -> Program:
    return manager.run(build(MODEL), (CollectStatistics(),), context(MODEL), level=2)


def assigned(program: Program, one: AssignMixes) -> Program:
    return manager.run(program, (one,), context(MODEL), level=2)


@pytest.mark.parametrize("scale_kind", [0, 1])
@pytest.mark.parametrize("budget", [3.2, 4.4, 6.0])
def test_the_budget_is_a_ceiling_branches_included(known: Program, budget: float, scale_kind: int) -> None:
    found = assigned(known, AssignMixes(Budget(budget), scale_kind=scale_kind))
    bits = weights = ranks = 0
    for site in found.open_sites():
        rank = int(found.tensor(site.name, "planned_rank"))
        bits += int(found.tensor(site.name, "planned_bits")) + rank * branch_bits(site.rows, site.columns)
        weights += site.rows * site.columns
        ranks += rank
        assert int(found.tensor(site.name, "scale_kind")) == scale_kind
        assert int(found.tensor(site.name, "group")) in (32, 64, 128)
    assert 0.9 * budget * weights < bits <= budget * weights
    assert ranks


def test_the_largest_error_is_least(known: Program) -> None:
    """No other mix of the table does better: one option per site, all plans tried for two sites."""
    mixes = MIXES[4:10]
    two = tuple((s.name, 4) for s in known.open_sites()[2:])
    found = assigned(known, AssignMixes(Budget(4.5), two, groups=(32,), mixes=mixes, ranks="none"))
    sites = known.open_sites()[:2]

    def table(name: str) -> dict[tuple[int, ...], float]:
        site = known.site(name)
        weight, sigma = known.weight(site).detach(), known.tensor(site.input, "sigma")
        return {
            o.widths: relative_error(o.error, weight, sigma) for o in options(weight, sigma.diagonal(), (32,), mixes)
        }

    def bits(widths: tuple[int, ...], rows: int) -> int:
        return shared_format(rows, sites[0].columns, widths, 32, Scales.FLOAT_GROUP).stored_bits()

    room = int(found.tensor("budget", "bits")) - sum(int(found.tensor(n, "planned_bits")) for n, _ in two)
    best = min(
        max(ea, eb)
        for (a, ea), (b, eb) in itertools.product(table(sites[0].name).items(), table(sites[1].name).items())
        if bits(a, sites[0].rows) + bits(b, sites[1].rows) <= room
    )
    chosen = [table(s.name)[tuple(found.tensor(s.name, "widths")[0].tolist())] for s in sites]
    assert max(chosen) == pytest.approx(best)


def test_ranks_follow_their_rule(known: Program) -> None:
    def ranks(**rule: object) -> list[int]:
        found = assigned(known, AssignMixes(Budget(5.0), **rule))  # type: ignore[arg-type]
        return [int(found.tensor(s.name, "planned_rank")) for s in found.open_sites()]

    assert not any(ranks(ranks="none"))
    few, many = ranks(ranks="energy", energy=0.1), ranks(ranks="energy", energy=0.8)
    assert all(0 < a <= b for a, b in zip(few, many, strict=True))
    assert few != many
    assert ranks(ranks="price") == ranks(ranks="price")
    assert not any(ranks(ranks="energy", energy=0.0))


def test_what_cannot_be_is_refused(known: Program) -> None:
    with pytest.raises(ConfigError, match="48"):
        assigned(known, AssignMixes(Budget(4.0), groups=(48,)))
    for budget, side in ((1.5, "below the floor"), (12.0, "above the ceiling")):
        with pytest.raises(BudgetError, match=side):
            assigned(known, AssignMixes(Budget(budget)))
    assert amlq.MIXES[0] == ((2, 1.0),)
