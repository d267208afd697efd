"""A quantized weight as a differentiable function of its rounding and its scales.

    code   = clamp(round(place), 0, top)                     place: where in the grid the weight lies, in codes
    step   = unit * fp16(factor * exp(ratio)) * m            ratio: per row
    m      = clamp(round(group), 1, 16)                      group: per row and group
    weight = (code - offset) * step + branch
    branch = int8(a) * scale * exp(ratio) @ int8(b)          ratio: per rank
    norm   = dtype(start + unit * shift)                     shift: per feature

Rounding passes gradients straight through (Bengio et al. 2013), inside the clamps only.  Scales do not move the places:
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
class Branch:
    """A side branch, rows and columns in stored order: ``a`` fp32[rows, rank] and ``b`` fp32[rank, columns] in steps of
    int8, ``scale`` and the logarithm ``ratio`` of what it is multiplied by fp32[rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor
    ratio: torch.Tensor

    @classmethod
    def of(cls, stored: PackedWeight) -> Branch | None:
        """The stored pair as the start, None where there is none."""
        if stored.branch_a is None or stored.branch_b is None or stored.branch_scale is None:
            return None
        scale = stored.branch_scale
        return cls(stored.branch_a.float(), stored.branch_b.float(), scale, torch.zeros_like(scale))

    def learned(self) -> dict[str, torch.Tensor]:
        """The tensors to change, by name."""
        return {"branch_a": self.a, "branch_b": self.b, "branch_ratio": self.ratio}

    def product(self) -> torch.Tensor:
        """fp32[rows, columns], bit for bit ``PackedWeight.side`` of what is stored."""
        a, b = (_round(x).clamp(-127, 127) for x in (self.a, self.b))
        return (a * (self.scale * self.ratio.exp())) @ b

    def stored(self) -> dict[str, torch.Tensor]:
        """Its three tensors to store."""
        a, b = (x.round().clamp(-127, 127).to(torch.int8) for x in (self.a, self.b))
        return {"branch_a": a, "branch_b": b, "branch_scale": self.scale * self.ratio.exp()}


@dataclass(slots=True, eq=False)
class Tunable:
    """One quantized site, rows and columns in stored order.

    What is learned: ``ratio`` fp32[rows, 1], ``group`` fp32[rows, groups], the side ``branch`` and, where rounding is
    learned too, ``place`` fp32[rows, groups, 32]; otherwise ``codes`` uint8[rows, groups, 32] stay.
    ``rows`` and ``columns`` are int64 positions in stored order of every output and input feature, None where nothing
    moved.
    """

    fmt: SiteFormat
    dtype: torch.dtype
    factor: torch.Tensor
    offset: torch.Tensor
    top: torch.Tensor
    unit: torch.Tensor
    branch: Branch | None
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
            weight = program.scaled_weight(site, device)
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
            branch=Branch.of(stored),
            rows=None if rows is None else _inverse(rows),
            columns=None if columns is None else _inverse(columns),
            ratio=torch.zeros(fmt.rows, 1, device=device),
            group=grid.scales.float(),
            codes=None if rounding else codes,
            place=place,
        )

    def learned(self) -> dict[str, torch.Tensor]:
        """The tensors to change, by name."""
        found = {"ratio": self.ratio, "group": self.group} | (self.branch.learned() if self.branch else {})
        return found if self.place is None else found | {"place": self.place}

    def weight(self) -> torch.Tensor:
        """What the site multiplies with, in the model's dtype[rows, columns], in the order of its features."""
        m = _round(self.group).clamp(1, MAX_GROUP_SCALE)
        factor = self.factor * self.ratio.exp()
        factor = factor + (factor.half().float() - factor).detach()
        out = ((self._codes() - self.offset) * (self.unit * factor * m)[..., None]).flatten(1)[:, : self.fmt.columns]
        out = (out if self.branch is None else out + self.branch.product()).to(self.dtype)
        out = out if self.rows is None else _permuted(out, self.rows, 0)
        return out if self.columns is None else _permuted(out, self.columns, 1)

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """codes, scales, factors and side branch to store."""
        factors = (self.factor * self.ratio.exp())[:, 0].half()
        scales = self.group.round().clamp(1, MAX_GROUP_SCALE)
        codes = self._codes().flatten(1).to(torch.uint8)
        codes[:, self.fmt.columns :] = 0
        made = {"codes": pack_codes(codes, self.fmt), "scales": pack_scales(scales.to(torch.uint8)), "factors": factors}
        return made | (self.branch.stored() if self.branch else {})

    def _codes(self) -> torch.Tensor:
        if self.place is not None:
            return _round(self.place).clamp(torch.zeros_like(self.top), self.top)
        assert self.codes is not None  # noqa: S101
        return self.codes


@dataclass(slots=True, eq=False)
class Norm:
    """A norm's weight or bias: ``shift`` fp32[n] in units of the root mean square of ``start``, its value floating[n]."""

    start: torch.Tensor
    unit: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, start: torch.Tensor) -> Norm:
        """The value as the start.  One that is all zeros, a bias or an offset from 1, is measured in ones."""
        size = start.float().square().mean().sqrt()
        return cls(start, torch.where(size > 0, size, 1.0), torch.zeros_like(start, dtype=torch.float32))

    def learned(self) -> dict[str, torch.Tensor]:
        """The tensor to change, by name."""
        return {"norm": self.shift}

    def weight(self) -> torch.Tensor:
        """The value, in its own dtype[n]: a cast passes gradients straight through."""
        return (self.start.float() + self.unit * self.shift).to(self.start.dtype)

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """The value to store."""
        return {"norm": self.weight()}


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """What nothing is learned of: a site in the papers' formats, a norm learned before.  ``fixed`` is its weight."""

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
    """A quantized site or a norm in a descent: ``Tunable``, ``Norm``, ``Settled`` and others."""

    def learned(self) -> dict[str, torch.Tensor]:
        """The tensors to change, by name."""

    def weight(self) -> torch.Tensor:
        """What the site multiplies with, in the model's dtype[rows, columns], in the order of its features."""

    def stored(self) -> dict[str, torch.Tensor]:
        """What to store of it anew."""


def stored_tensors(tuned: Mapping[str, Quantized]) -> dict[str, torch.Tensor]:
    """What goes into the program's table for these sites and norms."""
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
