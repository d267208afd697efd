"""Rounding a block of columns one after another: the innermost loop of GPTQ and of coordinate descent."""

from __future__ import annotations

import torch

from mixcomp.format import GROUP
from mixcomp.quant import round_column

#: columns whose updates are collected before the rest of the matrix is touched (a GEMM instead of rank-1 updates)
BLOCK = 64


def round_columns(
    values: torch.Tensor,
    codes: torch.Tensor,
    matrix: torch.Tensor,
    steps: torch.Tensor,
    bases: torch.Tensor | None,
    tops: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """Round up to ``BLOCK`` columns from ``start`` on; ``codes`` get them, and their amounts come back,
    fp32[tasks, block, rows].

    Column j takes the nearest code, and the columns after it in the block lose ``C_ji amount_j``.  Everything is fp32; on
    a GPU it is one launch (``mixcomp.kernels.columns``) instead of ten a column.

    Args:
        values, codes: [tasks, columns, rows]; may be one tensor.
        matrix: [tasks, columns, columns], C.
        steps, tops: [tasks, blocks of 32 columns, rows]: step and largest code.
        bases: like steps, the code of zero: ``values`` are weights, and an amount is the error over C_jj (GPTQ).  Or
            None: ``values`` over C_jj are what weights should move from the codes that are there, and an amount is what
            they do move.
    """
    count = min(BLOCK, values.shape[1] - start)
    if values.is_cuda:
        from mixcomp.kernels import columns

        return columns.round_columns(values, codes, matrix, steps, bases, tops, start, count)
    own = slice(start, start + count)
    left, inside = values[:, own].clone(), matrix[:, own, own]
    amounts, zero = torch.empty_like(left), torch.zeros_like(left[:, 0])
    for j in range(count):
        group, pivot = (start + j) // GROUP, inside[:, j, j, None]
        step, now, amount = steps[:, group], left[:, j], amounts[:, j]
        if bases is None:
            base, now = codes[:, start + j], now / pivot
        else:
            base = bases[:, group]
        code = round_column(now, step, base, zero, tops[:, group])
        torch.sub(code, base, out=amount).mul_(step)
        if bases is not None:
            torch.sub(now, amount, out=amount).div_(pivot)
        codes[:, start + j] = code
        left[:, j + 1 :].addcmul_(inside[:, j, j + 1 :, None], amounts[:, j, None], value=-1)
    return amounts
