"""Coordinate descent after GPTQ: never worse, at a minimum in every coordinate, and in the stored numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixcomp.float_grid import fit_float
from mixcomp.format import MAX_GROUP_SCALE, WIDTHS
from mixcomp.passes import refine as module
from mixcomp.passes.gptq import Task, feedback, gptq
from mixcomp.passes.refine import refine
from mixcomp.quant import Grid, dequantize, fit_mixed
from test_gptq import problem, quadratic


def start(rows: int, columns: int, widths: tuple[int, ...], seed: int) -> tuple[Task, torch.Tensor, torch.Tensor]:
    """A task with rows of ``widths`` in turn, what GPTQ makes of it, and the second moments."""
    weight, sigma = problem(rows, columns, seed)
    each = torch.tensor(widths, dtype=torch.uint8).repeat(rows)[:rows]
    task = Task(weight, fit_mixed(weight, sigma.diagonal(), each, "s"), feedback(sigma, "s"))
    ((codes, _),) = gptq([task])
    return task, codes, sigma


def loss(task: Task, codes: torch.Tensor, scales: torch.Tensor | None, sigma: torch.Tensor) -> torch.Tensor:
    grid = task.grid if scales is None else replace(task.grid, scales=scales)
    return quadratic(task.weight - dequantize(codes, grid), sigma)


@given(st.sampled_from((1, 31, 33, 64, 70, 129)), st.integers(0, 99))
def test_no_row_gets_worse(columns: int, seed: int) -> None:
    task, codes, sigma = start(12, columns, WIDTHS, seed)
    ((better, scales),) = refine([task], [codes], [task.grid.scales])
    assert scales is not None
    assert scales.dtype == torch.uint8
    assert 1 <= int(scales.min()) <= int(scales.max()) <= MAX_GROUP_SCALE
    assert (better <= (1 << task.grid.widths.int())[:, None] - 1).all()
    before, after = loss(task, codes, task.grid.scales, sigma), loss(task, better, scales, sigma)
    assert (after <= before * (1 + 1e-4) + 1e-6 * before.max()).all()


def test_it_gains_much_on_correlated_inputs() -> None:
    for width, gain in ((2, 0.97), (4, 0.98)):
        task, codes, sigma = start(64, 128, (width,), 7)
        ((better, scales),) = refine([task], [codes], [task.grid.scales])
        assert loss(task, better, scales, sigma).sum() < gain * loss(task, codes, task.grid.scales, sigma).sum()


@pytest.mark.parametrize("columns", [40, 96])
def test_at_the_end_no_single_code_or_scale_can_be_bettered(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brute force: every code one up or down, every scale at each of its 16 values."""
    monkeypatch.setattr(module, "ROUNDS", 60)
    task, codes, sigma = start(4, columns, (3,), 11)
    ((codes, scales),) = refine([task], [codes], [task.grid.scales])
    assert scales is not None
    least = loss(task, codes, scales, sigma)
    for column in range(columns):
        for step in (-1, 1):
            other = codes.int()
            other[:, column] = (other[:, column] + step).clamp(0, 7)
            assert (loss(task, other.to(torch.uint8), scales, sigma) >= least * (1 - 1e-4)).all()
    for group in range(scales.shape[1]):
        for value in range(1, MAX_GROUP_SCALE + 1):
            other = scales.clone()
            other[:, group] = value
            assert (loss(task, codes, other, sigma) >= least * (1 - 1e-4)).all()


def test_tasks_are_independent_and_fixed_steps_stay() -> None:
    one, codes, sigma = start(12, 70, (2, 4), 1)
    other, other_codes, _ = start(12, 70, (3,), 2)
    alone = refine([one], [codes], [one.grid.scales])[0]
    together = refine([other, one], [other_codes, codes], [None, one.grid.scales])
    assert all(torch.equal(a, b) for a, b in zip(alone, together[1], strict=True))
    assert together[0][1] is None
    before, after = (quadratic(other.weight - dequantize(c, other.grid), sigma).sum() for c in (other_codes, codes))
    assert after != before


def test_float_grids_keep_their_steps() -> None:
    weight, sigma = problem(8, 70, 4)
    widths = torch.full((8,), 3, dtype=torch.uint8)
    task = Task(weight, fit_float(weight, sigma.diagonal(), widths, "s", 64), feedback(sigma, "s"))
    ((codes, _),) = gptq([task])
    ((better, none),) = refine([task], [codes], [None])
    assert none is None
    before, after = (quadratic(weight - dequantize(c, task.grid), sigma).sum() for c in (codes, better))
    assert after < 0.97 * before


@pytest.mark.parametrize("planted", ["sign", "stale", "diagonal"])
def test_planted_bugs_are_seen(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull of the wrong sign, one that is not brought up to date, and another column's curvature."""
    original = module._State.fit_codes

    def broken(self: module._State) -> None:
        if planted == "sign":
            self.pull.neg_()
        if planted == "diagonal":
            self.hessian = self.hessian.roll((1, 1), (1, 2))
        held = self.pull.clone()
        original(self)
        if planted == "stale":
            self.pull = held

    monkeypatch.setattr(module._State, "fit_codes", broken)
    task, codes, sigma = start(64, 128, (3,), 7)
    ((better, scales),) = refine([task], [codes], [task.grid.scales])
    assert loss(task, better, scales, sigma).sum() > 0.97 * loss(task, codes, task.grid.scales, sigma).sum()


def test_scales_of_a_grid_are_read_exactly() -> None:
    """The step of a block divided by its group scale is the stored factor, to the bit."""
    task, _, _ = start(12, 96, WIDTHS, 3)
    grid = task.grid
    assert isinstance(grid, Grid)
    steps = grid.steps()[:, : grid.scales.shape[1]]
    unit = torch.where(grid.widths == 8, 1.0, 2.0)[:, None] * grid.factors.float()[:, None]
    assert torch.equal(steps / grid.scales, unit.expand_as(steps))
