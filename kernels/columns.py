"""Rounding a block of columns one after another in one launch: what GPTQ and coordinate descent do innermost.

    for each column j of the block:
        code_j   = clamp(round(base_j + x_j / step), 0, top)
        amount_j                                            what code_j leaves for the other columns
        x_i     -= C_ji amount_j                            for the columns i > j of the block

One program keeps the block's columns of some rows in registers; rows need nothing of each other.
"""

# A jitted function is typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixcomp.errors import InputError

#: rows of a program, which is a single warp: sums over a column's lanes need no barrier
ROWS = 32
#: columns that share a step
GROUP = tl.constexpr(32)
#: added to and taken off a number between 0 and 255 it leaves the nearest integer, the even one of two
ROUNDER = tl.constexpr(2.0**23)


@triton.jit
def round_columns_kernel(
    values, codes, matrix, steps, bases, tops, amounts, start, count, columns, rows, groups,
    FEEDBACK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See ``round_columns``."""
    task = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    alive, inside = row < rows, lane < count
    matrix += (task * columns + start) * columns + start
    place = (task * columns + start) * rows + row
    amounts += task * count * rows + row
    tile = place[None, :] + lane[:, None].to(tl.int64) * rows
    x = tl.load(values + tile, mask=inside[:, None] & alive[None, :], other=0.0)
    for j in range(count):
        group = (task * groups + (start + j) // GROUP) * rows + row
        step = tl.load(steps + group, mask=alive, other=1.0)
        top = tl.load(tops + group, mask=alive, other=0.0)
        pivot = tl.load(matrix + j)
        own = tl.sum(tl.where(lane[:, None] == j, x, 0.0), 0)
        if FEEDBACK:
            base = tl.load(bases + group, mask=alive, other=0.0)
        else:
            base = tl.load(codes + place, mask=alive, other=0.0)
            own = tl.div_rn(own, pivot)  # how far the weight itself would move
        code = tl.minimum(tl.maximum(base + tl.div_rn(own, step), 0.0), top)
        code = (code + ROUNDER) - ROUNDER
        amount = (code - base) * step
        if FEEDBACK:
            amount = tl.div_rn(own - amount, pivot)
        tl.store(codes + place, code, mask=alive)
        tl.store(amounts, amount, mask=alive)
        spread = tl.load(matrix + lane, mask=inside & (lane > j), other=0.0)
        x -= spread[:, None] * amount[None, :]
        matrix += columns
        place += rows
        amounts += rows


def round_columns(
    values: torch.Tensor,
    codes: torch.Tensor,
    matrix: torch.Tensor,
    steps: torch.Tensor,
    bases: torch.Tensor | None,
    tops: torch.Tensor,
    start: int,
    count: int,
) -> torch.Tensor:
    """Write the codes of columns ``start`` to ``start + count`` and give back their amounts, fp32[tasks, count, rows].

    Everything is fp32, contiguous and on one GPU.  Raises ``InputError`` for strided tensors.

    Args:
        values, codes: [tasks, columns, rows]; may be one tensor.
        matrix: [tasks, columns, columns], C.
        steps, tops: [tasks, groups, rows].
        bases: [tasks, groups, rows]: offsets, and an amount is the error over C_jj (GPTQ); or None: the base is the code
            that is there, ``values`` are over C_jj, and an amount is what the code changes (coordinate descent).
    """
    given = (values, codes, matrix, steps, tops, *(() if bases is None else (bases,)))
    if not all(tensor.is_contiguous() for tensor in given):
        raise InputError("round_columns got a strided tensor; it reads contiguous ones")
    tasks, columns, rows = values.shape
    amounts = torch.empty(tasks, count, rows, device=values.device)
    with torch.cuda.device_of(values):
        round_columns_kernel[(triton.cdiv(rows, ROWS), tasks)](
            values, codes, matrix, steps, codes if bases is None else bases, tops, amounts,
            start, count, columns, rows, steps.shape[1],
            FEEDBACK=bases is not None, BLOCK=triton.next_power_of_2(count), ROWS=ROWS, num_warps=1,
        )  # fmt: skip
    return amounts
