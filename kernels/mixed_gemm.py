"""The mixed-width linear: one launch computes every segment of a site straight from its stored bytes.

A program owns a tile of stored rows, all of one width, and a tile of tokens.  It reads its width from the tile table
(``tiles.tile_table``) and takes the branch that is specialised for it::

    table[tile] -> width, rows, planes          x[tokens, columns]
            |                                        |
    codes --+--> words --> levels * m  (registers) --+--> dot, or multiply and sum --> fp32 sums
                                                              |
            out[token, row_index[row]]  <--  sums * factor + side branch + bias

Codes are read as 32-bit words.  A plane of ``b`` bits spends exactly ``b`` words on a group of 32 columns, so word
``w`` of a row holds the ``32 / b`` columns from ``w * 32 / b`` on and belongs to group ``w // b``.  A width is one
plane or a wide and a narrow one (5 = 4 + 1); the narrow plane's word for wide word ``w`` is ``w // (wide / narrow)``.

Exactness: levels and ``m * level`` (11 bits at most) are formed in fp32 without rounding; fp16 and fp32 hold them
exactly, bf16 up to width 4 and, above, as a sum of two numbers.  All sums are fp32, in an order that does not depend
on anything but the tile, so that equal inputs give equal bits.
"""

# A jitted function is typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from mixcomp.format import PLANES

#: 2**23: fp32 numbers from here on count in ones, so that ``pattern | n`` is the float ``2**23 + n``
ONES = tl.constexpr(8388608.0)
ONES_PATTERN = tl.constexpr(0x4B000000)
#: columns of a site are a multiple of this where the launcher says ``ALIGNED``: rows then start at 16 bytes
COLUMN_UNIT = tl.constexpr(256)
#: stride of the tokens, likewise
TOKEN_UNIT = tl.constexpr(8)
#: ranks of the side branch that one step of the epilogue takes
RANK_STEP = tl.constexpr(16)


@triton.constexpr_function
def wide_bits(width):
    """Bits of a width's first plane, the wider one where there are two."""
    return PLANES[width][0]


@triton.jit
def offsets(index, stride):
    """``index * stride`` in 64 bits: a site, its input or its output may hold more than 2**31 elements."""
    return index.to(tl.int64) * stride


@triton.jit
def spread(x, TIMES: tl.constexpr):
    """[rows, n] -> [rows, n * TIMES], every element repeated in place."""
    wider = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], TIMES))
    return tl.reshape(wider, (x.shape[0], x.shape[1] * TIMES))


