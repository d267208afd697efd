"""Float-group scales: an fp16 factor and an integer zero for every row and group, as the papers store them.

Widths 2 to 6 are asymmetric (the range includes 0, so that 0 stays exactly 0), 8 bits are symmetric, 1 bit is a mean and
a mean distance from it.  As in ``quant``, the search uses what will be read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixcomp.format import GROUP
from mixcomp.profiles import group_sizes
from mixcomp.quant import blocks, chunk, clips, group_columns, require_finite

#: fp16 cannot hold smaller positive numbers
_LEAST = 2.0**-24


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """Stored scales of some rows: ``weight = factor * (code - zero)``, at width 1 ``factor * sign + shift``.

    factors and shifts float16[rows, groups], zeros and widths uint8[rows, groups].  ``zeros`` is 0 at 1 and 8 bits, where
    none is stored: at 8 bits it is 128.
    """

    factors: torch.Tensor
    zeros: torch.Tensor
    shifts: torch.Tensor
    widths: torch.Tensor
    group: int = GROUP

    def rows(self, order: torch.Tensor) -> FloatGrid:
        """The rows ``order``."""
        return FloatGrid(self.factors[order], self.zeros[order], self.shifts[order], self.widths[order], self.group)

    def steps(self) -> torch.Tensor:
        """As ``quant.Rounding``."""
        return blocks(self.factors.float() * torch.where(self.widths == 1, 2.0, 1.0), self.group)

    def offsets(self) -> torch.Tensor:
        """As ``quant.Rounding``."""
        signs = 0.5 - self.shifts.float() / (2 * self.factors.float())
        zeros = torch.where(self.widths == 8, 128.0, self.zeros.float())
        return blocks(torch.where(self.widths == 1, signs, zeros), self.group)

    def top(self) -> torch.Tensor:
        """As ``quant.Rounding``."""
        return blocks(torch.exp2(self.widths.float()) - 1, self.group)


def fit_float(
    weight: torch.Tensor,
    energy: torch.Tensor,
    widths: torch.Tensor,
    site: str,
    group: int = GROUP,
    ratios: Sequence[float] = (),
) -> FloatGrid:
    """Factors and zeros by search over clipping ratios, least ``sum_j energy_j (w_j - q_j)^2`` per group.

    Args:
        weight: fp32[rows, columns].
        energy: fp32[columns], diagonal of the input second moments, or [rows, columns], what every weight counts.
        widths: uint8[rows] or [rows, groups].
        site: name for error messages.
        group: columns of a group.
        ratios: shares of the range to try, the first of equals wins; by default those of every width (``quant.clips``).

    Raises:
        WeightError: a group does not fit an fp16 factor.
    """
    sizes = group_sizes(weight.shape[1], group).to(weight.device)
    if widths.dim() == 1:
        widths = widths[:, None].expand(-1, len(sizes)).contiguous()
    rows = chunk(weight, group)
    parts = zip(weight.split(rows), energy.expand_as(weight).split(rows), widths.split(rows), strict=True)
    found = [_fit_rows(group_columns(w, group), group_columns(e, group), own, sizes, ratios) for w, e, own in parts]
    factors, zeros, shifts = (torch.cat(part) for part in zip(*found, strict=True))
    require_finite(factors + shifts.float(), weight, site)
    return FloatGrid(factors, zeros, shifts, widths, group)


def _fit_rows(
    x: torch.Tensor, energy: torch.Tensor, widths: torch.Tensor, sizes: torch.Tensor, ratios: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, energy fp32[rows, groups, group] -> factors fp16, zeros uint8, shifts fp16, each [rows, groups]."""
    symmetric, top = widths == 8, torch.exp2(widths.float()) - 1
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    spread = torch.where(symmetric, torch.maximum(-low, high) / 127, (high - low) / top)
    best, zeros, least = _stored(spread), torch.zeros_like(low), torch.full_like(low, torch.inf)
    for ratio in ratios or clips(widths, 1.0):
        factor = _stored(spread * ratio)
        zero = torch.where(symmetric, 128.0, (-low * ratio / factor).round_().clamp_(min=0).minimum(top))
        level = (x / factor[..., None]).round_().maximum(-zero[..., None]).minimum((top - zero)[..., None])
        loss = ((x - level * factor[..., None]).square() * energy).sum(-1)
        better = loss < least
        best, zeros = torch.where(better, factor, best), torch.where(better, zero, zeros)
        least = torch.where(better, loss, least)
    ones = widths == 1
    shifts = torch.where(ones, x.sum(-1) / sizes, 0.0).half()
    inside = torch.arange(x.shape[-1], device=x.device) < sizes[:, None]
    distance = ((x - shifts.float()[..., None]).abs() * inside).sum(-1) / sizes
    factors = torch.where(ones, _stored(distance), best).half()
    return factors, torch.where(ones | symmetric, 0.0, zeros).to(torch.uint8), shifts


def _stored(factor: torch.Tensor) -> torch.Tensor:
    """fp32 rounded as fp16 will hold it, never 0."""
    return factor.half().float().clamp_min(_LEAST)
