"""Rounding: grids, the search for their scales, and codes.  The only place in the code base that rounds a weight.

Everything is computed in fp32 with the *stored* scale: the fp16 row factor and the 4-bit group scale are rounded first,
then the search and the codes use what will be read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixcomp.errors import WeightError
from mixcomp.format import GROUP, MAX_GROUP_SCALE, WIDTHS
from mixcomp.packed import max_abs_level

#: smallest clipping ratio worth trying for each width: the coarser the grid, the more it pays to clip
SMALLEST_CLIP = {2: 0.30, 3: 0.45, 4: 0.55, 5: 0.70, 6: 0.80, 8: 0.90}
LARGEST_CLIP = 1.15
CLIP_STEPS = {2: 14, 3: 12, 4: 10, 5: 7, 6: 6, 8: 5}
#: row factors tried, as fractions of the one that lets the widest group use the top group scale
FACTOR_RATIOS = (1.0, 0.85, 0.72)
#: elements of one chunk of the search; its three temporaries stay in a core's second-level cache
CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}


@dataclass(frozen=True, slots=True)
class Grid:
    """Stored scales of some rows: ``weight = factor * m * level``.

    factors float16[rows], scales uint8[rows, groups] in 1..16, widths uint8[rows].
    """

    factors: torch.Tensor
    scales: torch.Tensor
    widths: torch.Tensor

    def steps(self) -> torch.Tensor:
        """Distance of neighbouring levels, fp32[rows, groups]."""
        unit = torch.where(self.widths == 8, 1.0, 2.0)
        return self.factors.float()[:, None] * self.scales.float() * unit[:, None]

    def offsets(self) -> torch.Tensor:
        """Code of the value zero, fp32[rows]: half-integer for mid-rise grids, 128 at 8 bits."""
        return torch.where(self.widths == 8, 128.0, (self.top() / 2))

    def top(self) -> torch.Tensor:
        """Largest code, fp32[rows]."""
        return torch.exp2(self.widths.float()) - 1


def concatenate(grids: Sequence[Grid]) -> Grid:
    """The grids of several blocks of rows as one."""
    return Grid(*(torch.cat([getattr(g, name) for g in grids]) for name in ("factors", "scales", "widths")))


def group_columns(weight: torch.Tensor) -> torch.Tensor:
    """fp32[rows, columns] -> fp32[rows, groups, 32], the last group padded with zeros."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % GROUP))
    return padded.view(rows, -1, GROUP)


