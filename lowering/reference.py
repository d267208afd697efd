"""The meaning of a compiled linear in plain torch: dequantize, multiply, add.  What other paths are tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mixcomp.packed import PackedWeight


def mixed_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ W^T + bias`` in fp32, or in fp64 for fp64 activations; rounded once, to the dtype of ``x``.

    Args:
        x: floating[..., columns], any strides, any device.
        weight: on the device of ``x``.
        bias: floating[rows] in output order, or None.

    Returns:
        [..., rows] of x's dtype, rows in output order.
    """
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    out = x.to(dtype) @ dequantize(weight, dtype).t()
    if bias is not None:
        out += bias.to(dtype)
    return out.to(x.dtype)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as ``dtype``[rows, columns], rows in output order; codes alone are as exact as ``PackedWeight.base``."""
    out = weight.base(dtype)
    if weight.branch_a is not None and weight.branch_b is not None and weight.branch_scale is not None:
        out += (weight.branch_a.to(dtype) * weight.branch_scale.to(dtype)) @ weight.branch_b.to(dtype)
    if weight.row_index is None:
        return out
    return torch.empty_like(out).index_copy_(0, weight.row_index.long(), out)
