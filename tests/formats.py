"""Compiled weights in every form that can be stored, with what they mean computed element by element in fp64.

Nothing here reads bytes: the meaning comes from the numbers that were drawn, by the formulas of ``mixcomp.format``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from mixcomp.format import ALL_WIDTHS, GROUPS, ZERO_WIDTHS, Scales, SiteFormat
from mixcomp.packed import PackedWeight, pack_codes, pack_scales, pack_zeros
from mixcomp.profiles import layout

#: columns around groups of 32, 64 and 128, and those that no group divides
COLUMNS = (1, 31, 33, 64, 70, 129, 160, 300)


@dataclass(frozen=True)
class Drawn:
    """A stored weight and the numbers behind it, rows in stored and columns in original order."""

    weight: PackedWeight
    widths: torch.Tensor
    codes: torch.Tensor
    zeros: torch.Tensor
    base: torch.Tensor

    def output(self) -> torch.Tensor:
        """fp64[rows, columns] in output order, side branch included."""
        w, out = self.weight, self.base.clone()
        if w.branch_a is not None and w.branch_b is not None and w.branch_scale is not None:
            out += (w.branch_a.double() * w.branch_scale.double()) @ w.branch_b.double()
        if w.row_index is None:
            return out
        moved = torch.empty_like(out)
        moved[w.row_index.long()] = out
        return moved


def draw(
    widths: torch.Tensor,
    columns: int,
    *,
    group: int = 32,
    scales: Scales = Scales.TWO_LEVEL,
    scatter: bool = False,
    rank: int = 0,
    dyadic: bool = False,
    seed: int = 0,
) -> Drawn:
    """Random codes and scales for widths uint8[rows] or [rows, groups] of stored rows.

    Dyadic: sums of products with integers in -4..4 are exact in fp32, in any order.
    """
    random = torch.Generator().manual_seed(seed)
    segments, index = layout(widths, columns, group)
    fmt = SiteFormat(len(widths), columns, segments, scatter, rank, group, scales)
    each = widths if widths.dim() == 2 else widths[:, None].expand(-1, fmt.groups)
    wide = each.long().repeat_interleave(group, 1)[:, : fmt.padded_columns]
    codes = torch.randint(0, 256, wide.shape, generator=random) % 2**wide
    codes[:, columns:] = 0
    shape = (fmt.rows, fmt.groups) if scales is Scales.FLOAT_GROUP else (fmt.rows,)
    factors = torch.rand(shape, generator=random) / 100 + 2.0**-10
    if dyadic:
        factors = torch.exp2(torch.randint(-4, -1, shape, generator=random).float())
    tensors = {"codes": pack_codes(codes.to(torch.uint8), fmt, index), "factors": factors.half()}
    m = torch.randint(1, 17, each.shape, generator=random)
    zeros = torch.randint(0, 64, each.shape, generator=random) % 2 ** each.long()
    zeros *= torch.isin(each, torch.tensor(ZERO_WIDTHS))
    offsets = torch.randint(-8, 9, each.shape, generator=random) / 8
    if scales is Scales.TWO_LEVEL:
        tensors["scales"] = pack_scales(m.to(torch.uint8))
    else:
        tensors["zeros"] = pack_zeros(zeros.to(torch.uint8), fmt)
        tensors["offsets"] = offsets[each == 1].half()
    if index is not None:
        tensors["group_index"] = index.to(fmt.tensors()["group_index"][0])
    if scatter:
        tensors["row_index"] = torch.randperm(fmt.rows, generator=random).to(fmt.index_dtype)
    if rank:
        tensors["branch_a"] = torch.randint(-3, 4, (fmt.rows, rank), generator=random).to(torch.int8)
        tensors["branch_b"] = torch.randint(-3, 4, (rank, columns), generator=random).to(torch.int8)
        tensors["branch_scale"] = torch.full((rank,), 2.0**-4)
    weight = PackedWeight.from_tensors(fmt, {name: tensors[name] for name in fmt.tensors()})
    numbers = _Numbers(each.long(), m, zeros, offsets.double(), weight.factors.double())
    return Drawn(weight, each, codes, zeros, _meaning(fmt, codes, numbers)[:, :columns])


@dataclass(frozen=True)
class _Numbers:
    """Per row and group."""

    widths: torch.Tensor
    m: torch.Tensor
    zeros: torch.Tensor
    offsets: torch.Tensor
    factors: torch.Tensor


def _meaning(fmt: SiteFormat, codes: torch.Tensor, of: _Numbers) -> torch.Tensor:
    def column(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(fmt.group, 1)[:, : fmt.padded_columns]

    width = column(of.widths)
    if fmt.scales is Scales.FLOAT_GROUP:
        zero = torch.where(width == 8, 128, column(of.zeros))
        signs = (2 * codes - 1) * column(of.factors) + column(of.offsets)
        return torch.where(width == 1, signs, (codes - zero) * column(of.factors))
    level = torch.where(width == 8, (codes - 128).double(), codes - (2**width - 1) / 2.0)  # in steps
    mixes = (of.widths != of.widths[:, :1]).any(1, keepdim=True)
    step = torch.where(width == 8, 1.0, 2.0)
    step = torch.where(mixes, 2.0 ** (1 - width.double()), step)
    return level * step * column(of.m) * of.factors[:, None]


@st.composite
def drawn(draw_: st.DrawFn, dyadic: bool = False) -> Drawn:
    """Any form: few or many profiles, all widths, groups, scales, odd columns, scatter, side branch."""
    group, columns = draw_(st.sampled_from(GROUPS)), draw_(st.sampled_from(COLUMNS))
    rows = draw_(st.integers(1, 9))
    widths = draw_(width_tables(rows, -(-columns // group)))
    rank = draw_(st.integers(0, min(2, rows, columns)))
    scales, scatter = draw_(st.sampled_from(Scales)), draw_(st.booleans())
    seed = draw_(st.integers(0, 2**16))
    return draw(widths, columns, group=group, scales=scales, scatter=scatter, rank=rank, dyadic=dyadic, seed=seed)


@st.composite
def width_tables(draw_: st.DrawFn, rows: int, groups: int) -> torch.Tensor:
    """uint8[rows] or [rows, groups] in runs of equal rows."""
    random = torch.Generator().manual_seed(draw_(st.integers(0, 2**16)))
    allowed = torch.tensor(draw_(st.lists(st.sampled_from(ALL_WIDTHS), min_size=1, max_size=4)), dtype=torch.uint8)
    shape = (rows,) if draw_(st.booleans()) else (draw_(st.integers(1, 3)), groups)
    found = allowed[torch.randint(len(allowed), shape, generator=random)]
    return found if len(shape) == 1 else found[torch.randint(shape[0], (rows,), generator=random).sort().values]


def with_tensor(weight: PackedWeight, name: str, tensor: torch.Tensor) -> PackedWeight:
    """The weight with one stored tensor exchanged."""
    return replace(weight, **{name: tensor})
