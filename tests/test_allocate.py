"""Allocation against brute force, and its laws A1-A8."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixcomp.passes.allocate import Allocation, allocate


@st.composite
def problems(draw: st.DrawFn, max_units: int = 7) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Units with 3 options of rising cost; losses mostly falling, sometimes not; a feasible budget."""
    units = draw(st.integers(1, max_units))
    step = st.lists(st.integers(1, 9), min_size=2, max_size=2)
    bits = torch.tensor([[4, 4 + a, 4 + a + b] for a, b in (draw(step) for _ in range(units))]).double()
    losses = torch.tensor([draw(st.lists(st.integers(0, 60), min_size=3, max_size=3)) for _ in range(units)]).double()
    low, high = int(bits[:, 0].sum()), int(bits[:, 2].sum())
    return losses, bits, draw(st.integers(low, high))


def best(losses: torch.Tensor, bits: torch.Tensor, budget: int) -> float:
    rows = range(len(losses))
    found = float("inf")
    for choice in itertools.product(range(losses.shape[1]), repeat=len(losses)):
        if sum(bits[i, c] for i, c in zip(rows, choice, strict=True)) <= budget:
            found = min(found, float(sum(losses[i, c] for i, c in zip(rows, choice, strict=True))))
    return found


def spent(found: Allocation, bits: torch.Tensor) -> int:
    return int(bits.gather(1, found.choice[:, None]).sum())


@given(problems())
@settings(max_examples=100)
def test_against_brute_force(problem: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    losses, bits, budget = problem
    found, optimum = allocate(losses, bits, budget), best(losses, bits, budget)
    assert found.bits == spent(found, bits) <= budget
    assert found.loss == pytest.approx(float(losses.gather(1, found.choice[:, None]).sum()))
    assert optimum <= found.loss + 1e-9
    # weak duality: the certificate is true, and never looser than one hull step
    assert found.loss - found.gap <= optimum + 1e-6
    assert found.gap <= float((losses.amax(1) - losses.amin(1)).max()) + 1e-6


@given(problems())
@settings(max_examples=50)
def test_nothing_that_fits_and_helps_is_left(problem: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    losses, bits, budget = problem
    found = allocate(losses, bits, budget)
    rest = budget - found.bits
    for unit, choice in enumerate(found.choice.tolist()):
        for option in range(losses.shape[1]):
            more = float(bits[unit, option] - bits[unit, choice])
            assert not (0 < more <= rest and losses[unit, option] < losses[unit, choice])


@given(problems())
def test_powers_of_two_change_no_choice(problem: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    losses, bits, budget = problem
    assert torch.equal(allocate(losses, bits, budget).choice, allocate(losses * 2.0**20, bits, budget).choice)


def test_more_budget_never_loses_more_on_hulls() -> None:
    random = torch.Generator().manual_seed(0)
    losses = torch.rand(40, 1, generator=random) * torch.tensor([[16.0, 4.0, 1.0, 0.25]])
    bits = torch.tensor([[2.0, 3.0, 4.0, 5.0]]).expand(40, -1)
    found = [allocate(losses, bits, budget).loss for budget in range(80, 201)]
    assert all(a >= b for a, b in itertools.pairwise(found))
    assert found[-1] == pytest.approx(float(losses[:, 3].sum()))


def test_equal_units_are_served_in_order() -> None:
    losses, bits = torch.tensor([[4.0, 1.0]]).expand(5, -1), torch.tensor([[2.0, 4.0]]).expand(5, -1)
    assert allocate(losses, bits, 15).choice.tolist() == [1, 1, 0, 0, 0]


def test_a_salient_unit_never_gets_less_than_an_equal_one() -> None:
    random = torch.Generator().manual_seed(1)
    salience = torch.rand(200, generator=random).sort().values
    losses = salience[:, None] * torch.tensor([[16.0, 4.0, 1.0]])
    choice = allocate(losses, torch.tensor([[2.0, 3.0, 4.0]]).expand(200, -1), 600).choice
    assert torch.equal(choice, choice.sort().values)
