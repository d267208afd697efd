"""GPTQ against its identities (fp64) and against plain rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixcomp.errors import WeightError
from mixcomp.format import WIDTHS
from mixcomp.passes.gptq import DAMPING, Feedback, Task, feedback, gptq
from mixcomp.quant import Grid, concatenate, dequantize, fit_grid, round_nearest


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated second moments with energies over two decades."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=random) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=random) @ mix * torch.logspace(-1, 1, columns)
    return torch.randn(rows, columns, generator=random), x.T @ x / len(x)


def run(weight: torch.Tensor, sigma: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, Grid, Feedback]:
    grid, known = fit_grid(weight, sigma.diagonal(), width, "site"), feedback(sigma, "site")
    ((codes, loss),) = gptq([Task(weight, grid, known)])
    return codes, loss, grid, known


def quadratic(error: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    damped = sigma.double() + DAMPING * sigma.diagonal().double().mean() * torch.eye(len(sigma)).double()
    return ((error.double() @ damped) * error.double()).sum(-1)


@given(st.sampled_from(WIDTHS), st.sampled_from((1, 31, 33, 64, 70, 129)), st.integers(0, 99))
def test_the_loss_is_an_identity(width: int, columns: int, seed: int) -> None:
    weight, sigma = problem(6, columns, seed)
    codes, loss, grid, _ = run(weight, sigma, width)
    assert int(codes.max()) < 2**width
    wanted = quadratic(weight - dequantize(codes, grid), sigma)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-3, atol=1e-6 * float(wanted.max()))


@given(st.sampled_from(WIDTHS), st.integers(0, 99))
def test_independent_inputs_make_it_plain_rounding(width: int, seed: int) -> None:
    weight, _ = problem(6, 70, seed)
    codes, _, grid, _ = run(weight, torch.eye(70) * 0.25, width)
    assert torch.equal(codes, round_nearest(weight, grid))


def test_it_beats_plain_rounding_on_correlated_inputs() -> None:
    for width in WIDTHS:
        weight, sigma = problem(64, 128, width)
        codes, _, grid, _ = run(weight, sigma, width)
        ours = quadratic(weight - dequantize(codes, grid), sigma).sum()
        plain = quadratic(weight - dequantize(round_nearest(weight, grid), grid), sigma).sum()
        assert ours < 0.9 * plain


def test_rows_and_tasks_are_independent() -> None:
    weight, sigma = problem(12, 70, 0)
    other, other_sigma = problem(12, 70, 1)
    grid, known = fit_grid(weight, sigma.diagonal(), 3, "a"), feedback(sigma, "a")
    (alone,) = gptq([Task(weight, grid, known)])
    second = Task(other, fit_grid(other, other_sigma.diagonal(), 3, "b"), feedback(other_sigma, "b"))
    together = gptq([second, Task(weight, grid, known)])[1]
    assert torch.equal(alone[0], together[0])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = Grid(grid.factors[order], grid.scales[order], grid.widths[order])
    ((codes, _),) = gptq([Task(weight[order], moved, known)])
    assert torch.equal(codes, alone[0][order])


def test_mixed_widths_are_put_together_exactly() -> None:
    weight, sigma = problem(6, 70, 3)
    known = feedback(sigma, "site")
    grids = [fit_grid(weight, sigma.diagonal(), width, "site") for width in WIDTHS]
    ((stacked, _),) = gptq([Task(weight.repeat(6, 1), concatenate(grids), known)])
    for i, grid in enumerate(grids):
        ((alone, _),) = gptq([Task(weight, grid, known)])
        assert torch.equal(stacked[6 * i : 6 * i + 6], alone)


def test_scaling_the_moments_changes_no_code() -> None:
    weight, sigma = problem(8, 64, 4)
    assert torch.equal(run(weight, sigma, 3)[0], run(weight, sigma * 4, 3)[0])


def test_groups_stay_whole_and_go_by_energy() -> None:
    sigma = torch.diag(torch.cat([torch.full((32,), e) for e in (1.0, 5.0, 3.0)] + [torch.full((4,), 9.0)]))
    order = feedback(sigma, "site").order
    assert order.tolist() == [*range(32, 64), *range(64, 96), *range(32), *range(96, 100)]


def test_dead_columns_and_singular_moments_factor() -> None:
    weight, _ = problem(4, 40, 5)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(6))
    x[:, 7] = 0
    codes, loss, grid, known = run(weight, x.T @ x / 3, 4)
    assert known.damping >= DAMPING
    assert torch.isfinite(loss).all()
    assert torch.equal(codes[:, 7], round_nearest(weight, grid)[:, 7])  # nothing is known about it: nearest level
    run(weight, torch.zeros(40, 40), 4)


def test_moments_that_are_no_moments_are_refused_by_name() -> None:
    with pytest.raises(WeightError, match=r"layers\.3.*not finite"):
        feedback(torch.full((4, 4), torch.nan), "layers.3")
    with pytest.raises(WeightError, match=r"layers\.3.*factor"):
        feedback(torch.tensor([[1.0, 0.0], [0.0, -1e9]]), "layers.3")
