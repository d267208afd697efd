"""SliM-LLM's quantizer calibration: the scan of ranges against brute force in fp64, as printed and truly weighted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixcomp import manager
from mixcomp.config import Budget
from mixcomp.errors import ConfigError
from mixcomp.float_grid import FloatGrid, fit_float
from mixcomp.passes import CollectStatistics, QuantizeWeights, ReorderFeatures, slim
from mixcomp.passes.assign_blocks import AssignBlocks
from mixcomp.passes.gptq import Feedback, feedback
from mixcomp.passes.keep_samples import KeepSamples
from mixcomp.program import Program
from mixcomp.protocol import Context
from mixcomp.quant import dequantize, round_nearest
from programs import Blueprint, Kind, Layer, build, context

MODEL = Blueprint((Layer(Kind.GATED, 300), Layer(Kind.PLAIN, 66, bias=True)), width=320)
Weights = tuple[torch.Tensor, torch.Tensor]


def problem(columns: int, seed: int) -> Weights:
    """weight and what every element counts, fp32[4, columns]."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, columns, generator=random)
    return weight, torch.rand(4, columns, generator=random).square() + 1e-3


def tried(own: torch.Tensor, width: int, tau: float) -> torch.Tensor:
    """A block float64[rows, size] rounded as the paper says, ranges times ``tau``, with a stored fp16 scale."""
    low, high = own.amin(1, keepdim=True).clamp(max=0), own.amax(1, keepdim=True).clamp(min=0)
    step = (tau * (high - low) / (2**width - 1)).half().double()
    zero = (-tau * low / step).round()
    return ((own / step).round() + zero).clamp(0, 2**width - 1).sub(zero).mul(step)


def lost(found: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, group: int) -> torch.Tensor:
    """Weighted squared error of every row and block, fp64."""
    error = (found.double() - weight.double()).square() * counts.double()
    return torch.stack([part.sum(1) for part in error.split(group, 1)], 1)


def scan_is_exhaustive(columns: int, width: int, seed: int) -> None:
    weight, counts = problem(columns, seed)
    grid = fit_float(weight, counts, torch.full((4,), width, dtype=torch.uint8), "site", 64, slim.TAUS)
    got = lost(dequantize(round_nearest(weight, grid), grid), weight, counts, 64)
    taus = [1.0] + [1 + 0.1 * i / 50 for i in range(1, 51)] + [1 - 0.1 * i / 50 for i in range(1, 51)]
    every = [torch.cat([tried(b, width, t) for b in weight.double().split(64, 1)], 1) for t in taus]
    wanted = torch.stack([lost(q, weight, counts, 64) for q in every])
    torch.testing.assert_close(got, wanted.amin(0), rtol=2e-3, atol=1e-9)
    assert (got <= wanted[0] * (1 + 2e-3)).all()  # oracle 22: never worse than the range as it is


def all_scans(columns: int, widths: tuple[int, ...]) -> None:
    for width in widths:
        scan_is_exhaustive(columns, width, 0)


@given(st.sampled_from((33, 64, 150)), st.sampled_from((2, 3, 4, 6)), st.integers(0, 30))
def test_the_scan_finds_the_best_of_all_ranges(columns: int, width: int, seed: int) -> None:
    scan_is_exhaustive(columns, width, seed)


@pytest.mark.parametrize("taus", [slim.TAUS[:51], (1.0, *slim.TAUS[51:])], ids=["only wider", "only narrower"])
def test_the_scan_oracle_bites(taus: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slim, "TAUS", taus)
    with pytest.raises(AssertionError):
        all_scans(150, (2, 4, 6))


@pytest.fixture(scope="module")
def assigned() -> Program:
    """Blocks of 1, 2 and 3 bits, some inputs hot."""
    program = build(MODEL)
    with torch.no_grad():
        program.graph_module.get_parameter("embed.weight")[:, 64:160].mul_(30)
    steps = (CollectStatistics(), KeepSamples(), AssignBlocks(Budget(2, count="payload"), group=32), ReorderFeatures())
    return manager.run(program, steps, context(MODEL))


