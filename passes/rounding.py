"""Rounding that only asks "what if": per-group ranges with an integer zero point, as the papers search with.

Nothing here is stored; ``mixcomp.quant`` makes what is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def round_range(weight: torch.Tensor, width: int, group: int) -> torch.Tensor:
    """Plain rounding between each group's least and largest weight, dequantized.

    ``s = (max - min) / (2^b - 1)``, ``z = round(-min / s)``, ``w = s (clamp(round(w / s) + z) - z)`` with the range
    forced to hold zero (SliM-LLM and MixLLM's search-time quantizer).  One bit is ``binarize``.

    Args:
        weight: float[rows, columns].
        width: bits of a code, at least 1.
        group: columns that share a range; the last group may be short.
    """
    rows, columns = weight.shape
    whole = columns // group * group
    parts = [weight[:, :whole].reshape(rows, whole // group, group), weight[:, None, whole:]]
    rounded = [binarize(x) if width == 1 else round_between(x, width) for x in parts if x.numel()]
    return torch.cat([x.flatten(1) for x in rounded], 1)


def round_mix(weight: torch.Tensor, group: int, widths: Sequence[int]) -> torch.Tensor:
    """Plain rounding of every column group at its own width, float[rows, columns]."""
    blocks = weight.split(group, 1)
    return torch.cat([round_range(block, w, group) for block, w in zip(blocks, widths, strict=True)], 1)


def round_between(x: torch.Tensor, width: int) -> torch.Tensor:
    """Asymmetric rounding of float[..., size] over its range and zero, at two bits or more."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    # a range below what 1 / step can hold rounds to zero, as an all-zero group does
    step = ((high - low) / (2**width - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    zero = (-low / step).round()
    codes = ((x / step).round_() + zero).clamp_(0, 2**width - 1)
    rounded: torch.Tensor = (codes - zero) * step
    return rounded


def binarize(x: torch.Tensor) -> torch.Tensor:
    """One bit: ``c + a sign(w - c)`` with c the mean and ``a = mean |w - c|``, its least-squares partner."""
    centre = x.mean(-1, keepdim=True)
    reach = (x - centre).abs().mean(-1, keepdim=True)
    return torch.where(x >= centre, centre + reach, centre - reach)
