"""A site expanded for many tokens: its weight in the type that is multiplied, made from fragments by one launch.

Above some tokens (``lowering.select``) a matrix product is bound by arithmetic, and one of a plain matrix that lives for
the product is faster than any kernel that reads codes.  The weight is rounded once.  A lane stores what it has loaded:
eight neighbouring columns at a time, in whole sectors.
"""

# A jitted function is typed by Triton at launch, not by annotations; its tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from mixcomp.kernels.lanes import parted, rounded, store_words, upper_bytes
from mixcomp.kernels.operand import COLUMNS, UNIT, wide_bits
from mixcomp.kernels.side_branch import offsets
from mixcomp.kernels.warps import group_scale, load_blocks, pair, placed
from mixcomp.packed import INT8_FACTORS, INT8_ONE, max_abs_level

#: columns of a site are a multiple of this where the launcher says ``ALIGNED``: rows of the matrix start at 16 bytes
VECTOR = tl.constexpr(8)
#: functions that Triton runs may read a table, and call nothing of Python's
LEVELS = {width: max_abs_level(width) for width in INT8_FACTORS}


@triton.constexpr_function
def integers(width):
    """What a ``pair`` is multiplied by to be the integers ``m * level``."""
    return 1.0 if width == 8 else 2.0


@triton.constexpr_function
def int8_step(width):
    """Integers that an 8-bit code counts."""
    return INT8_ONE / INT8_FACTORS[width]


@triton.constexpr_function
def int8_numbers(width):
    """What ``m * code`` and what ``m`` is multiplied by and what is added for ``int8_four``, in both halves of a word."""
    factor, one = INT8_FACTORS[width], 0x10001
    return factor // (2 if width == 8 else 1), -(factor * LEVELS[width] // 2) * one, (128 * 256 + 128) * one - 2**32


@triton.jit
def code_pair(wide, narrow, AT: tl.constexpr, WIDTH: tl.constexpr):
    """The codes of a pair, in either half of a word."""
    WIDE: tl.constexpr = wide_bits(WIDTH)
    NARROW: tl.constexpr = WIDTH - WIDE
    MASK: tl.constexpr = ((1 << WIDE) - 1) * 0x10001
    code = placed(wide, AT * WIDE, 0, 0) & MASK
    if NARROW > 0:
        NARROW_MASK: tl.constexpr = (((1 << NARROW) - 1) << WIDE) * 0x10001
        code |= placed(narrow, AT * NARROW, 0, WIDE) & NARROW_MASK
    return code


@triton.jit
def int8_four(wide, narrow, m, AT: tl.constexpr, WIDTH: tl.constexpr):
    """Four neighbouring 8-bit codes (``lowering.int8``), a word: ``floor(m * level * F / 512 + 1/2)``.

    Computed 256 times too large and 128 codes too high in halves of a word, where nothing carries over: the upper bytes.
    """
    NUMBERS: tl.constexpr = int8_numbers(WIDTH)
    factor = m * NUMBERS[0]
    summand = m * NUMBERS[1] + NUMBERS[2]
    first = code_pair(wide, narrow, AT, WIDTH) * factor + summand
    second = code_pair(wide, narrow, AT + 1, WIDTH) * factor + summand
    return upper_bytes(first, second) ^ -0x7F7F7F80


@triton.jit
def expand_eight(
    out, target, column, keep, columns, held, factor, GROUP: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store the eight weights of a unit at ``target + column``."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    WIDE: tl.constexpr = wide_bits(WIDTH)
    UNIT_OF_LANE: tl.constexpr = 2 * GROUP + HALF
    wide, narrow, nibbles = held[: 2 * WIDE], held[2 * WIDE : 2 * WIDTH], held[2 * WIDTH]
    place = out + target + column
    if tl.int8 == DTYPE:
        m = ((nibbles >> (4 * GROUP + 16 * HALF)) & 15) + 1
        words = ()
        for FOUR in tl.static_range(2):
            words += (int8_four(wide, narrow, m, 4 * UNIT_OF_LANE + 2 * FOUR, WIDTH),)
        store_words(place.to(tl.pointer_type(tl.int32)), words, keep, 2)
    else:
        scale, offset = group_scale(nibbles, GROUP, 0, WIDTH, tl.float16)
        factor *= integers(WIDTH)
        words, numbers = (), ()
        for PAIR in tl.static_range(4):
            low, high = parted(pair(wide, narrow, scale, offset, UNIT_OF_LANE, PAIR, 0, WIDTH, tl.float16), tl.float16)
            numbers += (low * factor, high * factor)
            if tl.float32 != DTYPE:
                words += (rounded(low * factor, high * factor, DTYPE),)
        if ALIGNED and tl.float32 != DTYPE:
            store_words(place.to(tl.pointer_type(tl.int32)), words, keep & (column < columns), 4)
        else:
            for I in tl.static_range(8):  # noqa: E741 - a constant
                tl.store(place + I, numbers[I].to(DTYPE), mask=keep & (column + I < columns))


@triton.jit(do_not_specialize=["across", "columns", "scatter"])
def expand_kernel(
    words, nibbles, factors, row_index, out, units, table, across, columns, scatter,
    WIDTHS: tl.constexpr, ALIGNED: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """out[row_index[row], column] = factor * m * level, without the side branch: sixteen rows, a column block a warp.

    words and nibbles: ``fragments.pack``; factors fp16[rows]; row_index int16|int32[rows], used where ``scatter``;
    out fp16|bf16|fp32[rows, columns], or int8[rows, columns padded to 128], which takes ``lowering.int8``'s codes of
    ``m * level``, and units fp32[rows] what they count; table int32[tiles, 5]; across: column blocks.  WIDTHS has bit ``w``
    set where width ``w`` may occur.  ALIGNED: ``columns`` counts in VECTOR.
    """
    if ALIGNED:
        columns = columns * VECTOR
    entry = table + tl.program_id(0) * 5
    width, first_row, held = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    words += tl.load(entry + 3).to(tl.int64) * UNIT
    nibbles += tl.load(entry + 4).to(tl.int64) * across * 8
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    block = tl.program_id(1) * WARPS + thread // 32
    column = block * COLUMNS + lane % 4 * 8
    for W in tl.static_range(2, 9):
        if (WIDTHS >> W) & 1:  # noqa: SIM102 - known when compiled; the next is not
            if width == W:
                STEP: tl.constexpr = int8_step(W)
                found = load_blocks(words, nibbles, 1, block, across, 0, lane, block < across, W, 1)
                for HALF in tl.static_range(2):
                    row = HALF * 8 + lane // 4
                    keep = (row < held) & (block < across)
                    row = first_row + tl.minimum(row, held - 1)
                    feature = tl.where(scatter != 0, tl.load(row_index + row).to(tl.int32), row)
                    factor = tl.load(factors + row).to(tl.float32)
                    target = offsets(feature, columns)
                    if out.dtype.element_ty == tl.int8:
                        tl.store(units + feature, factor * STEP, mask=keep & (column == 0))
                    for GROUP in tl.static_range(4):
                        expand_eight(
                            out, target, column + GROUP * 32, keep, columns, found, factor, GROUP, HALF, W, ALIGNED
                        )
