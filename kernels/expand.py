"""A site expanded for many tokens: its weight in the type that is multiplied, made from fragments by one launch.

Above some tokens (``lowering.select``) a matrix product is bound by arithmetic, and one of a plain matrix that lives for
the product is faster than any kernel that reads codes.  The weight is rounded once.
"""

# A jitted function is typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from mixcomp.format import PLANES
from mixcomp.kernels.int8 import nearest
from mixcomp.kernels.operand import COLUMNS, UNIT, group_scales, load_plane, operand, per_unit, wide_bits
from mixcomp.kernels.side_branch import offsets
from mixcomp.packed import int8_step

#: columns of a site are a multiple of this where the launcher says ``ALIGNED``: rows of the matrix start at 16 bytes
VECTOR = tl.constexpr(8)
#: a function that Triton runs may read a table, and call nothing else
STEPS = {width: int8_step(width) for width in PLANES}


@triton.jit
def weights(
    words, nibbles, block, step, across, WIDTH: tl.constexpr, WARPS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """``m * level / 2`` (at 8 bits ``m * level``), fp16[WARPS, BLOCKS * 16, 128]: a column block for every warp.

    ``block`` [1, BLOCKS] and ``step`` [threads, 1] say which row and column blocks; what lies beyond ``across`` is not read.
    """
    WIDE: tl.constexpr = wide_bits(WIDTH)
    NARROW: tl.constexpr = WIDTH - WIDE
    lane = (tl.arange(0, 32 * WARPS) % 32)[:, None]
    keep = step < across
    at = block * across + step
    blocks = words + (at * (WIDTH * UNIT))[:, :, None, None]
    wide = per_unit(load_plane(blocks, 0, WIDE, lane[:, :, None, None], keep[:, :, None, None]), WIDE)
    narrow = wide
    if NARROW > 0:
        narrow = per_unit(load_plane(blocks, WIDE, NARROW, lane[:, :, None, None], keep[:, :, None, None]), NARROW)
    scales = tl.load(nibbles + at[:, :, None] * 8 + (lane // 4)[:, :, None], mask=keep[:, :, None], other=0)
    return operand(wide, narrow, group_scales(scales, tl.float16), 0, WIDTH, WARPS, BLOCKS)


@triton.constexpr_function
def integers(width):
    """What ``weights`` are multiplied by to be the integers ``m * level``."""
    return 1.0 if width == 8 else 2.0


@triton.constexpr_function
def step(width):
    """Integers that an 8-bit code of a width counts."""
    return STEPS[width]


@triton.jit(do_not_specialize=["across", "columns", "scatter"])
def expand_kernel(
    words, nibbles, factors, row_index, out, units, table, across, columns, scatter,
    WIDTHS: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """out[row_index[row], column] = factor * m * level, without the side branch, for WARPS column blocks of a row tile.

    An int8 out takes ``lowering.int8``'s codes of ``m * level`` instead, and units fp32[rows] what they count.

    words and nibbles: ``fragments.pack``; factors fp16[rows]; row_index int16|int32[rows], used where ``scatter``;
    out fp16|bf16|fp32|int8[rows, columns]; table int32[tiles, 5]; across: column blocks.  WIDTHS has bit ``w`` set where
    width ``w`` may occur.  ALIGNED: ``columns`` counts in VECTOR.
    """
    ROWS: tl.constexpr = 16 * BLOCKS
    if ALIGNED:
        columns = columns * VECTOR
    entry = table + tl.program_id(0) * 5
    width, first_row, held = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    words += tl.load(entry + 3).to(tl.int64) * UNIT
    nibbles += tl.load(entry + 4).to(tl.int64) * across * 8
    first_step = tl.program_id(1) * WARPS
    at = first_step + (tl.arange(0, 32 * WARPS) // 32)[:, None]
    block = tl.minimum(tl.arange(0, BLOCKS), tl.cdiv(held, 16) - 1)[None, :]
    row = tl.minimum(tl.arange(0, ROWS), held - 1) + first_row
    feature = tl.where(scatter != 0, tl.load(row_index + row).to(tl.int32), row)
    factor = tl.load(factors + row).to(tl.float32)
    column = (first_step + tl.arange(0, WARPS)[:, None]) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    target = out + offsets(feature, columns)[None, :, None] + column[:, None, :]
    keep = (tl.arange(0, ROWS) < held)[None, :, None] & (column < columns)[:, None, :]
    unit_keep = tl.arange(0, ROWS) < tl.where(first_step == 0, held, 0)
    for W in tl.static_range(2, 9):
        if (WIDTHS >> W) & 1:  # noqa: SIM102 - known when compiled; the next is not
            if width == W:
                numbers = weights(words, nibbles, block, at, across, W, WARPS, BLOCKS).to(tl.float32)
                INTEGERS: tl.constexpr = integers(W)
                STEP: tl.constexpr = step(W)
                if out.dtype.element_ty == tl.int8:
                    tl.store(target, nearest(numbers * (INTEGERS / STEP)).to(tl.int8), mask=keep)
                    tl.store(units + feature, factor * STEP, mask=unit_keep)
                else:
                    numbers *= (factor * INTEGERS)[None, :, None]
                    tl.store(target, numbers.to(out.dtype.element_ty), mask=keep)
