"""A quantized weight as a differentiable function of its rounding and its scales.

    code   = clamp(round(place), 0, top)                     place: where in the grid the weight lies, in codes
    step   = unit * factor * exp(ratio) * m                  ratio: per row
    m      = clamp(round(group), 1, 16)                      group: per row and group
    weight = (code - offset) * step

``round`` passes gradients straight through (Bengio et al. 2013), inside the clamps only.  Scales do not move the places:
otherwise a slight change of a scale would round many weights anew.  The start is the stored weight itself, every place
as close to the original weight as its code allows: a weight that GPTQ moved away from its nearest level lies at the edge
of its cell, and one that it left alone where it always was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mixcomp.format import MAX_GROUP_SCALE, SiteFormat
from mixcomp.packed import PackedWeight, pack_codes, pack_scales, unpack_codes, unpack_scales
from mixcomp.program import Program, Site
from mixcomp.quant import Grid, group_columns

#: how far inside its cell a moved weight starts, in steps; not measured by itself
MARGIN = 1e-3


@dataclass(slots=True, eq=False)
class Tunable:
    """One quantized site, rows and columns in stored order.

    What is learned: ``ratio`` fp32[rows, 1], ``group`` fp32[rows, groups] and, where rounding is learned too, ``place``
    fp32[rows, groups, 32]; otherwise ``codes`` uint8[rows, groups, 32] stay.
    ``rows`` and ``columns`` are int64 positions in stored order of every output and input feature, None where nothing
    moved; ``branch`` fp32[rows, columns] is the side branch's product, which stays.
    """

    fmt: SiteFormat
    dtype: torch.dtype
    factor: torch.Tensor
    offset: torch.Tensor
    top: torch.Tensor
    unit: torch.Tensor
    branch: torch.Tensor | None
    rows: torch.Tensor | None
    columns: torch.Tensor | None
    ratio: torch.Tensor
    group: torch.Tensor
    codes: torch.Tensor | None
    place: torch.Tensor | None

    @classmethod
    def of(cls, program: Program, site: Site, device: torch.device, *, rounding: bool) -> Tunable:
        """The stored state of a quantized site as the start; ``rounding``: whether codes may change."""
        fmt = site.layout
        stored = PackedWeight.from_tensors(fmt, {k: program.tensor(site.name, k).to(device) for k in fmt.tensors()})
        widths = torch.tensor(fmt.row_widths(), dtype=torch.uint8, device=device)
        grid = Grid(stored.factors, unpack_scales(program.tensor(site.name, "scales").to(device), fmt.groups), widths)
        order = {what: program.find(site.name, f"{what}_order") for what in ("row", "column")}
        rows, columns = (None if o is None else o.to(device) for o in order.values())
        codes = unpack_codes(stored.codes, fmt).view(fmt.rows, fmt.groups, -1)
        offset, top = grid.offsets()[:, :1, None], grid.top()[:, :1, None]
        place = None
        if rounding:
            weight = program.weight(site).detach().to(device, torch.float32)
            weight = weight if columns is None else weight[:, columns]
            weight = group_columns(weight if rows is None else weight[rows])
            place = nearest_place(weight / grid.steps()[..., None] + offset, codes.float(), top)
        return cls(
            fmt=fmt,
            dtype=site.weight.dtype,
            factor=grid.factors.float()[:, None],
            offset=offset,
            top=top,
            unit=torch.where(widths == 8, 1.0, 2.0)[:, None],
            branch=stored.side(),
            rows=None if rows is None else _inverse(rows),
            columns=None if columns is None else _inverse(columns),
            ratio=torch.zeros(fmt.rows, 1, device=device),
            group=grid.scales.float(),
            codes=None if rounding else codes,
            place=place,
        )

    def learned(self) -> dict[str, torch.Tensor]:
        """The tensors to change, by name."""
        found = {"ratio": self.ratio, "group": self.group, "place": self.place}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def weight(self) -> torch.Tensor:
        """What the site multiplies with, in the model's dtype[rows, columns], in the order of its features."""
        m = _round(self.group).clamp(1, MAX_GROUP_SCALE)
        step = (self.unit * self.factor * self.ratio.exp() * m)[..., None]
        out = ((self._codes() - self.offset) * step).flatten(1)[:, : self.fmt.columns]
        out = (out if self.branch is None else out + self.branch).to(self.dtype)
        out = out if self.rows is None else _permuted(out, self.rows, 0)
        return out if self.columns is None else _permuted(out, self.columns, 1)

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """codes, scales and factors to store."""
        factors = (self.factor * self.ratio.exp())[:, 0].half()
        scales = self.group.round().clamp(1, MAX_GROUP_SCALE)
        codes = self._codes().flatten(1).to(torch.uint8)
        codes[:, self.fmt.columns :] = 0
        return {"codes": pack_codes(codes, self.fmt), "scales": pack_scales(scales.to(torch.uint8)), "factors": factors}

    def _codes(self) -> torch.Tensor:
        if self.place is not None:
            return _round(self.place).clamp(torch.zeros_like(self.top), self.top)
        assert self.codes is not None  # noqa: S101
        return self.codes


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """A site stored in a form that nothing is learned for yet: the papers' formats.  ``fixed`` is its weight."""

    fixed: torch.Tensor

    @classmethod
    def of(cls, program: Program, site: Site, device: torch.device) -> Settled:
        """The stored weight, rows and columns where the original has them."""
        names = site.layout.tensors()
        stored = PackedWeight.from_tensors(site.layout, {k: program.tensor(site.name, k).to(device) for k in names})
        weight = stored.dequantize()
        rows, columns = program.find(site.name, "row_order"), program.find(site.name, "column_order")
        if rows is not None and not site.layout.scatter:
            weight = weight[_inverse(rows.to(device))]
        weight = weight if columns is None else weight[:, _inverse(columns.to(device))]
        return cls(weight.to(site.weight.dtype))

    def learned(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def weight(self) -> torch.Tensor:
        """What the site multiplies with."""
        return self.fixed

    def stored(self) -> dict[str, torch.Tensor]:
        """Nothing new."""
        return {}


class Quantized(Protocol):
    """A quantized site in a descent: ``Tunable``, ``Settled`` and others."""

    def learned(self) -> dict[str, torch.Tensor]:
        """The tensors to change, by name."""

    def weight(self) -> torch.Tensor:
        """What the site multiplies with, in the model's dtype[rows, columns], in the order of its features."""

    def stored(self) -> dict[str, torch.Tensor]:
        """What to store of it anew."""


def stored_tensors(tuned: Mapping[str, Quantized]) -> dict[str, torch.Tensor]:
    """What goes into the program's table for these sites."""
    return {f"{name}/{key}": value for name, one in tuned.items() for key, value in one.stored().items()}


def nearest_place(exact: torch.Tensor, codes: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The place in codes next to ``exact`` that still rounds to ``codes``, all fp32 of one shape; ``top``: largest code."""
    inside = torch.maximum(torch.minimum(exact, codes + 0.5 - MARGIN), codes - 0.5 + MARGIN)
    beyond = ((codes == 0) & (exact < 0)) | ((codes == top) & (exact > top))
    return torch.where(beyond, exact, inside)  # the clamp keeps these where they are


class _Permute(torch.autograd.Function):
    """``index_select`` by a permutation, whose gradient is one too: torch's own would sort and add."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.order, ctx.dim = order, dim
        return x.index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.index_select(ctx.dim, _inverse(ctx.order)), None, None


def _permuted(x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
    out: torch.Tensor = _Permute.apply(x, order, dim)  # type: ignore[no-untyped-call]
    return out


def _round(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()


def _inverse(order: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