def fit_grid(weight: torch.Tensor, energy: torch.Tensor, width: int, site: str) -> Grid:
    """Row factors and group scales for one width, by search over clipping ratios.

    Minimizes ``sum_j energy_j (w_j - q_j)^2`` per group, where q is the nearest level under the *stored* scales.

    Args:
        weight: fp32[rows, columns].
        energy: fp32[columns], diagonal of the input second moments.
        width: bits of a code.
        site: name for error messages.

    Raises:
        WeightError: a row does not fit an fp16 factor (its largest weight is about 1e6 or more).
    """
    per_row = -(-weight.shape[1] // GROUP) * GROUP
    rows = max(1, CHUNK["cuda" if weight.is_cuda else "cpu"] // per_row)
    energy = group_columns(energy[None])[0]
    parts = [_fit_rows(group_columns(w), energy, width) for w in weight.split(rows)]
    factors = torch.cat([p[0] for p in parts])
    if not torch.isfinite(factors).all():
        row = int((~torch.isfinite(factors)).nonzero()[0])
        raise WeightError(
            f"{site}: row {row} reaches {float(weight[row].abs().max()):.3g}, too large for an fp16 row factor; "
            f"rescale the layer or leave it out with exclude=[{site!r}]"
        )
    widths = torch.full((weight.shape[0],), width, dtype=torch.uint8, device=weight.device)
    return Grid(factors, torch.cat([p[1] for p in parts]), widths)


def _fit_rows(x: torch.Tensor, energy: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Search for the rows of one chunk: x fp32[rows, groups, 32] -> factors fp16[rows], scales uint8[rows, groups]."""
    error = _GroupError(x, energy, width)
    reach = x.abs().amax(-1) / max_abs_level(width)  # unit (half a step) that just covers the group
    ideal = _best_unit(error, reach, width)
    found = [_best_scales(error, ideal, _stored_factors(ideal, ratio)) for ratio in FACTOR_RATIOS]
    choice = torch.stack([f.loss for f in found]).argmin(0)  # [rows]; the first of equals
    factors = torch.stack([f.factors for f in found]).gather(0, choice[None])[0]
    scales = torch.stack([f.scales for f in found]).gather(0, choice[None, :, None].expand(1, *ideal.shape))[0]
    return factors, scales


def _stored_factors(ideal: torch.Tensor, ratio: float) -> torch.Tensor:
    """fp16[rows] factors with which the widest group uses ``ratio`` of the top group scale."""
    factors = (ideal.amax(-1) / MAX_GROUP_SCALE * ratio).half()
    # fp16 cannot hold smaller positive numbers; all-zero rows land here too
    return torch.where(factors > 0, factors, torch.full_like(factors, 2.0**-24))


class _GroupError:
    """Weighted squared rounding error of every group for a given unit; its buffers are reused between calls."""

    def __init__(self, x: torch.Tensor, energy: torch.Tensor, width: int) -> None:
        self.x, self.energy, self.width = x, energy, width
        self.scaled, self.level = torch.empty_like(x), torch.empty_like(x)

    def __call__(self, unit: torch.Tensor) -> torch.Tensor:
        """unit fp32[rows, groups] -> fp32[rows, groups]."""
        step = unit if self.width == 8 else unit * 2
        torch.mul(self.x, (1 / step)[..., None], out=self.scaled)
        level = self.level
        if self.width == 8:
            torch.round(self.scaled, out=level).clamp_(-128, 127)
        else:
            half = 2.0 ** (self.width - 1)
            torch.floor(self.scaled, out=level).clamp_(-half, half - 1).add_(0.5)
        self.scaled.sub_(level).square_().mul_(self.energy)
        return self.scaled.sum(-1) * step.square()


def _best_unit(error: _GroupError, reach: torch.Tensor, width: int) -> torch.Tensor:
    """Real-valued unit per group with the least error over the clipping ratios."""
    reach = reach.clamp_min(torch.finfo(torch.float32).tiny * 2**20)
    ratios = torch.linspace(LARGEST_CLIP, SMALLEST_CLIP[width], CLIP_STEPS[width], device=reach.device)
    losses = torch.stack([error(reach * ratio) for ratio in ratios.tolist()])
    return reach * ratios[losses.argmin(0)]


@dataclass(frozen=True, slots=True)
class _Scales:
    """factors fp16[rows], scales uint8[rows, groups] and what they lose, fp32[rows]."""

    factors: torch.Tensor
    scales: torch.Tensor
    loss: torch.Tensor


def _best_scales(error: _GroupError, ideal: torch.Tensor, factors: torch.Tensor) -> _Scales:
    """Integer group scales around ideal / factor."""
    unit = factors.float()[:, None]
    centre = (ideal / unit).round().clamp_(1, MAX_GROUP_SCALE)
    best_loss, best = error(centre * unit), centre
    for shift in (-1, 1):
        scales = (centre + shift).clamp_(1, MAX_GROUP_SCALE)
        loss = error(scales * unit)
        better = loss < best_loss
        best_loss, best = torch.where(better, loss, best_loss), torch.where(better, scales, best)
    return _Scales(factors, best.to(torch.uint8), best_loss.sum(-1))


def fit_mixed(weight: torch.Tensor, energy: torch.Tensor, widths: torch.Tensor, site: str) -> Grid:
    """``fit_grid`` for rows of different widths; widths uint8[rows].  Rows are independent, so this is exact."""
    groups = -(-weight.shape[1] // GROUP)
    factors = torch.empty(weight.shape[0], dtype=torch.float16, device=weight.device)
    scales = torch.empty(weight.shape[0], groups, dtype=torch.uint8, device=weight.device)
    for width in WIDTHS:
        rows = (widths == width).nonzero()[:, 0]
        if len(rows):
            grid = fit_grid(weight[rows], energy, width, site)
            factors[rows], scales[rows] = grid.factors, grid.scales
    return Grid(factors, scales, widths)


def round_column(
    x: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, low: torch.Tensor, top: torch.Tensor
) -> torch.Tensor:
    """Nearest codes of one column: all fp32[..., rows] -> codes fp32[..., rows] in low..top."""
    return torch.addcdiv(offset, x, step).round_().clamp_(low, top)


def round_nearest(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Plain rounding, no error feedback: fp32[rows, columns] -> codes uint8[rows, columns]."""
    x = group_columns(weight)
    codes = (x / grid.steps()[..., None]).add_(grid.offsets()[:, None, None]).round_()
    codes = torch.minimum(codes.clamp_(min=0), grid.top()[:, None, None])
    return codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8)


def dequantize(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes uint8[rows, columns] back to fp32[rows, columns]; equals what ``PackedWeight.base`` reads from storage."""
    columns = codes.shape[1]
    level = codes.float().sub_(grid.offsets()[:, None])
    return level.mul_(grid.steps().repeat_interleave(GROUP, 1)[:, :columns])
