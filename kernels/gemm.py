"""The mixed-width linear: one launch computes every segment of a site from its codes in fragment order.

A program owns a tile of stored rows, all of one width, a tile of tokens and a share of the columns.  It reads its width
from the tile table (``tiles.tile_table``) and takes the branch that is specialised for it::

    table[tile] -> width, rows, place           x[tokens, columns]
            |                                        |
    words --+--> m * level (registers) ----------> dot --> fp32 sums of a share
                                                              |   the program of a tile that comes last adds the shares
            out[token, row_index[row]]  <--  sums * factor + side branch + bias

Exactness: ``m * level`` (11 bits at most) is formed without rounding (``operand``).  All sums are fp32, in an order that
does not depend on anything but the tile, so that equal inputs give equal bits.
"""

# A jitted function is typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from mixcomp.kernels.operand import (
    COLUMNS,
    INTERPRETED,
    UNIT,
    group_scales,
    load_plane,
    operand,
    part_count,
    per_unit,
    wide_bits,
)
from mixcomp.kernels.side_branch import load_x, offsets, side_sums
from mixcomp.kernels.warps import warp_sums

#: columns of a site and the stride of the tokens are multiples of this where the launcher says ``ALIGNED``
VECTOR = tl.constexpr(8)
#: whether 16-bit activations take ``warp_sums``: lane by lane the interpreter is many times as slow as with whole tiles
WARPS = tl.constexpr(not INTERPRETED.value)


