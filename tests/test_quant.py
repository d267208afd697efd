"""Grids and rounding: Q1-Q10 of the quantizer, judged in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import strategies
from mixcomp.errors import WeightError
from mixcomp.format import WIDTHS
from mixcomp.quant import dequantize, fit_grid, fit_mixed, group_columns, round_nearest

widths = st.sampled_from(WIDTHS)


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(strategies.nasty_weights(), widths)
def test_any_finite_weight_gives_finite_stored_scales(weight: torch.Tensor, width: int) -> None:
    grid = fit_grid(weight, torch.ones(weight.shape[1]), width, "site")
    assert torch.isfinite(grid.factors).all()
    assert (grid.factors > 0).all()
    assert int(grid.scales.min()) >= 1
    assert int(grid.scales.max()) <= 16
    assert torch.isfinite(dequantize(round_nearest(weight, grid), grid)).all()


@given(strategies.nasty_weights(), widths)
def test_codes_are_the_nearest_levels(weight: torch.Tensor, width: int) -> None:
    grid = fit_grid(weight, torch.ones(weight.shape[1]), width, "site")
    codes = round_nearest(weight, grid)
    assert int(codes.max()) < 2**width
    error = (weight.double() - dequantize(codes, grid).double()).abs()
    step = grid.steps().repeat_interleave(32, 1)[:, : weight.shape[1]].double()
    for shift in (-1, 1):  # no neighbouring level is nearer (by more than fp32 rounding of w / step)
        other = (codes.int() + shift).clamp(0, 2**width - 1).to(torch.uint8)
        assert (error <= (weight.double() - dequantize(other, grid).double()).abs() + 1e-4 * step).all()


@given(widths, st.integers(0, 1000))
def test_quantizing_what_was_quantized_changes_nothing(width: int, seed: int) -> None:
    weight = random_weight(5, 70, seed)
    grid = fit_grid(weight, torch.ones(70), width, "site")
    codes = round_nearest(weight, grid)
    assert torch.equal(round_nearest(dequantize(codes, grid), grid), codes)


@given(widths, st.integers(-4, 8))  # below that fp16 factors lose bits
def test_scaling_by_a_power_of_two_scales_the_grid(width: int, power: int) -> None:
    weight, energy = random_weight(4, 64), torch.rand(64, generator=torch.Generator().manual_seed(1))
    one = fit_grid(weight, energy, width, "site")
    scaled = fit_grid(weight * 2.0**power, energy, width, "site")
    assert torch.equal(scaled.scales, one.scales)
    assert torch.equal(scaled.factors, one.factors * 2.0**power)


@given(widths)
def test_mirrored_weights_get_mirrored_codes(width: int) -> None:
    weight = random_weight(4, 64)
    grid = fit_grid(weight, torch.ones(64), width, "site")
    codes, mirrored = round_nearest(weight, grid).int(), round_nearest(-weight, grid).int()
    inside = codes < 2**width - 1 if width == 8 else codes >= 0  # mid-tread has one level more below zero than above
    top = 256 if width == 8 else 2**width - 1
    assert torch.equal(mirrored[inside & (codes > 0)], top - codes[inside & (codes > 0)])


def test_rows_are_independent() -> None:
    weight, energy = random_weight(6, 70), torch.rand(70, generator=torch.Generator().manual_seed(2))
    changed = weight.clone()
    changed[3] *= -7
    for width in WIDTHS:
        before, after = fit_grid(weight, energy, width, "site"), fit_grid(changed, energy, width, "site")
        others = [0, 1, 2, 4, 5]
        assert torch.equal(before.factors[others], after.factors[others])
        assert torch.equal(before.scales[others], after.scales[others])


def test_mixed_rows_equal_single_width_runs() -> None:
    weight, energy = random_weight(12, 70), torch.ones(70)
    chosen = torch.tensor([2, 3, 4, 5, 6, 8] * 2, dtype=torch.uint8)
    mixed = fit_mixed(weight, energy, chosen, "site")
    for width in WIDTHS:
        alone = fit_grid(weight, energy, width, "site")
        rows = chosen == width
        assert torch.equal(mixed.factors[rows], alone.factors[rows])
        assert torch.equal(mixed.scales[rows], alone.scales[rows])


def test_the_search_beats_min_max_scales() -> None:
    """Oracle: brute force over 60 real-valued clipping ratios per group may not be much better."""
    weight, energy = random_weight(16, 256), torch.rand(256, generator=torch.Generator().manual_seed(3)) + 0.1
    x, h = group_columns(weight).double(), group_columns(energy[None])[0].double()
    for width in (2, 3, 4):
        half = 2.0 ** (width - 1)

        def loss(step: torch.Tensor, half: float = half) -> torch.Tensor:
            level = (x / step).floor().clamp(-half, half - 1) + 0.5
            return ((x - level * step).square() * h).sum(-1)

        reach = x.abs().amax(-1, keepdim=True) / (half - 0.5)
        ideal = torch.stack([loss(reach * r) for r in torch.linspace(0.25, 1.2, 60).tolist()]).amin(0).sum()
        grid = fit_grid(weight, energy, width, "site")
        error = group_columns(weight - dequantize(round_nearest(weight, grid), grid)).double()
        ours = (error.square() * h).sum()
        assert ours < loss(reach).sum() * (0.9 if width < 4 else 1.0)  # min-max scales
        assert ours < ideal * 1.06  # 4-bit group scales cost a few percent against real-valued ones


def test_more_bits_lose_less() -> None:
    weight = random_weight(32, 128)
    losses = []
    for width in WIDTHS:
        grid = fit_grid(weight, torch.ones(128), width, "site")
        losses.append(float((weight - dequantize(round_nearest(weight, grid), grid)).square().mean()))
    ratios = [a / b for a, b in itertools.pairwise(losses)]
    assert all(r > 3 for r in ratios), ratios  # about 4 per bit


def test_a_weight_too_large_for_fp16_scales_is_refused_by_row() -> None:
    weight = torch.ones(3, 32)
    weight[1, 5] = 3e38
    with pytest.raises(WeightError, match=r"layers\.7: row 1"):
        fit_grid(weight, torch.ones(32), 4, "layers.7")
