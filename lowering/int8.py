"""What ``activations="int8"`` means, in plain torch: products of many tokens with 8-bit integers.

**Rows** (two-level scales).  Both sides become integers with one scale a token and one a row, so that all that is added
up is exact::

    y[t, r] = a[t] b[r] sum over c of p[t, c] q[r, c]        a = max |x[t]| / 127,   p = round(x / a)
                                                             b = factor u,           q = floor(m level / u + 1/2)

with u = 512 / F, which depends on the row's width alone (``packed.INT8_FACTORS``): next to no row has a largest integer far
below that of its width.  Rows of 2 and 3 bits lose nothing; at 4 bits u is 1.9, and the levels of a group are 2 m apart.

**Groups** (float-group scales), as MixLLM publishes (arXiv 2412.14590): weights as they are stored, activations with an
fp16 scale for every token and 128 columns.

Few tokens (``select.MAX_FUSED_TOKENS``) are never rounded: there, reading the weight is what takes the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from mixcomp.format import Scales
from mixcomp.lowering import reference
from mixcomp.packed import INT8_FACTORS, INT8_ONE, INT8_TOP

if TYPE_CHECKING:
    from mixcomp.packed import PackedWeight

#: columns of activations that share a scale beside float-group weights
GROUP = 128
#: least number that a token is scaled by: one of zeros needs some scale
TINY = 2.0**-100
#: columns whose products add up exactly in fp32: 1024 * 127 * 127 < 2**24
EXACT = 1024


def mixed_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ W^T + bias`` in the form of the weight's scales; x floating[tokens, columns], as in ``reference``."""
    if weight.fmt.scales is Scales.FLOAT_GROUP:
        return reference.mixed_linear(round_groups(x), weight, bias).to(x.dtype)
    codes, scale = round_tokens(x)
    rows, unit = round_rows(weight)
    out = sums(codes, rows).to(scale.dtype) * scale[:, None] * unit
    if weight.branch_a is not None and weight.branch_b is not None and weight.branch_scale is not None:
        inner = x.to(out.dtype) @ weight.branch_b.to(out.dtype).t() * weight.branch_scale.to(out.dtype)
        out += inner @ weight.branch_a.to(out.dtype).t()
    if weight.row_index is not None:
        out = torch.empty_like(out).index_copy_(1, weight.row_index.long(), out)
    if bias is not None:
        out += bias.to(out.dtype)
    return out.to(x.dtype)


def round_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x[tokens, columns] -> codes int8 in -127..127 and scales fp32[tokens] (fp64 for fp64).

    A token with an infinity or a NaN has a scale like it, so that none of its results is a number.
    """
    numbers = x if x.dtype is torch.float64 else x.float()
    largest = numbers.abs().amax(-1).clamp_min(TINY)
    top = torch.full_like(largest, INT8_TOP)  # of two tensors: with a number torch multiplies by a rounded reciprocal
    return (numbers * (top / largest)[:, None]).round_().to(torch.int8), largest / top


def round_rows(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """A two-level weight without its side branch -> codes int8[rows, columns], units fp32[rows]; stored row order."""
    numbers, unit = weight.integers().int(), weight.row_factors()
    for rows, segment in weight.fmt.row_ranges():
        factor = INT8_FACTORS[8 if segment.profile else segment.width]
        numbers[rows] = (numbers[rows] * factor + INT8_ONE // 2) // INT8_ONE
        unit[rows] *= INT8_ONE / factor
    return numbers.to(torch.int8), unit


def sums(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """int8[tokens, columns], int8[rows, columns] -> their products' exact sums, fp64[tokens, rows]."""
    out = torch.zeros(len(codes), len(rows), dtype=torch.float64, device=codes.device)
    for a, b in zip(codes.split(EXACT, 1), rows.split(EXACT, 1), strict=True):
        out += a.float() @ b.float().t()
    return out


def round_groups(x: torch.Tensor) -> torch.Tensor:
    """x[tokens, columns] rounded to 8 bits with an fp16 scale for every token and 128 columns; fp32 (fp64 for fp64)."""
    numbers = x if x.dtype is torch.float64 else x.float()
    parts = pad(numbers, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = (parts.abs().amax(-1, keepdim=True) / INT8_TOP).clamp_min(1e-5).half().to(parts.dtype)
    rounded: torch.Tensor = (parts / scale).round().clamp(-INT8_TOP, INT8_TOP) * scale
    return rounded.flatten(1)[:, : x.shape[1]]
