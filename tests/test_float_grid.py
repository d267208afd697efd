"""Float-group grids, and two-level grids in wide groups and mixed rows: Q1-Q10 of the quantizer, judged in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import strategies
from formats import width_tables
from mixcomp import quant
from mixcomp.errors import WeightError
from mixcomp.float_grid import FloatGrid, fit_float
from mixcomp.format import ALL_WIDTHS, GROUPS, WIDTHS
from mixcomp.quant import Grid, Rounding, concatenate, dequantize, fit_grid, fit_mixed, group_columns, round_nearest

Fit = Callable[..., Grid | FloatGrid]
FITS: dict[str, Fit] = {"two-level": fit_mixed, "float-group": fit_float}
groups = st.sampled_from(GROUPS)


@pytest.fixture(params=FITS)
def fit(request: pytest.FixtureRequest) -> Fit:
    return FITS[request.param]


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def energy(columns: int) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(9)) + 0.1


@st.composite
def problems(draw: st.DrawFn, weights: st.SearchStrategy[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """weight, widths, columns of a group."""
    weight, group = draw(weights), draw(groups)
    return weight, draw(width_tables(weight.shape[0], -(-weight.shape[1] // group))), group


PLAIN = st.builds(random_weight, st.integers(1, 6), st.sampled_from((1, 33, 70, 160, 300)), st.integers(0, 99))


def per_column(values: torch.Tensor, columns: int) -> torch.Tensor:
    return values.repeat_interleave(32, 1)[:, :columns]


@given(problems(strategies.nasty_weights()), st.sampled_from(sorted(FITS)))
def test_any_finite_weight_gives_finite_scales(case: tuple[torch.Tensor, torch.Tensor, int], name: str) -> None:
    weight, widths, group = case
    grid = FITS[name](weight, energy(weight.shape[1]), widths, "site", group)
    assert torch.isfinite(grid.factors).all()
    assert (grid.factors > 0).all()
    assert torch.isfinite(dequantize(round_nearest(weight, grid), grid)).all()


@given(problems(PLAIN), st.sampled_from(sorted(FITS)))
def test_codes_are_the_nearest_levels_and_settle(case: tuple[torch.Tensor, torch.Tensor, int], name: str) -> None:
    weight, widths, group = case
    columns = weight.shape[1]
    grid = FITS[name](weight, energy(columns), widths, "site", group)
    codes, top = round_nearest(weight, grid), per_column(grid.top(), columns)
    assert (codes <= top).all()
    error = (weight.double() - dequantize(codes, grid).double()).abs()
    step = per_column(grid.steps(), columns).double()
    for shift in (-1, 1):
        other = torch.minimum((codes.int() + shift).clamp(min=0), top.int()).to(torch.uint8)
        assert (error <= (weight.double() - dequantize(other, grid).double()).abs() + 1e-4 * step).all()
    assert torch.equal(round_nearest(dequantize(codes, grid), grid), codes)


def test_more_bits_lose_less_and_a_search_beats_min_max(fit: Fit) -> None:
    weight, h = random_weight(32, 256), energy(256)
    for group in GROUPS:
        losses = []
        for width in ALL_WIDTHS:
            grid = fit(weight, h, torch.full((32,), width, dtype=torch.uint8), "site", group)
            losses.append(float(((weight - dequantize(round_nearest(weight, grid), grid)).square() * h).sum()))
        assert all(a > 2.3 * b for a, b in itertools.pairwise(losses)), losses
    x = group_columns(weight, 128).double()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    for width in (2, 3, 4):
        step = (high - low) / (2**width - 1)
        plain = (((x - low) / step).round() * step + low - x).square() * group_columns(h[None], 128)
        grid = fit(weight, h, torch.full((32,), width, dtype=torch.uint8), "site", 128)
        ours = (weight - dequantize(round_nearest(weight, grid), grid)).square() * h
        assert ours.sum() < plain.sum() * (0.75 if width == 2 else 1.05)


@pytest.mark.parametrize("shift", [3, -3, 0])
def test_zero_stays_zero_and_ranges_without_it_are_covered(shift: int) -> None:
    weight = random_weight(6, 100) + shift * 2
    for width in WIDTHS:
        grid = fit_float(weight, energy(100), torch.full((6,), width, dtype=torch.uint8), "site", 64)
        assert (dequantize(round_nearest(torch.zeros_like(weight), grid), grid) == 0).all()
        error = weight - dequantize(round_nearest(weight, grid), grid)
        assert error.square().mean() < per_column(grid.steps(), 100).square().mean() / 2


def test_the_search_of_mixed_rows_counts_what_rounding_loses() -> None:
    weight, h = random_weight(4, 224), energy(224)
    widths = torch.tensor([[1, 2, 3, 4, 5, 6, 8]] * 4, dtype=torch.uint8)
    grid = fit_mixed(weight, h, widths, "site")
    error = quant._MixedError(group_columns(weight), group_columns(h[None])[0], widths)
    lost = group_columns((weight - dequantize(round_nearest(weight, grid), grid)).square() * h).sum(-1)
    torch.testing.assert_close(error(grid.factors.float()[:, None] * grid.scales), lost, rtol=1e-4, atol=1e-7)
    for factor in (0.9, 1.1):  # and one factor more or less is no better
        other = Grid((grid.factors.float() * factor).half(), grid.scales, widths)
        again = group_columns((weight - dequantize(round_nearest(weight, other), other)).square() * h).sum(-1)
        assert again.sum() > 0.95 * lost.sum()


@given(st.sampled_from(ALL_WIDTHS), st.integers(-4, 6), st.sampled_from(sorted(FITS)))
def test_scaling_by_a_power_of_two_scales_the_grid(width: int, power: int, name: str) -> None:
    weight, h = random_weight(4, 100), energy(100)
    widths = torch.full((4, 2), width, dtype=torch.uint8)
    widths[2:, 1] = 4
    one = FITS[name](weight, h, widths, "site", 64)
    scaled = FITS[name](weight * 2.0**power, h, widths, "site", 64)
    assert torch.equal(scaled.factors, one.factors * 2.0**power)
    assert torch.equal(round_nearest(weight * 2.0**power, scaled), round_nearest(weight, one))


def test_rows_are_independent(fit: Fit) -> None:
    weight, h = random_weight(6, 100), energy(100)
    changed = weight.clone()
    changed[3] *= -7
    widths = torch.tensor([[2, 4, 8, 1]] * 6, dtype=torch.uint8)
    before, after = fit(weight, h, widths, "site"), fit(changed, h, widths, "site")
    others = torch.tensor([0, 1, 2, 4, 5])
    assert torch.equal(before.steps()[others], after.steps()[others])
    assert torch.equal(before.offsets()[others], after.offsets()[others])
    assert torch.equal(before.rows(others).steps(), before.steps()[others])
    assert not torch.equal(before.factors[3], after.factors[3])


def test_one_bit_is_a_mean_and_a_mean_distance() -> None:
    weight = random_weight(3, 70) + 1
    grid = fit_float(weight, energy(70), torch.ones(3, dtype=torch.uint8), "site", 64)
    for columns, group in ((slice(0, 64), 0), (slice(64, 70), 1)):  # the short group counts its own columns
        part = weight[:, columns].double()
        mean = part.mean(1)
        torch.testing.assert_close(grid.shifts[:, group].double(), mean, rtol=1e-3, atol=1e-3)
        distance = (part - mean[:, None]).abs().mean(1)
        torch.testing.assert_close(grid.factors[:, group].double(), distance, rtol=2e-3, atol=1e-3)
    found = dequantize(round_nearest(weight, grid), grid)
    above = weight > per_column(grid.shifts.float().repeat_interleave(2, 1), 70)
    sign = torch.where(above, 1.0, -1.0)
    wanted = per_column(grid.shifts.float().repeat_interleave(2, 1), 70) + sign * per_column(
        grid.factors.float().repeat_interleave(2, 1), 70
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_rows_of_one_width_in_a_mixed_table_are_fitted_as_alone(fit: Fit) -> None:
    weight, h = random_weight(4, 100), energy(100)
    widths = torch.tensor([[4] * 4, [2, 4, 4, 8], [3] * 4, [8, 8, 1, 8]], dtype=torch.uint8)
    mixed = fit(weight, h, widths, "site")
    for row in (0, 2):
        alone = fit(weight[row : row + 1], h, widths[row : row + 1, 0], "site")
        assert torch.equal(mixed.steps()[row], alone.steps()[0])
    if isinstance(mixed, Grid):
        assert torch.equal(mixed.scales[0], fit_grid(weight[:1], h, 4, "site").scales[0])


def test_one_factor_serves_all_widths_of_a_row() -> None:
    """A step is factor * m / 2**(width - 1): at equal reach group scales are about equal whatever the width."""
    weight = random_weight(1, 128).sign()
    grid = fit_mixed(weight, torch.ones(128), torch.tensor([[2, 4, 6, 8]], dtype=torch.uint8), "site")
    steps = grid.factors.float() * grid.scales.float() / 2.0 ** (torch.tensor([[2, 4, 6, 8]]) - 1)
    assert torch.equal(grid.steps(), steps)
    error = (weight - dequantize(round_nearest(weight, grid), grid)).abs()
    assert (group_columns(error).amax(-1) <= steps / 2 + 0.1).all()


def test_grids_of_different_groups_are_put_together() -> None:
    weight, h = random_weight(2, 70), energy(70)
    widths = torch.full((2,), 4, dtype=torch.uint8)
    parts: list[Rounding] = [fit_float(weight, h, widths, "a", 128), fit_mixed(weight, h, widths, "b")]
    whole = concatenate(parts)
    assert whole.steps().shape == (4, 3)
    codes = round_nearest(weight.repeat(2, 1), whole)
    for part, own in zip(parts, codes.split(2), strict=True):
        assert torch.equal(own, round_nearest(weight, part))


def test_what_fp16_cannot_hold_is_refused_by_row(fit: Fit) -> None:
    weight = torch.ones(3, 64)
    weight[1, 5] = 3e38
    for widths in (torch.full((3,), 1, dtype=torch.uint8), torch.tensor([[2, 4]] * 3, dtype=torch.uint8)):
        with pytest.raises(WeightError, match=r"layers\.7: row"):
            fit(weight, torch.ones(64), widths, "layers.7")