def fitted(program: Program, calibration: str) -> dict[str, torch.Tensor]:
    """Stored factors of every site."""
    one = QuantizeWeights(calibration)  # type: ignore[arg-type]
    done = manager.run(program, (one,), context(MODEL), level=2)
    return {s.name: done.tensor(s.name, "factors") for s in done.open_sites()}


def alone(program: Program, name: str, counts: torch.Tensor) -> FloatGrid:
    site = program.site(name)
    return fit_float(program.weight(site).detach(), counts, program.tensor(name, "widths"), name, 32, slim.TAUS)


def test_as_printed_the_mask_drops_out(assigned: Program) -> None:
    """Oracle 23: whatever is called salient, the two parts of the loss add up to the plain squared error."""
    found, random = fitted(assigned, "printed"), torch.Generator().manual_seed(0)
    for site in assigned.open_sites():
        weight = assigned.weight(site).detach()
        salient = (torch.rand(weight.shape, generator=random) < 0.1).float()
        assert torch.equal(found[site.name], alone(assigned, site.name, salient + (1 - salient)).factors)


def weighted_by_salience(program: Program) -> None:
    found, differs = fitted(program, "salience"), False
    for site in program.open_sites():
        weight, sigma = program.weight(site).detach(), program.tensor(site.input, "sigma")
        known = feedback(sigma, site.name)
        pivots = torch.empty(site.columns, dtype=torch.float64)
        pivots[known.order] = known.factor.diagonal().double().square()
        grid = alone(program, site.name, (weight.double().square() / pivots).float())
        assert torch.equal(found[site.name], grid.factors)
        differs |= not torch.equal(grid.factors, alone(program, site.name, torch.ones(site.columns)).factors)
    assert differs


def test_truly_weighted_errors_count_by_salience(assigned: Program) -> None:
    weighted_by_salience(assigned)


BUGS: dict[str, Callable[[torch.Tensor, Feedback], torch.Tensor]] = {
    "as printed": lambda w, known: torch.ones_like(w),
    "the square of a square": lambda w, known: slim_salience(w, known).square(),
    "rounding order": lambda w, known: slim_salience(w, known)[:, known.order.flip(0)],
}
slim_salience = slim.element_salience


@pytest.mark.parametrize("bug", BUGS)
def test_the_weighting_oracle_bites(bug: str, assigned: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slim, "element_salience", BUGS[bug])
    with pytest.raises(AssertionError):
        weighted_by_salience(assigned)


def test_a_salient_weight_is_met_better_when_errors_are_weighted() -> None:
    """Half of a block lies on the plain range's levels; one salient weight lies between two of them."""
    weight = torch.cat((torch.tensor([0.0, 1.0, 2.0, 3.0] * 8), torch.tensor([1.46] * 1)))[None]
    counts = torch.ones_like(weight)
    counts[0, -1] = 1e4
    errors = []
    for own in (torch.ones_like(weight), counts):
        grid = fit_float(weight, own, torch.full((1,), 2, dtype=torch.uint8), "site", 64, slim.TAUS)
        errors.append(float((weight - dequantize(round_nearest(weight, grid), grid))[0, -1].abs()))
    assert errors[0] > 0.4
    assert errors[1] < 0.37


def test_two_level_scales_have_no_range_to_scan() -> None:
    program = build(MODEL)
    steps = (CollectStatistics(), KeepSamples(), AssignBlocks(Budget(4.0), scale_kind=0), ReorderFeatures())
    done = manager.run(program, steps, context(MODEL))
    with pytest.raises(ConfigError, match=r"calibration 'printed'.*layers\.0\.\w+ has two-level ones; use .*energy"):
        QuantizeWeights("printed").run(done, Context())
