"""Compiled weights drawn at random, with what they mean computed straight from what was drawn, not from the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixcomp.format import GROUP, Segment, SiteFormat
from mixcomp.packed import PackedWeight, pack_codes, pack_scales

#: unit roundoff
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Case:
    """A site and its meaning: fp64[rows, columns] in output order, codes and side branch apart."""

    weight: PackedWeight
    base: torch.Tensor
    side: torch.Tensor
    bias: torch.Tensor | None

    def activations(self, *leading: int, dyadic: bool = False, seed: int = 1) -> torch.Tensor:
        """fp32[*leading, columns]; dyadic: integers in -4..4."""
        draw = torch.Generator().manual_seed(seed)
        shape = (*leading, self.weight.fmt.columns)
        return torch.randint(-4, 5, shape, generator=draw).float() if dyadic else torch.randn(shape, generator=draw)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The exact result, fp64; on dyadic data every partial sum is an integer below 2**53."""
        out = x.double() @ (self.base + self.side).t()
        return out if self.bias is None else out + self.bias.double()

    def bound(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What a path may be off, elementwise: 2 g(n) |x| |W|, and one rounding to ``dtype``.

        n counts the terms of a sum; |W| adds up codes and side branch, which are summed apart and may cancel.
        """
        fmt = self.weight.fmt
        n = fmt.columns + fmt.rank + 1
        growth = n * UNIT[torch.float32] / (1 - n * UNIT[torch.float32])
        size = x.double().abs() @ (self.base.abs() + _abs_side(self.weight)).t()
        if self.bias is not None:
            size += self.bias.double().abs()
        return 2 * growth * size + UNIT[dtype] * self.product(x).abs()


def case(
    segments: Sequence[tuple[int, int]],
    columns: int,
    *,
    scatter: bool = False,
    rank: int = 0,
    bias: bool = False,
    dyadic: bool = False,
    seed: int = 0,
) -> Case:
    """A site with random codes.  Dyadic: sums of products with integers in -4..4 are exact in fp32, in any order."""
    draw = torch.Generator().manual_seed(seed)
    rows = sum(n for n, _ in segments)
    fmt = SiteFormat(rows, columns, tuple(Segment(*s) for s in segments), scatter, rank)
    widths = torch.tensor(fmt.row_widths())[:, None]
    codes = torch.randint(0, 256, (rows, fmt.padded_columns), generator=draw) % 2**widths
    codes[:, columns:] = 0
    m = torch.randint(1, 17, (rows, fmt.groups), generator=draw)
    factors = torch.rand(rows, generator=draw).half() / 100 + 2.0**-10
    if dyadic:
        factors = torch.exp2(torch.randint(-4, -1, (rows,), generator=draw)).half()
    tensors = {
        "codes": pack_codes(codes.to(torch.uint8), fmt),
        "scales": pack_scales(m.to(torch.uint8)),
        "factors": factors,
    }
    target = torch.arange(rows)
    if scatter:
        target = torch.randperm(rows, generator=draw)
        tensors["row_index"] = target.to(fmt.index_dtype)
    if rank:
        most = 3 if dyadic else 127
        tensors["branch_a"] = torch.randint(-most, most + 1, (rows, rank), generator=draw).to(torch.int8)
        tensors["branch_b"] = torch.randint(-most, most + 1, (rank, columns), generator=draw).to(torch.int8)
        tensors["branch_scale"] = torch.full((rank,), 2.0**-4) if dyadic else torch.rand(rank, generator=draw) / 1000
    offsets = torch.randint(-8, 9, (rows,), generator=draw) / 4 if dyadic else torch.randn(rows, generator=draw)
    level = torch.where(widths == 8, codes - 128, 2 * codes - (2**widths - 1))
    stored = (level * m.repeat_interleave(GROUP, 1)).double()[:, :columns] * factors.double()[:, None]
    base = torch.empty_like(stored)
    base[target] = stored
    weight = PackedWeight.from_tensors(fmt, tensors)
    return Case(weight, base, _side(weight, target), offsets if bias else None)


def _side(weight: PackedWeight, target: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(weight.fmt.rows, weight.fmt.columns, dtype=torch.float64)
    if weight.branch_a is not None and weight.branch_b is not None and weight.branch_scale is not None:
        out[target] = (weight.branch_a.double() * weight.branch_scale.double()) @ weight.branch_b.double()
    return out


def _abs_side(weight: PackedWeight) -> torch.Tensor:
    """|A| |scale| |B| in output order."""
    out = torch.zeros(weight.fmt.rows, weight.fmt.columns, dtype=torch.float64)
    if weight.branch_a is not None and weight.branch_b is not None and weight.branch_scale is not None:
        size = (weight.branch_a.double() * weight.branch_scale.double()).abs() @ weight.branch_b.double().abs()
        target = slice(None) if weight.row_index is None else weight.row_index.long()
        out[target] = size
    return out