@triton.jit
def load_words(words, scales, wide_row, narrow_row, scale_row, first, groups, WIDTH: tl.constexpr, N: tl.constexpr):
    """Words ``first .. first + N`` of some rows: (wide plane, narrow plane, group scale), int32, int32, fp32[rows, N].

    The narrow plane is shifted so that its bits for a wide word are the lowest.  ``wide_row``, ``narrow_row`` and
    ``scale_row`` are 64-bit offsets of the rows, [rows, 1].  N is a multiple of the words of two groups, because two
    group scales share a byte.
    """
    WIDE: tl.constexpr = wide_bits(WIDTH)
    NARROW: tl.constexpr = WIDTH - WIDE
    w = (first + tl.arange(0, N))[None, :]
    wide = tl.load(words + wide_row + w, mask=w < groups * WIDE, other=0)
    narrow = wide
    if NARROW > 0:
        n = (first // (WIDE // NARROW) + tl.arange(0, N * NARROW // WIDE))[None, :]
        narrow = spread(tl.load(words + narrow_row + n, mask=n < groups * NARROW, other=0), WIDE // NARROW)
        narrow = narrow >> (w % (WIDE // NARROW) * (32 // WIDE * NARROW))
    pair = (first // (2 * WIDE) + tl.arange(0, N // (2 * WIDE)))[None, :]
    nibbles = tl.load(scales + scale_row + pair, mask=pair * 2 < groups, other=0)
    nibbles = tl.join(nibbles & 15, nibbles >> 4)
    scale = (tl.reshape(nibbles, (nibbles.shape[0], N // WIDE)) + 1).to(tl.float32)
    return wide, narrow, spread(scale, WIDE)


@triton.jit
def levels(code, WIDTH: tl.constexpr):
    """Codes -> levels, int32 -> fp32, by the pattern of a float instead of a conversion."""
    if WIDTH == 8:
        return (code | ONES_PATTERN).to(tl.float32, bitcast=True) - (ONES + 128)
    return ((code << 1) | ONES_PATTERN).to(tl.float32, bitcast=True) - (ONES + ((1 << WIDTH) - 1))


@triton.jit
def merge(wide, narrow, WIDTH: tl.constexpr):
    """The code whose bits are the lowest of ``wide`` and ``narrow``, int32."""
    WIDE: tl.constexpr = wide_bits(WIDTH)
    code = wide & ((1 << WIDE) - 1)
    if WIDTH > WIDE:
        code |= (narrow & ((1 << (WIDTH - WIDE)) - 1)) << WIDE
    return code


@triton.jit
def unfold(wide, narrow, scale, WIDTH: tl.constexpr):
    """Words -> their columns, in order: ``m * level``, fp32[rows, words] -> fp32[rows, words * 32 / wide].

    Halving the words by joins keeps all columns of a word in the thread that holds it.
    """
    WIDE: tl.constexpr = wide_bits(WIDTH)
    ROWS: tl.constexpr = wide.shape[0]
    COLUMNS: tl.constexpr = wide.shape[1] * (32 // WIDE)
    for i in tl.static_range(1, 5):
        if (32 // WIDE) >> i > 0:
            wide = tl.join(wide, wide >> (WIDE * ((32 // WIDE) >> i)))
            narrow = tl.join(narrow, narrow >> ((WIDTH - WIDE) * ((32 // WIDE) >> i)))
            scale = tl.join(scale, scale)
    return tl.reshape(levels(merge(wide, narrow, WIDTH), WIDTH) * scale, (ROWS, COLUMNS))


@triton.jit
def load_x(x, token_row, column, token_keep, columns, x_column, ALIGNED: tl.constexpr):
    """x at ``token_row`` (64-bit offsets) and ``column``, zero outside; the arguments broadcast."""
    inside = token_keep & (column < columns)
    if ALIGNED:
        return tl.load(x + token_row + column, mask=inside, other=0)
    else:
        return tl.load(x + token_row + offsets(column, x_column), mask=inside, other=0)


@triton.jit
def row_sums(
    x, words, scales, wide_row, narrow_row, scale_row, token_row, token_keep, columns, groups, x_column,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One token, without tensor cores: sums over columns of ``m * level * x``, fp32[ROWS, 1].

    The fields of a word are the first axis of the products, which Triton keeps inside a thread.
    """
    WIDE: tl.constexpr = wide_bits(WIDTH)
    FIELDS: tl.constexpr = 32 // WIDE
    WORDS: tl.constexpr = COLUMNS // FIELDS
    field = tl.arange(0, FIELDS)
    sums = tl.zeros((ROWS, WORDS), tl.float32)
    for first in tl.range(0, groups * WIDE, WORDS, num_stages=STAGES):
        word = first + tl.arange(0, WORDS)
        column = word[None, :] * FIELDS + field[:, None]
        xs = load_x(x, token_row, column, token_keep, columns, x_column, ALIGNED).to(tl.float32)
        wide, narrow, scale = load_words(words, scales, wide_row, narrow_row, scale_row, first, groups, WIDTH, WORDS)
        shift = field[:, None, None]
        code = merge(wide[None, :, :] >> (shift * WIDE), narrow[None, :, :] >> (shift * (WIDTH - WIDE)), WIDTH)
        sums += tl.sum(levels(code, WIDTH) * xs[:, None, :], 0) * scale
    return tl.sum(sums, 1)[:, None]


@triton.jit
def tile_sums(
    x, words, scales, wide_row, narrow_row, scale_row, token_row, token_keep, columns, groups, x_column,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Many tokens, on tensor cores: sums over columns of ``m * level * x``, fp32[ROWS, TOKENS].

    The weight is the left operand, which Hopper's matrix instructions can take from registers.
    """
    WIDE: tl.constexpr = wide_bits(WIDTH)
    FIELDS: tl.constexpr = 32 // WIDE
    WORDS: tl.constexpr = COLUMNS // FIELDS
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in tl.range(0, groups * WIDE, WORDS, num_stages=STAGES):
        column = (first * FIELDS + tl.arange(0, COLUMNS))[None, :]
        xs = tl.trans(load_x(x, token_row, column, token_keep, columns, x_column, ALIGNED))
        wide, narrow, scale = load_words(words, scales, wide_row, narrow_row, scale_row, first, groups, WIDTH, WORDS)
        weight = unfold(wide, narrow, scale, WIDTH)
        high = weight.to(xs.dtype)
        sums = tl.dot(high, xs, acc=sums, input_precision="ieee")
        if xs.dtype == tl.bfloat16 and WIDTH > 4:
            sums = tl.dot((weight - high.to(tl.float32)).to(xs.dtype), xs, acc=sums, input_precision="ieee")
    return sums


@triton.jit
def side_sums(
    branch_a, projected, row, row_keep, token, token_keep, rank, ROWS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """The side branch of a tile: ``branch_a @ projected.T``, fp32[ROWS, TOKENS]."""
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, rank, RANK_STEP):
        r = (first + tl.arange(0, RANK_STEP))[None, :]
        a = tl.load(branch_a + offsets(row, rank)[:, None] + r, mask=row_keep & (r < rank), other=0)
        p = tl.load(projected + offsets(token, rank)[:, None] + r, mask=token_keep & (r < rank), other=0)
        if TOKENS == 1:
            sums += tl.sum(a.to(tl.float32) * p, 1)[:, None]
        else:
            sums = tl.dot(a.to(tl.float32), tl.trans(p), acc=sums, input_precision="ieee")
    return sums


@triton.jit(
    do_not_specialize=[
        "tokens", "columns", "rank", "x_token", "x_column", "out_token", "token_tiles", "scatter", "biased"
    ]
)  # fmt: skip
def mixed_linear_kernel(
    x, words, scales, factors, row_index, branch_a, projected, bias, out, table,
    tokens, columns, rank, x_token, x_column, out_token, token_tiles, scatter, biased,
    WIDTHS: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[token, row_index[row]] = x @ weight.T + bias for one tile of rows and one of tokens.

    x fp16|bf16|fp32[tokens, columns] of strides ``x_token, x_column``; words int32; scales uint8; factors fp16[rows];
    row_index int16|int32[rows], used where ``scatter``; bias of any float type in output order, used where ``biased``;
    branch_a int8[rows, rank] and projected fp32[tokens, rank] (``project_kernel``) or None; out[tokens, rows] of x's
    type; table int32[tiles, 5].
    WIDTHS has bit ``w`` set where width ``w`` may occur.  ALIGNED: ``columns`` and ``x_token`` count in COLUMN_UNIT
    and TOKEN_UNIT and x's columns are contiguous.  TOKENS == 1 is the path without tensor cores.
    """
    groups = (columns + 31) // 32
    scale_bytes = (groups + 1) // 2
    if ALIGNED:
        groups = columns * (COLUMN_UNIT // 32)
        scale_bytes = columns * (COLUMN_UNIT // 64)
        columns = columns * COLUMN_UNIT
        x_token = x_token * TOKEN_UNIT
    entry = table + tl.program_id(0) // token_tiles * 5
    width, first_row, held = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    row_keep = (tl.arange(0, ROWS) < held)[:, None]
    lane = tl.minimum(tl.arange(0, ROWS), held - 1)
    row = first_row + lane
    scale_row = offsets(row, scale_bytes)[:, None]
    token = tl.program_id(0) % token_tiles * TOKENS + tl.arange(0, TOKENS)
    token_keep = (token < tokens)[:, None]
    token_row = offsets(token, x_token)[:, None]

    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for W in tl.static_range(2, 9):
        if (WIDTHS >> W) & 1:  # noqa: SIM102 - known when compiled; the next is not
            if width == W:
                WIDE: tl.constexpr = wide_bits(W)
                wide_row = offsets(tl.load(entry + 3) + lane * WIDE, groups)[:, None]
                narrow_row = offsets(tl.load(entry + 4) + lane * (W - WIDE), groups)[:, None]
                if TOKENS == 1:
                    sums = row_sums(
                        x, words, scales, wide_row, narrow_row, scale_row, token_row, token_keep, columns, groups,
                        x_column, W, ROWS, COLUMNS, STAGES, ALIGNED,
                    )  # fmt: skip
                else:
                    sums = tile_sums(
                        x, words, scales, wide_row, narrow_row, scale_row, token_row, token_keep, columns, groups,
                        x_column, W, ROWS, TOKENS, COLUMNS, STAGES, ALIGNED,
                    )  # fmt: skip

    result = sums * tl.load(factors + row).to(tl.float32)[:, None]
    if branch_a is not None:
        result += side_sums(branch_a, projected, row, row_keep, token, token_keep, rank, ROWS, TOKENS)
    feature = tl.where(scatter != 0, tl.load(row_index + row).to(tl.int32), row)
    result += tl.load(bias + feature, mask=tl.arange(0, ROWS) < ROWS * biased, other=0).to(tl.float32)[:, None]
    target = offsets(token, out_token)[None, :] + feature[:, None]
    tl.store(out + target, result.to(out.dtype.element_ty), mask=row_keep & (token < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens", "columns", "rank", "x_token", "x_column", "token_tiles"])
def project_kernel(
    x, branch_b, branch_scale, projected, tokens, columns, rank, x_token, x_column, token_tiles,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """projected[token, r] = branch_scale[r] * sum over columns of branch_b[r, column] * x[token, column], fp32.

    x as in ``mixed_linear_kernel``; branch_b int8[rank, columns]; branch_scale fp32[rank].
    """
    r = tl.program_id(0) // token_tiles * RANKS + tl.arange(0, RANKS)
    token = tl.program_id(0) % token_tiles * TOKENS + tl.arange(0, TOKENS)
    r_keep = (r < rank)[:, None]
    token_keep = (token < tokens)[:, None]
    b_row = offsets(r, columns)[:, None]
    x_row = offsets(token, x_token)[:, None]
    sums = tl.zeros((RANKS, TOKENS), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        b = tl.load(branch_b + b_row + column, mask=r_keep & (column < columns), other=0)
        xs = load_x(x, x_row, column, token_keep, columns, x_column, False)
        if TOKENS == 1:
            sums += tl.sum(b.to(tl.float32) * xs.to(tl.float32), 1)[:, None]
        else:
            sums = tl.dot(b.to(xs.dtype), tl.trans(xs), acc=sums, input_precision="ieee")
    sums *= tl.load(branch_scale + r, mask=r < rank, other=0)[:, None]
    target = offsets(token, rank)[None, :] + r[:, None]
    tl.store(projected + target, sums, mask=r_keep & (token < tokens)[None, :])
