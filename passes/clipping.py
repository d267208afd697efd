"""A float-group weight as a differentiable function of where its ranges are clipped.

    high, low = high_0 * (sigmoid(upper) + 1/2), low_0 * (sigmoid(lower) + 1/2)      per row and group
    factor    = fp16((high + low) / (2^b - 1))                   8 bits: high / 127;    1 bit: high
    weight    = level * factor                                   1 bit: shift +- factor

Levels stay as GPTQ left them, or are rounded anew for every range:

    zero      = clamp(round(low / factor), 0, 2^b - 1)
    level     = clamp(round(place / factor) + zero, 0, 2^b - 1) - zero

The second is OmniQuant's learnable clipping (Shao et al. 2024, section 3.2) as SliM-LLM+ uses it.  Roundings pass
gradients straight through, here with the factor and the zero rounded as they will be stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from mixcomp.format import SiteFormat
from mixcomp.packed import PackedWeight, pack_codes, pack_zeros, unpack_zeros
from mixcomp.passes.tunable import nearest_place
from mixcomp.program import Program, Site
from mixcomp.quant import group_columns


@dataclass(slots=True, eq=False)
class Clipped:
    """One quantized float-group site, rows and columns in stored order.

    What is learned: ``upper`` and ``lower`` fp32[rows, groups], 0 at the start, where ``high`` and ``low`` are the ends of
    the stored ranges.  ``zero`` fp32[rows, groups, 1] and ``level`` fp32[rows, groups, group] are the stored ones;
    ``place``, of the same shape, is rounded anew at every step, or None.  ``shift`` is the middle of groups of one bit.
    ``rows`` and ``columns`` are int64 positions in stored order of every output and input feature, None where nothing
    moved; ``branch`` fp32[rows, columns] is the side branch's product, which stays.
    """

    fmt: SiteFormat
    dtype: torch.dtype
    zero: torch.Tensor
    level: torch.Tensor
    place: torch.Tensor | None
    shift: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    widths: torch.Tensor
    group_index: torch.Tensor | None
    branch: torch.Tensor | None
    rows: torch.Tensor | None
    columns: torch.Tensor | None
    upper: torch.Tensor
    lower: torch.Tensor

    @classmethod
    def of(cls, program: Program, site: Site, device: torch.device, *, anew: bool) -> Clipped:
        """The stored state of a quantized site as the start; ``anew``: round again for every range.

        Places lie as close to the original weights as the stored codes allow.
        """
        fmt = site.layout
        stored = PackedWeight.from_tensors(fmt, {k: program.tensor(site.name, k).to(device) for k in fmt.tensors()})
        widths, factors = stored.group_widths(), stored.factors.float()
        ones, symmetric, top = _kinds(widths)
        zeros = torch.zeros_like(widths) if stored.zeros is None else unpack_zeros(stored.zeros, fmt)
        shift = stored.group_offsets().float()
        weight, positions = program.scaled_weight(site, device), []
        for axis, what in enumerate(("row_order", "column_order")):
            order = program.find(site.name, what)
            weight = weight if order is None else weight.index_select(axis, order.to(device))
            positions.append(None if order is None else order.to(device).argsort())
        codes = group_columns(stored.unpacked()[:, : fmt.columns].float(), fmt.group)
        zero = torch.where(symmetric, 128.0, zeros.float())[..., None]
        place = None
        if anew:
            step = torch.where(ones, 2 * factors, factors)[..., None]
            offset = torch.where(ones[..., None], 0.5 - shift[..., None] / step, zero)
            exact = group_columns(weight, fmt.group) / step + offset
            place = (nearest_place(exact, codes, top[..., None]) - offset) * step
        return cls(
            fmt=fmt,
            dtype=site.weight.dtype,
            zero=zero,
            level=torch.where(ones[..., None], 2 * codes - 1, codes - zero),
            place=place,
            shift=shift,
            high=factors * torch.where(symmetric, 127, top - zeros),
            low=torch.where(ones | symmetric, 0.0, factors * zeros),
            widths=widths,
            group_index=stored.group_index,
            branch=stored.side(),
            rows=positions[0],
            columns=positions[1],
            upper=torch.zeros_like(factors),
            lower=torch.zeros_like(factors),
        )

    def learned(self) -> dict[str, torch.Tensor]:
        """The tensors to change, by name."""
        return {"upper": self.upper, "lower": self.lower}

    def weight(self) -> torch.Tensor:
        """What the site multiplies with, in the model's dtype[rows, columns], in the order of its features."""
        factor, _, level = self._numbers()
        out = (level * factor + self.shift[..., None]).flatten(1)[:, : self.fmt.columns]
        out = (out if self.branch is None else out + self.branch).to(self.dtype)
        out = out if self.rows is None else out[self.rows]
        return out if self.columns is None else out[:, self.columns]

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """codes, factors and zeros to store."""
        factor, zero, level = self._numbers()
        ones, symmetric, _ = _kinds(self.widths)
        codes = torch.where(ones[..., None], (level + 1) / 2, level + zero).flatten(1)[:, : self.fmt.columns]
        codes = pad(codes.to(torch.uint8), (0, self.fmt.padded_columns - self.fmt.columns))
        out = {"codes": pack_codes(codes, self.fmt, self.group_index), "factors": factor[..., 0].half()}
        if "zeros" in self.fmt.tensors():
            out["zeros"] = pack_zeros(torch.where(ones | symmetric, 0, zero[..., 0]).to(torch.uint8), self.fmt)
        return out

    def _numbers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """factor and zero fp32[rows, groups, 1], level fp32[rows, groups, group]."""
        ones, symmetric, top = (t[..., None] for t in _kinds(self.widths))
        high, low = self.high * (self.upper.sigmoid() + 0.5), self.low * (self.lower.sigmoid() + 0.5)
        exact = (high + low)[..., None] / torch.where(symmetric, 127, top)
        factor, least = _straight(exact, _stored(exact)), torch.zeros_like(top)
        if self.place is None:
            return factor, self.zero, self.level
        zero = torch.where(symmetric, 128, _round(low[..., None] / factor).clamp(least, top))
        level = (_round(self.place / factor) + zero).clamp(least, top) - zero
        return factor, zero, torch.where(ones, torch.where(self.place >= self.shift[..., None], 1, -1), level)


def _kinds(widths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whether a group has one bit, whether it has a fixed zero, and its largest code fp32; all of widths' shape."""
    return widths == 1, widths == 8, torch.exp2(widths.float()) - 1


def _stored(factor: torch.Tensor) -> torch.Tensor:
    return factor.half().to(factor.dtype).clamp_min(2.0**-24)  # what fp16 can hold


def _round(x: torch.Tensor) -> torch.Tensor:
    return _straight(x, x.round())


def _straight(exact: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """``used``, with the gradient of ``exact``."""
    return exact + (used - exact).detach()