@triton.jit
def tile_sums(
    x, words, nibbles, held, first_step, last_step, across, tokens, columns, token, x_token, x_column,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, ALONG: tl.constexpr, DOWN: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sums over some columns of ``m * level / 2 * x`` (at 8 bits ``m * level * x``), fp32[DOWN * BLOCKS * 16, TOKENS].

    A warp multiplies BLOCKS row blocks by every ALONG-th column block; DOWN warps share those columns.
    """
    WARPS: tl.constexpr = ALONG * DOWN
    WIDE: tl.constexpr = wide_bits(WIDTH)
    NARROW: tl.constexpr = WIDTH - WIDE
    PARTS: tl.constexpr = part_count(WIDTH, x.dtype.element_ty == tl.bfloat16)
    thread = tl.arange(0, 32 * WARPS)[:, None]
    lane = (thread % 32)[:, :, None, None]
    along = thread // 32 // DOWN
    block = thread // 32 % DOWN * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    block = tl.minimum(block, held - 1)
    scale_lane = (thread % 32 // 4)[:, :, None]
    column = tl.arange(0, ALONG * COLUMNS)
    token_row = offsets(token, x_token)[:, None]
    sums = tl.zeros((WARPS, BLOCKS * 16, TOKENS), tl.float32)
    for step in tl.range(first_step, last_step, ALONG, num_stages=STAGES):
        keep = step + along < last_step
        at = block * across + (step + along)
        blocks = words + (at * (WIDTH * UNIT))[:, :, None, None]
        wide = per_unit(load_plane(blocks, 0, WIDE, lane, keep[:, :, None, None]), WIDE)
        narrow = wide
        if NARROW > 0:
            narrow = per_unit(load_plane(blocks, WIDE, NARROW, lane, keep[:, :, None, None]), NARROW)
        scales = tl.load(nibbles + at[:, :, None] * 8 + scale_lane, mask=keep[:, :, None], other=0)
        c = (column + step * COLUMNS)[None, :]
        xs = load_x(x, token_row, c, (token < tokens)[:, None], columns, x_column, ALIGNED)
        xs = tl.broadcast_to(tl.reshape(xs, (TOKENS, ALONG, 1, COLUMNS)), (TOKENS, ALONG, DOWN, COLUMNS))
        xs = tl.permute(tl.reshape(xs, (TOKENS, WARPS, COLUMNS)), (1, 2, 0))
        m = group_scales(scales, tl.bfloat16 if xs.dtype == tl.bfloat16 else tl.float16)
        for PART in tl.static_range(PARTS):
            weight = operand(wide, narrow, m, PART, WIDTH, WARPS, BLOCKS)
            sums = tl.dot(weight.to(xs.dtype), xs, acc=sums, input_precision="ieee")
    return tl.sum(tl.reshape(sums, (ALONG, DOWN * BLOCKS * 16, TOKENS)), 0)


@triton.jit(
    do_not_specialize=[
        "across", "tokens", "columns", "rank", "x_token", "x_column", "out_token", "token_tiles", "splits", "scatter",
        "biased",
    ]
)  # fmt: skip
def mixed_linear_kernel(  # noqa: C901 - most branches are known when compiled
    x, words, nibbles, factors, row_index, branch_a, projected, bias, out, table, partial, counters,
    across, tokens, columns, rank, x_token, x_column, out_token, token_tiles, splits, scatter, biased,
    WIDTHS: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, ALONG: tl.constexpr, DOWN: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[token, row_index[row]] = x @ weight.T + bias for one tile of rows and one of tokens.

    x fp16|bf16|fp32[tokens, columns] of strides ``x_token, x_column``; words and nibbles: ``fragments.pack``; factors
    fp16[rows]; row_index int16|int32[rows], used where ``scatter``; bias of any float type in output order, used where
    ``biased``; branch_a int8[rows, rank] and projected fp32[tokens, rank] (``project_kernel``) or None;
    out[tokens, rows] of x's type; table int32[tiles, 5]; across: column blocks.  ``splits`` programs share the columns of
    a tile; where that is more than one, partial fp32[programs, tile] and counters int32[tiles], zero before and after.
    WIDTHS has bit ``w`` set where width ``w`` may occur.  ALIGNED: ``columns`` and ``x_token`` count in VECTOR and x's
    columns are contiguous.
    """
    ROWS: tl.constexpr = 16 * BLOCKS * DOWN
    BY_WARPS: tl.constexpr = WARPS and x.dtype.element_ty != tl.float32
    if ALIGNED:
        columns = columns * VECTOR
        x_token = x_token * VECTOR
    program = tl.program_id(0)
    tile = program // splits
    share = program % splits
    entry = table + tile // token_tiles * 5
    width, first_row, held = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    words += tl.load(entry + 3).to(tl.int64) * UNIT
    nibbles += tl.load(entry + 4).to(tl.int64) * across * 8
    first_token = tile % token_tiles * TOKENS
    token = first_token + tl.arange(0, TOKENS)
    steps = tl.cdiv(tl.cdiv(across, ALONG), splits) * ALONG
    first_step = share * steps
    last_step = tl.minimum(first_step + steps, across)
    row_blocks = tl.cdiv(held, 16)

    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for W in tl.static_range(2, 9):
        if (WIDTHS >> W) & 1:  # noqa: SIM102 - known when compiled; the next is not
            if width == W:
                if BY_WARPS:
                    sums = warp_sums(
                        x, words, nibbles, row_blocks, first_step, last_step, across, tokens, columns, first_token,
                        x_token, x_column, W, BLOCKS, ALONG, DOWN, TOKENS, STAGES, ALIGNED,
                    )  # fmt: skip
                else:
                    sums = tile_sums(
                        x, words, nibbles, row_blocks, first_step, last_step, across, tokens, columns, token, x_token,
                        x_column, W, BLOCKS, ALONG, DOWN, TOKENS, STAGES, ALIGNED,
                    )  # fmt: skip

    arrived = splits - 1
    cell = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    if splits > 1:
        tl.store(partial + offsets(program, ROWS * TOKENS) + cell, sums)
        tl.debug_barrier()  # the counter may not be seen before what all threads have stored
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
    if arrived == splits - 1:
        if splits > 1:
            tl.store(counters + tile, 0)
            sums = tl.zeros((ROWS, TOKENS), tl.float32)
            for other in range(0, splits):
                at = offsets(tile * splits + other, ROWS * TOKENS)
                sums += tl.load(partial + at + cell, cache_modifier=".cg")
        row_keep = (tl.arange(0, ROWS) < held)[:, None]
        row = first_row + tl.minimum(tl.arange(0, ROWS), held - 1)
        token_keep = (token < tokens)[:, None]
        result = sums * (tl.load(factors + row).to(tl.float32) * tl.where(width == 8, 1.0, 2.0))[:, None]
        if branch_a is not None:
            result += side_sums(branch_a, projected, row, row_keep, token, token_keep, rank, ROWS, TOKENS)
        feature = tl.where(scatter != 0, tl.load(row_index + row).to(tl.int32), row)
        result += tl.load(bias + feature, mask=tl.arange(0, ROWS) < ROWS * biased, other=0).to(tl.float32)[:, None]
        target = offsets(token, out_token)[None, :] + feature[:, None]
        tl.store(out + target, result.to(out.dtype.element_ty), mask=row_keep & (token < tokens)[None, :])
