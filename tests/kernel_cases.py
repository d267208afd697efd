"""Inputs for kernels whose results are known exactly, and the oracle.

*Dyadic* data: small integer activations, power-of-two factors.  Every partial sum is a multiple of one unit and stays
below 2**24 of them, hence exact in fp32 in any order, so a kernel has to agree with fp64 bit for bit.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from mixcomp.format import WIDTHS, Segment, SiteFormat
from mixcomp.lowering import gpu
from mixcomp.packed import PackedWeight, pack_codes, pack_scales

EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 257)
UNIT = 2.0**-8


@dataclass(frozen=True)
class Case:
    """One launch: a format, the activations' shape and type, and the seed of everything else."""

    fmt: SiteFormat
    tokens: int
    dtype: torch.dtype
    bias: torch.dtype | None
    seed: int


def random_format(rng: random.Random, columns: int, *, segments: int, most_rows: int, rank: int) -> SiteFormat:
    """Random widths (a width may recur) and rows, one-row segments often."""
    parts = tuple(Segment(rng.choice((1, 1, rng.randint(1, most_rows))), rng.choice(WIDTHS)) for _ in range(segments))
    rows = sum(part.rows for part in parts)
    return SiteFormat(rows, columns, parts, rng.random() < 0.5, min(rank, rows, columns))


def random_weight(fmt: SiteFormat, generator: torch.Generator, *, dyadic: bool) -> PackedWeight:
    """Every code and group scale equally likely, padding included: kernels may not rely on what padding holds."""
    codes = torch.randint(0, 256, (fmt.rows, fmt.padded_columns), generator=generator)
    codes &= (1 << torch.tensor(fmt.row_widths()))[:, None] - 1
    scales = torch.randint(1, 17, (fmt.rows, fmt.groups), generator=generator)
    exponents = torch.randint(-8, -4, (fmt.rows,), generator=generator).float()
    factors = exponents.exp2() if dyadic else torch.rand(fmt.rows, generator=generator) / 512 + 1e-4
    tensors = {
        "codes": pack_codes(codes.to(torch.uint8), fmt),
        "scales": pack_scales(scales.to(torch.uint8)),
        "factors": factors.half(),
    }
    if fmt.scatter:
        tensors["row_index"] = torch.randperm(fmt.rows, generator=generator).to(fmt.index_dtype)
    if fmt.rank:
        most = 3 if dyadic else 127
        for name, shape in (("branch_a", (fmt.rows, fmt.rank)), ("branch_b", (fmt.rank, fmt.columns))):
            tensors[name] = torch.randint(-most, most + 1, shape, generator=generator).to(torch.int8)
        exponents = torch.randint(-8, -5, (fmt.rank,), generator=generator).float()
        tensors["branch_scale"] = exponents.exp2() if dyadic else torch.rand(fmt.rank, generator=generator) * 1e-5
    return PackedWeight.from_tensors(fmt, tensors)


def dyadic(case: Case) -> tuple[PackedWeight, torch.Tensor, torch.Tensor | None]:
    """(weight, x, bias) of a case; every third case reads single weights through one-hot activations."""
    generator = torch.Generator().manual_seed(case.seed)
    weight = random_weight(case.fmt, generator, dyadic=True)
    most = 4 if case.fmt.columns <= 600 else 1
    x = torch.randint(-most, most + 1, (case.tokens, case.fmt.columns), generator=generator).to(case.dtype)
    if case.seed % 3 == 0:
        column = torch.randint(0, case.fmt.columns, (case.tokens, 1), generator=generator)
        x = torch.zeros_like(x).scatter_(1, column, 1.0)
    bias = None
    if case.bias is not None:
        bias = (torch.randint(-64, 65, (case.fmt.rows,), generator=generator) * 0.125).to(case.bias)
    return weight, x, bias


def operands(weight: PackedWeight) -> dict[str, torch.Tensor | None]:
    """The tensors that ``launch.mixed_linear`` takes, by name."""
    words, nibbles = gpu.to_fragments(weight.codes, weight.scales, weight.fmt)
    others = ("factors", "row_index", "branch_a", "branch_b", "branch_scale")
    return {"words": words, "nibbles": nibbles, **{name: getattr(weight, name) for name in others}}


def product(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` in fp64."""
    out = x.double() @ weight.dequantize().double().T
    return out if bias is None else out + bias.double()


def magnitude(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``|x| @ |weight|.T + |bias|`` in fp64, where the parts of a weight (codes, side branch) count apart."""
    parts = weight.base().double().abs()
    if weight.branch_a is not None and weight.branch_b is not None and weight.branch_scale is not None:
        a, b = weight.branch_a.double().abs(), weight.branch_b.double().abs()
        parts += (a * weight.branch_scale.double().abs()) @ b
    if weight.row_index is not None:
        parts = torch.empty_like(parts).index_copy_(0, weight.row_index.long(), parts)
    out = x.double().abs() @ parts.T
    return out if bias is None else out + bias.double().abs()


def exact(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What a kernel must return on dyadic data, in x's type: one rounding of the exact product."""
    if x.shape[0]:
        assert magnitude(weight, x, bias).max() < 2**24 * UNIT, "the case is too large to be exact in fp32"
    return product(weight, x, bias).to(x.dtype)
