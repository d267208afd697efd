"""A quantized weight as a differentiable function of its rounding and its scales.

    code   = clamp(round(w / step + offset + v), 0, top)                  v: where rounding goes, per weight
    step   = unit * factor * exp(r) * m                                   r: per row
    m      = clamp(round(group), 1, 16)                                   group: per row and group
    weight = (code - offset) * step

``round`` passes gradients straight through (Bengio et al. 2013), inside the clamps only.  The start is the stored weight
itself: v is the smallest shift with which every code comes out as it is stored, so a weight that GPTQ moved away from
its nearest level lies at the edge of its cell, and one that it left alone where it always was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mixcomp.format import GROUP, MAX_GROUP_SCALE, SiteFormat
from mixcomp.packed import PackedWeight, pack_codes, pack_scales, unpack_codes, unpack_scales
from mixcomp.program import Program, Site
from mixcomp.quant import Grid, group_columns

#: how far inside its cell a shifted weight starts, in steps
MARGIN = 1e-3


@dataclass(slots=True, eq=False)
class Tunable:
    """One site, rows and columns in stored order.

    ``target`` fp32[rows, groups, 32] is the original weight, ``shift`` (the same shape), ``ratio`` fp32[rows, 1] and
    ``group`` fp32[rows, groups] are what is learned; ``branch`` is the side branch's product, fixed.
    """

    fmt: SiteFormat
    target: torch.Tensor
    factor: torch.Tensor
    offset: torch.Tensor
    top: torch.Tensor
    unit: torch.Tensor
    branch: torch.Tensor | None
    rows: torch.Tensor | None  # stored row of every output feature
    columns: torch.Tensor | None  # stored column of every input feature
    shift: torch.Tensor
    ratio: torch.Tensor
    group: torch.Tensor
    codes: torch.Tensor | None = None

    @torch.no_grad()
    def freeze(self) -> None:
        """From now on codes stay as they are."""
        self.codes = self._codes(self.steps())

    def _codes(self, step: torch.Tensor) -> torch.Tensor:
        if self.codes is not None:
            return self.codes
        return _round(self.target / step + self.offset + self.shift).clamp(torch.zeros_like(self.top), self.top)

    @classmethod
    def of(cls, program: Program, site: Site, device: torch.device, margin: float = MARGIN) -> Tunable:
        """The stored state of a quantized site as the start."""
        fmt = site.layout
        stored = PackedWeight(fmt, **{k: program.tensor(site.name, k).to(device) for k in fmt.tensors()})
        weight = program.weight(site).detach().to(device, torch.float32)
        rows, columns = (_moved(program.find(site.name, f"{what}_order"), device) for what in ("row", "column"))
        weight = weight if columns is None else weight[:, columns]
        weight = group_columns(weight if rows is None else weight[rows])
        widths = torch.tensor(fmt.row_widths(), dtype=torch.uint8, device=device)
        grid = Grid(stored.factors, unpack_scales(stored.scales, fmt.groups), widths)
        offset, top = grid.offsets()[:, None, None], grid.top()[:, None, None]
        codes = unpack_codes(stored.codes, fmt).float().view_as(weight)
        exact = weight / grid.steps()[..., None] + offset
        shift = torch.maximum(torch.minimum(exact, codes + 0.5 - margin), codes - 0.5 + margin) - exact
        shift[codes.eq(0) & (exact < 0)] = 0  # beyond the last level nothing has to be shifted
        shift[codes.eq(top) & (exact > top)] = 0
        return cls(
            fmt, weight, grid.factors.float()[:, None], offset, top, torch.where(widths == 8, 1.0, 2.0)[:, None],
            stored.side(), *(None if order is None else _inverse(order) for order in (rows, columns)),
            shift, torch.zeros_like(grid.factors, dtype=torch.float32)[:, None], grid.scales.float(),
        )  # fmt: skip

    def steps(self) -> torch.Tensor:
        """fp32[rows, groups, 1]."""
        m = _round(self.group).clamp(1, MAX_GROUP_SCALE)
        return (self.unit * self.factor * self.ratio.exp() * m)[..., None]

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """What the site multiplies with, dtype[rows, columns] in canonical order."""
        step = self.steps()
        out = ((self._codes(step) - self.offset) * step).flatten(1)[:, : self.fmt.columns]
        out = (out if self.branch is None else out + self.branch).to(dtype)
        out = out if self.rows is None else _Permute.apply(out, self.rows, 0)
        return out if self.columns is None else _Permute.apply(out, self.columns, 1)

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors to store, after the factor's own rounding to fp16."""
        factors = (self.factor * self.ratio.exp())[:, 0].half()
        scales = self.group.round().clamp(1, MAX_GROUP_SCALE)
        step = (self.unit * factors.float()[:, None] * scales)[..., None]
        codes = self._codes(step).flatten(1).to(torch.uint8)
        codes[:, self.fmt.columns :] = 0
        return {"codes": pack_codes(codes, self.fmt), "scales": pack_scales(scales.to(torch.uint8)), "factors": factors}


class _Permute(torch.autograd.Function):
    """``index_select`` by a permutation, whose gradient is one too: torch's own would sort and add."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.order, ctx.dim = order, dim
        return x.index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.index_select(ctx.dim, _inverse(ctx.order)), None, None


def _round(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()


def _moved(order: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if order is None else order.to(device)


def _inverse(order: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
