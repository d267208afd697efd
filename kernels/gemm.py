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

from mixcomp.kernels.operand import COLUMNS, INTERPRETED, UNIT, wide_bits
from mixcomp.kernels.side_branch import load_x, offsets, side_sums
from mixcomp.kernels.warps import warp_sums

#: columns of a site and the stride of the tokens are multiples of this where the launcher says ``ALIGNED``
VECTOR = tl.constexpr(8)
#: whether 16-bit activations take ``warp_sums``: lane by lane the interpreter is many times as slow as with whole tiles
WARPS = tl.constexpr(not INTERPRETED.value)


@triton.jit
def plane_codes(words, lane, pair, half, BITS: tl.constexpr):
    """Codes of a plane of BITS bits whose block ``words`` points at, see ``fragments``; the arguments broadcast."""
    EACH: tl.constexpr = min(4, 2 * BITS)
    bit = pair * BITS
    word = bit // 16
    place = word // EACH * (32 * EACH) + lane * EACH + word % EACH
    return (tl.load(words + place) >> (bit % 16 + half * 16)) & ((1 << BITS) - 1)


@triton.jit
def tile_sums(
    x, words, nibbles, held, first_step, last_step, across, tokens, columns, token, x_token, x_column,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sums over some columns of ``m * level / 2 * x`` (at 8 bits ``m * level * x``), fp32[ROWS, TOKENS].

    In whole tiles, for what has no lanes (the interpreter) or no tensor cores (fp32).
    """
    WIDE: tl.constexpr = wide_bits(WIDTH)
    NARROW: tl.constexpr = WIDTH - WIDE
    CENTRE: tl.constexpr = 128.0 if WIDTH == 8 else ((1 << WIDTH) - 1) / 2
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    block, half = tl.minimum(row // 16, held - 1), row % 16 // 8
    lane, group = row % 8 * 4 + column % 32 // 8, column // 32
    pair = (group * 2 + half) * 4 + column % 8 // 2
    token_row = offsets(token, x_token)[:, None]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        at = block * across + step
        code = plane_codes(words + at * (WIDTH * UNIT), lane, pair, column % 2, WIDE)
        if NARROW > 0:
            code |= plane_codes(words + (at * WIDTH + WIDE) * UNIT, lane, pair, column % 2, NARROW) << WIDE
        m = ((tl.load(nibbles + at * 8 + row % 8) >> (group * 4 + half * 16)) & 15) + 1
        weight = (code.to(tl.float32) - CENTRE) * m.to(tl.float32)
        xs = load_x(x, token_row, column + step * COLUMNS, (token < tokens)[:, None], columns, x_column, ALIGNED)
        sums = tl.dot(weight.to(xs.dtype), tl.trans(xs), acc=sums, input_precision="ieee")
    return sums


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
                        x_column, W, ROWS, TOKENS, STAGES, ALIGNED,
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
