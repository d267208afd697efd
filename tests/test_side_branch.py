"""The side branch against the closed form in fp64, and its laws L1-L6."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixcomp import manager
from mixcomp.config import Budget
from mixcomp.packed import PackedWeight
from mixcomp.passes import AnnotateSalience, AssignPrecision, CollectStatistics, QuantizeWeights, ReorderFeatures
from mixcomp.passes.directions import branch_bits, error_spectrum
from mixcomp.passes.side_branch import InsertSideBranch
from mixcomp.program import Program
from programs import Blueprint, Kind, Layer, build, context

MODEL = Blueprint((Layer(Kind.PLAIN, 64, bias=True), Layer(Kind.GATED, 64)), width=64, vocab=13)


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=random) * torch.logspace(0, 1, columns)
    shape = torch.randn(rows, 3, generator=random) @ torch.randn(3, columns, generator=random)
    error = shape + 0.3 * torch.randn(rows, columns, generator=random)
    return error, x.T @ x / 200, torch.rand(rows, generator=random) + 0.1


def oracle(error: torch.Tensor, sigma: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Squared singular values of G^1/2 E S^1/2, largest first, fp64."""
    root = torch.linalg.cholesky(sigma.double())
    return torch.linalg.svdvals(gamma.double().sqrt()[:, None] * error.double() @ root).square()


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@given(st.sampled_from([(5, 40), (40, 24), (64, 33), (17, 16)]), st.integers(1, 6), st.integers(0, 20))
def test_shares_and_residual_are_the_spectrum(shape: tuple[int, int], count: int, seed: int) -> None:
    error, sigma, gamma = problem(*shape, seed)
    values = oracle(error, sigma, gamma)
    found = error_spectrum(error, sigma, gamma, count, draw())
    torch.testing.assert_close(
        found.shares.double(), (values / values.sum())[: len(found.shares)], rtol=0.02, atol=1e-4
    )
    root = gamma.sqrt()[:, None]
    kept = found.vectors / root @ ((found.vectors * root).T @ error)
    left = oracle(error - kept, sigma, gamma).sum()
    assert float(left) == pytest.approx(
        float(values[len(found.shares) :].sum()), rel=0.02, abs=1e-3 * float(values.sum())
    )


def test_it_beats_plain_svd_and_output_pca() -> None:
    error, sigma, gamma = problem(48, 64, 1)
    found = error_spectrum(error, sigma, gamma, 2, draw())

    def left(vectors: torch.Tensor) -> float:
        root = gamma.sqrt()[:, None]
        return float(oracle(error - vectors / root @ ((vectors * root).T @ error), sigma, gamma).sum())

    plain = torch.linalg.svd(error)[0][:, :2]
    assert left(found.vectors) < 0.98 * left(plain)


def test_no_error_has_no_directions() -> None:
    found = error_spectrum(torch.zeros(6, 8), torch.eye(8), torch.ones(6), 2, draw())
    assert found.shares.tolist() == [0.0, 0.0]


def quantized(rank: int) -> tuple[Program, Program]:
    """A program with one planned branch, before and after ``insert-side-branch``."""
    program = build(MODEL)
    steps = (
        CollectStatistics(),
        AnnotateSalience(),
        AssignPrecision(Budget(5.0)),
        ReorderFeatures(),
        QuantizeWeights(),
    )
    before = manager.run(program, steps, context(MODEL), level=2)
    room = before.tensor("budget", "bits") + 2 * branch_bits(64, 64)
    none = {f"{s.name}/planned_rank": torch.tensor(0) for s in before.open_sites()}
    before = before.with_tensors({**none, "layers.1.down/planned_rank": torch.tensor(rank), "budget/bits": room})
    return before, manager.run(before, (InsertSideBranch(),), context(MODEL), level=2)


def test_a_planned_branch_lowers_the_loss_with_its_stored_factors() -> None:
    before, after = quantized(2)
    site = after.site("layers.1.down")
    assert site.format is not None
    assert site.format.rank == 2
    weight = PackedWeight(site.format, **{k: after.tensor(site.name, k) for k in site.format.tensors()})
    original = after.weight(site).detach().double()
    sigma, gamma = after.tensor(site.input, "sigma").double(), after.tensor(site.name, "gamma").double()
    columns = after.find(site.name, "column_order")
    if columns is not None:
        original, sigma = original[:, columns], sigma[columns][:, columns]
    plain = PackedWeight(before.site(site.name).format, weight.codes, weight.scales, weight.factors, weight.row_index)  # type: ignore[arg-type]

    def loss(candidate: PackedWeight) -> float:
        error = original - candidate.dequantize().double()
        return float(((error @ sigma * error).sum(-1) * gamma).sum())

    assert loss(weight) < 0.98 * loss(plain)
    planned = int(before.tensor(site.name, "planned_bits")) + 2 * branch_bits(site.rows, site.columns)
    assert weight.stored_bits() == planned == int(after.tensor(site.name, "planned_bits"))


def test_rank_zero_changes_nothing() -> None:
    before, after = quantized(0)
    assert after.sites == before.sites
    assert not any("branch_a" in key for key in after.tensors)
