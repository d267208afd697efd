"""Rounding: grids, the search for their scales, and codes.  With ``float_grid`` the only place that rounds a weight.

Everything is computed in fp32 with the *stored* scale: the fp16 row factor and the 4-bit group scale are rounded first,
then the search and the codes use what will be read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mixcomp.errors import WeightError
from mixcomp.format import ALL_WIDTHS, GROUP, MAX_GROUP_SCALE
from mixcomp.packed import max_abs_level

#: smallest clipping ratio worth trying for each width: the coarser the grid, the more it pays to clip
SMALLEST_CLIP = {1: 0.15, 2: 0.30, 3: 0.45, 4: 0.55, 5: 0.70, 6: 0.80, 8: 0.90}
LARGEST_CLIP = 1.15
CLIP_STEPS = {1: 16, 2: 14, 3: 12, 4: 10, 5: 7, 6: 6, 8: 5}
#: row factors tried, as fractions of the one that lets the widest group use the top group scale
FACTOR_RATIOS = (1.0, 0.85, 0.72)
#: elements of one chunk of the search; its three temporaries stay in a core's second-level cache
CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}


class Rounding(Protocol):
    """What rounding has to know of stored scales: fp32[rows, blocks], a block being 32 columns of a group.

    The weight of a code is ``(code - offset) * step``; there may be more blocks than columns need.
    """

    def steps(self) -> torch.Tensor:
        """Distance of neighbouring levels."""

    def offsets(self) -> torch.Tensor:
        """Code of the value zero: any number, half-integer for mid-rise grids, 128 at 8 bits."""

    def top(self) -> torch.Tensor:
        """Largest code."""


@dataclass(frozen=True, slots=True)
class Steps:
    """A rounding written out."""

    step: torch.Tensor
    offset: torch.Tensor
    largest: torch.Tensor

    def steps(self) -> torch.Tensor:
        return self.step

    def offsets(self) -> torch.Tensor:
        return self.offset

    def top(self) -> torch.Tensor:
        return self.largest


@dataclass(frozen=True, slots=True)
class Grid:
    """Two-level scales of some rows: ``weight = factor * m * level``.

    factors float16[rows], scales uint8[rows, groups] in 1..16, widths uint8[rows] or [rows, groups].
    """

    factors: torch.Tensor
    scales: torch.Tensor
    widths: torch.Tensor
    group: int = GROUP

    def rows(self, order: torch.Tensor) -> Grid:
        """The rows ``order``."""
        return Grid(self.factors[order], self.scales[order], self.widths[order], self.group)

    def steps(self) -> torch.Tensor:
        widths = self._widths()
        unit = torch.where(widths == 8, 1.0, 2.0)
        if self.widths.dim() == 2:  # rows that mix widths: factor * m / 2**(width - 1)
            mixes = (widths != widths[:, :1]).any(1, keepdim=True)
            unit = torch.where(mixes, torch.exp2(1 - widths.float()), unit)
        return self._blocks(self.factors.float()[:, None] * self.scales.float() * unit)

    def offsets(self) -> torch.Tensor:
        return self._blocks(torch.where(self._widths() == 8, 128.0, self._top() / 2))

    def top(self) -> torch.Tensor:
        return self._blocks(self._top())

    def _widths(self) -> torch.Tensor:
        return self.widths if self.widths.dim() == 2 else self.widths[:, None]

    def _top(self) -> torch.Tensor:
        return torch.exp2(self._widths().float()) - 1

    def _blocks(self, values: torch.Tensor) -> torch.Tensor:
        return blocks(values.expand_as(self.scales), self.group)


def blocks(values: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, groups] -> [rows, blocks of 32 columns]."""
    return values if group == GROUP else values.repeat_interleave(group // GROUP, 1)


def concatenate(grids: Sequence[Rounding]) -> Steps:
    """The grids of several blocks of rows as one."""
    parts = [(g.steps(), g.offsets(), g.top()) for g in grids]
    blocks = min(step.shape[1] for step, _, _ in parts)
    return Steps(*(torch.cat([t[:, :blocks] for t in part]) for part in zip(*parts, strict=True)))


def group_columns(weight: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """fp32[rows, columns] -> fp32[rows, groups, group], the last group padded with zeros."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % group))
    return padded.view(rows, -1, group)


def fit_grid(weight: torch.Tensor, energy: torch.Tensor, width: int, site: str, group: int = GROUP) -> Grid:
    """Row factors and group scales for one width, by search over clipping ratios.

    Minimizes ``sum_j energy_j (w_j - q_j)^2`` per group, where q is the nearest level under the *stored* scales.

    Args:
        weight: fp32[rows, columns].
        energy: fp32[columns], diagonal of the input second moments.
        width: bits of a code.
        site: name for error messages.
        group: columns of a group.

    Raises:
        WeightError: a row does not fit an fp16 factor (its largest weight is about 1e6 or more).
    """
    energy = group_columns(energy[None], group)[0]
    parts = [_fit_rows(group_columns(w, group), energy, width) for w in weight.split(chunk(weight, group))]
    factors = torch.cat([p[0] for p in parts])
    require_finite(factors, weight, site)
    widths = torch.full((weight.shape[0],), width, dtype=torch.uint8, device=weight.device)
    return Grid(factors, torch.cat([p[1] for p in parts]), widths, group)


def chunk(weight: torch.Tensor, group: int) -> int:
    """Rows that are searched at a time."""
    per_row = -(-weight.shape[1] // group) * group
    return max(1, CHUNK["cuda" if weight.is_cuda else "cpu"] // per_row)


def require_finite(factors: torch.Tensor, weight: torch.Tensor, site: str) -> None:
    """``WeightError`` that names the first row whose fp16 numbers, [rows] or [rows, groups], overflowed."""
    finite = torch.isfinite(factors.view(len(factors), -1)).all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise WeightError(
            f"{site}: row {row} reaches {float(weight[row].abs().max()):.3g}, too large for an fp16 row factor; "
            f"rescale the layer or leave it out with exclude=[{site!r}]"
        )


def _fit_rows(x: torch.Tensor, energy: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Search for the rows of one chunk: x fp32[rows, groups, group] -> factors fp16[rows], scales uint8[rows, groups]."""
    error = _GroupError(x, energy, width)
    reach = x.abs().amax(-1) / max_abs_level(width)  # unit (half a step) that just covers the group
    return _best_factors(error, _best_unit(error, reach, width))


def _best_factors(error: GroupError, ideal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored scales around real-valued units fp32[rows, groups]."""
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


class GroupError(Protocol):
    """Weighted squared rounding error of every group for a given unit."""

    def __call__(self, unit: torch.Tensor) -> torch.Tensor:
        """unit fp32[rows, groups] -> fp32[rows, groups]."""


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


def _best_scales(error: GroupError, ideal: torch.Tensor, factors: torch.Tensor) -> _Scales:
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


def fit_mixed(
    weight: torch.Tensor,
    energy: torch.Tensor,
    widths: torch.Tensor,
    site: str,
    group: int = GROUP,
) -> Grid:
    """``fit_grid`` for rows of different widths; widths uint8[rows] or [rows, groups].

    Rows are independent, so where a row has one width this is exact.
    """
    groups = -(-weight.shape[1] // group)
    factors = torch.empty(weight.shape[0], dtype=torch.float16, device=weight.device)
    scales = torch.empty(weight.shape[0], groups, dtype=torch.uint8, device=weight.device)
    widest = widths if widths.dim() == 1 else widths.amax(1)
    mixes = torch.zeros_like(widest, dtype=torch.bool) if widths.dim() == 1 else widest != widths.amin(1)
    for width in ALL_WIDTHS:
        rows = ((widest == width) & ~mixes).nonzero()[:, 0]
        if len(rows):
            grid = fit_grid(weight[rows], energy, width, site, group)
            factors[rows], scales[rows] = grid.factors, grid.scales
    if bool(mixes.any()):
        energy = group_columns(energy[None], group)[0]
        for rows in mixes.nonzero()[:, 0].split(chunk(weight, group)):
            error = _MixedError(group_columns(weight[rows], group), energy, widths[rows])
            factors[rows], scales[rows] = _best_factors(error, error.best_unit())
    require_finite(factors, weight, site)
    return Grid(factors, scales, widths, group)


class _MixedError:
    """``_GroupError`` where every row and group has a width of its own, widths uint8[rows, groups].

    Its unit is ``factor * m``, the reach of a group at any width.
    """

    def __init__(self, x: torch.Tensor, energy: torch.Tensor, widths: torch.Tensor) -> None:
        self.x, self.energy, self.widths = x, energy, widths
        self.step = torch.exp2(1 - widths.float())  # in units
        self.half = torch.exp2(widths.float() - 1)[..., None]
        self.tread = torch.where(widths == 8, 0.5, 0.0)[..., None]

    def __call__(self, unit: torch.Tensor) -> torch.Tensor:
        """unit fp32[rows, groups] -> fp32[rows, groups]."""
        step = unit * self.step
        scaled = self.x / step[..., None]
        level = torch.minimum((scaled + self.tread).floor().maximum(-self.half), self.half - 1) + 0.5 - self.tread
        return ((scaled - level).square() * self.energy).sum(-1) * step.square()

    def best_unit(self) -> torch.Tensor:
        """Real-valued unit per group with the least error over the clipping ratios of its width."""
        cover = self.x.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny * 2**20)
        return _least(self, [cover * ratio for ratio in clips(self.widths, LARGEST_CLIP)])


def clips(widths: torch.Tensor, largest: float) -> list[torch.Tensor]:
    """Clipping ratios to try, each fp32 of the shape of widths."""
    table = torch.tensor([SMALLEST_CLIP.get(width, 1.0) for width in range(9)], device=widths.device)
    smallest = table[widths.long()]
    return [largest + (smallest - largest) * (i / 13) for i in range(14)]


def _least(error: GroupError, units: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of several units fp32[rows, groups] the one with the least error in each group; the first of equals."""
    best, least = units[0], error(units[0])
    for unit in units[1:]:
        loss = error(unit)
        best, least = torch.where(loss < least, unit, best), torch.minimum(loss, least)
    return best


def round_column(
    x: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, low: torch.Tensor, top: torch.Tensor
) -> torch.Tensor:
    """Nearest codes of one column: all fp32[..., rows] -> codes fp32[..., rows] in low..top."""
    return torch.addcdiv(offset, x, step).round_().clamp_(low, top)


def round_nearest(weight: torch.Tensor, grid: Rounding) -> torch.Tensor:
    """Plain rounding, no error feedback: fp32[rows, columns] -> codes uint8[rows, columns]."""
    x = group_columns(weight)
    step, offset, top = (t[:, : x.shape[1], None] for t in (grid.steps(), grid.offsets(), grid.top()))
    codes = (x / step).add_(offset).round_()
    codes = torch.minimum(codes.clamp_(min=0), top)
    return codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8)


def dequantize(codes: torch.Tensor, grid: Rounding) -> torch.Tensor:
    """Codes uint8[rows, columns] back to fp32[rows, columns]; equals what ``PackedWeight.base`` reads from storage.

    (To a rounding of fp32 where float-group codes have 1 bit.)
    """
    step, offset = (t.repeat_interleave(GROUP, 1)[:, : codes.shape[1]] for t in (grid.steps(), grid.offsets()))
    return codes.float().sub_(offset).mul_(step)
