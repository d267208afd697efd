"""A site expanded for many tokens: its weight in the type of the activations, made from fragments by one launch.

Above some tokens (``lowering.select``) a matrix product is bound by arithmetic, and cuBLAS on a matrix that lives for the
product is faster than any kernel that reads codes.  The weight is rounded once, to the type it is multiplied in.
"""

# A jitted function is typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from mixcomp.kernels.operand import COLUMNS, UNIT, group_scales, load_plane, operand, per_unit, wide_bits
from mixcomp.kernels.side_branch import offsets

#: columns of a site are a multiple of this where the launcher says ``ALIGNED``: rows of the matrix start at 16 bytes
VECTOR = tl.constexpr(8)


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


@triton.jit(do_not_specialize=["across", "columns", "scatter"])
def expand_kernel(
    words, nibbles, factors, row_index, out, table, across, columns, scatter,
    WIDTHS: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """out[row_index[row], column] = factor * m * level, without the side branch, for WARPS column blocks of a row tile.

    words and nibbles: ``fragments.pack``; factors fp16[rows]; row_index int16|int32[rows], used where ``scatter``;
    out fp16|bf16|fp32[rows, columns]; table int32[tiles, 5]; across: column blocks.  WIDTHS has bit ``w`` set where width
    ``w`` may occur.  ALIGNED: ``columns`` counts in VECTOR.
    """
    ROWS: tl.constexpr = 16 * BLOCKS
    if ALIGNED:
        columns = columns * VECTOR
    entry = table + tl.program_id(0) * 5
    width, first_row, held = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    words += tl.load(entry + 3).to(tl.int64) * UNIT
    nibbles += tl.load(entry + 4).to(tl.int64) * across * 8
    first_step = tl.program_id(1) * WARPS
    step = first_step + (tl.arange(0, 32 * WARPS) // 32)[:, None]
    block = tl.minimum(tl.arange(0, BLOCKS), tl.cdiv(held, 16) - 1)[None, :]
    row = tl.minimum(tl.arange(0, ROWS), held - 1) + first_row
    feature = tl.where(scatter != 0, tl.load(row_index + row).to(tl.int32), row)
    factor = tl.load(factors + row).to(tl.float32) * tl.where(width == 8, 1.0, 2.0)
    column = (first_step + tl.arange(0, WARPS)[:, None]) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    target = out + offsets(feature, columns)[None, :, None] + column[:, None, :]
    keep = (tl.arange(0, ROWS) < held)[None, :, None] & (column < columns)[:, None, :]
    for W in tl.static_range(2, 9):
        if (WIDTHS >> W) & 1:  # noqa: SIM102 - known when compiled; the next is not
            if width == W:
                level = weights(words, nibbles, block, step, across, W, WARPS, BLOCKS)
                tl.store(target, (level.to(tl.float32) * factor[None, :, None]).to(out.dtype.element_ty), mask=keep)
