"""Low-rank directions against fp64 eigenproblems: oracles 26, 27, 28 and 30, for every basis."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from mixcomp.errors import PassError
from mixcomp.passes.directions import (
    Basis,
    Directions,
    branch_bits,
    error_loss,
    error_spectrum,
    rank_by_energy,
    rank_by_price,
)

BASES: tuple[Basis, ...] = get_args(Basis)
Solver = Callable[..., Directions]
#: subspace iteration converges to this share of the whole loss
CLOSE = 2e-3


def problem(rows: int = 40, columns: int = 56, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """weight, rounding-like error with some structure, correlated second moments, gamma; fp64."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=random) / columns**0.5
    x = (torch.randn(600, columns, generator=random) * torch.logspace(0.3, -1.2, columns)) @ mix
    weight = torch.randn(rows, columns, generator=random) @ mix
    error = 0.3 * torch.randn(rows, columns, generator=random) + 0.1 * torch.outer(
        torch.randn(rows, generator=random), torch.randn(columns, generator=random)
    )
    return weight.double(), error.double(), (x.T @ x / 600).double(), torch.rand(rows, generator=random).double() + 0.1


def run(solver: Solver, data: tuple[torch.Tensor, ...], count: int, basis: Basis = "error") -> Directions:
    weight, error, sigma, gamma = (t.float() for t in data)
    return solver(error, sigma, gamma, count, torch.Generator().manual_seed(0), basis, weight)


def left(found: Directions, data: tuple[torch.Tensor, ...], rank: int) -> float:
    """Share of the weighted loss that the branch ``A = G^-1/2 V, B = V^T G^1/2 E`` leaves, fp64."""
    _, error, sigma, gamma = data
    root, vectors = gamma.sqrt()[:, None], found.vectors.double()[:, :rank]
    kept = vectors / root @ ((vectors * root).T @ error)
    return float(error_loss(error - kept, sigma, gamma) / error_loss(error, sigma, gamma))


def spectrum(data: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Eigenvalues of G^1/2 E S E^T G^1/2, falling, as shares."""
    _, error, sigma, gamma = data
    weighted = gamma.sqrt()[:, None] * error
    values = torch.linalg.eigvalsh(weighted @ sigma @ weighted.T).flip(0)
    return values / values.sum()


def qera_exact(data: tuple[torch.Tensor, ...], rank: int) -> float:
    """QERA's form, another way to the same optimum: truncate G^1/2 E S^1/2, undo the roots."""
    _, error, sigma, gamma = data
    values, vectors = torch.linalg.eigh(sigma)
    half = vectors * values.clamp_min(0).sqrt() @ vectors.T
    root = gamma.sqrt()[:, None]
    u, s, v = torch.linalg.svd(root * error @ half, full_matrices=False)
    branch = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.pinv(half) / root
    return float(error_loss(error - branch, sigma, gamma) / error_loss(error, sigma, gamma))


def exact_is_optimal(solver: Solver) -> None:
    for seed in range(4):
        data = problem(seed=seed)
        tail = 1 - spectrum(data).cumsum(0)
        for rank in (1, 3, 6):
            own = left(run(solver, data, 6), data, rank)
            assert own == pytest.approx(float(tail[rank - 1]), abs=CLOSE)  # 26 and, as gamma is no constant, 28
            assert own == pytest.approx(qera_exact(data, rank), abs=CLOSE)
            for basis in BASES:
                other = run(error_spectrum, data, 6, basis)
                assert own <= left(other, data, rank) + CLOSE
                assert 1 - float(other.shares[:rank].sum()) == pytest.approx(left(other, data, rank), abs=1e-4)


def test_the_error_basis_is_optimal_and_its_residual_the_tail() -> None:
    exact_is_optimal(error_spectrum)


def unweighted(e: torch.Tensor, s: torch.Tensor, g: torch.Tensor, *rest: object) -> Directions:
    return error_spectrum(e, s, torch.ones_like(g), *rest)  # type: ignore[arg-type]


def other_basis(basis: Basis) -> Solver:
    return lambda e, s, g, n, draw, _, w: error_spectrum(e, s, g, n, draw, basis, w)


@pytest.mark.parametrize("bug", [unweighted, *(other_basis(b) for b in BASES[1:])])
def test_the_optimality_oracle_bites(bug: Solver) -> None:
    with pytest.raises(AssertionError):
        exact_is_optimal(bug)


@pytest.mark.parametrize("basis", BASES)
def test_more_rank_never_leaves_more(basis: Basis) -> None:
    data = problem(24, 30)
    found = run(error_spectrum, data, 24, basis)
    residuals = [left(found, data, rank) for rank in range(25)]
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(residuals))
    assert residuals[0] == 1.0
    assert residuals[-1] < 1e-6  # every direction: nothing is left


def test_an_error_of_low_rank_is_taken_away_whole() -> None:
    weight, error, sigma, gamma = problem()
    thin = error[:, :3] @ error[:3]
    data = (weight, thin, sigma, gamma)
    assert left(run(error_spectrum, data, 3), data, 3) < 1e-6


def same_loss(one: Basis, two: Basis, data: tuple[torch.Tensor, ...]) -> bool:
    own, other = (left(run(error_spectrum, data, 6, basis), data, 6) for basis in (one, two))
    return abs(own - other) < CLOSE


def test_bases_agree_where_they_must() -> None:
    """Oracle 27: S = I makes error, diagonal and plain one; a diagonal S makes diagonal exact."""
    weight, error, sigma, gamma = problem(seed=2)
    white = (weight, error, torch.eye(len(sigma)).double(), gamma)
    assert same_loss("error", "plain", white)
    assert same_loss("error", "diagonal", white)
    diagonal = (weight, error, torch.diag(sigma.diagonal()), gamma)
    assert same_loss("error", "diagonal", diagonal)
    assert not same_loss("error", "plain", diagonal)
    assert not same_loss("error", "diagonal", (weight, error, sigma, gamma))
    assert not same_loss("error", "output", white)


def test_rotating_the_inputs_changes_nothing() -> None:
    """Oracle 30: x -> R x with E -> E R^T leaves the spectrum; it does move the diagonal's."""
    weight, error, sigma, gamma = problem(seed=3)
    r = torch.linalg.qr(torch.randn(len(sigma), len(sigma), generator=torch.Generator().manual_seed(0)).double())[0]
    data, turned = (weight, error, sigma, gamma), (weight @ r.T, error @ r.T, r @ sigma @ r.T, gamma)
    for basis in ("error", "output"):
        one, two = run(error_spectrum, data, 4, basis), run(error_spectrum, turned, 4, basis)
        torch.testing.assert_close(one.shares, two.shares, rtol=0, atol=CLOSE)
    one, two = run(error_spectrum, data, 4, "diagonal"), run(error_spectrum, turned, 4, "diagonal")
    assert float((one.shares - two.shares).abs().max()) > CLOSE


def test_ranks_by_energy_and_by_price() -> None:
    shares = torch.tensor([0.4, 0.2, 0.1, 0.05])
    assert [rank_by_energy(shares, e) for e in (0.0, 0.3, 0.5, 0.65, 0.99)] == [0, 1, 2, 3, 4]
    bits = branch_bits(10, 20)
    assert [rank_by_price(shares, 10.0, price / bits, bits) for price in (9.0, 3.0, 1.5, 0.1)] == [0, 1, 2, 4]
    assert rank_by_price(torch.tensor([0.1, 0.9]), 1.0, 0.5 / bits, bits) == 0  # the first one has to pay


def test_the_output_basis_asks_for_the_weight() -> None:
    _, error, sigma, gamma = (t.float() for t in problem())
    with pytest.raises(PassError, match="weight"):
        error_spectrum(error, sigma, gamma, 2, torch.Generator().manual_seed(0), "output")
