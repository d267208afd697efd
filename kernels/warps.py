"""The loop of the decode kernel: every warp multiplies fragments by activations in its own registers.

Nothing passes between threads before the last sum: no shared memory, no barrier, no shuffle.  A lane loads words of
``fragments`` and eight neighbouring activations at a time, and has, in the order of its registers, what a tensor core
wants of either.
"""

# A jitted function is typed by Triton at launch, not by annotations; its tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from mixcomp.kernels.lanes import affine, joined, joint_affine, laid_over, load_words, multiply, twice
from mixcomp.kernels.operand import COLUMNS, UNIT, centre, fused, part, part_count, pattern, wide_bits
from mixcomp.kernels.side_branch import offsets


@triton.jit
def load_lane(words, BITS: tl.constexpr, lane, keep):
    """A lane's words of a plane of one block."""
    EACH: tl.constexpr = min(4, 2 * BITS)
    found = ()
    for VECTOR in tl.static_range(2 * BITS // EACH):
        found += load_words(words + (VECTOR * 32 * EACH + lane * EACH), keep, EACH, False)
    return found


@triton.jit
def load_eight(x, row, column, keep, columns, x_column, ALIGNED: tl.constexpr):
    """Eight neighbouring columns of a lane's token, zero outside: four words."""
    if ALIGNED:
        return load_words((x + row + column).to(tl.pointer_type(tl.int32)), keep & (column < columns), 4, True)
    else:
        found = ()
        for PAIR in tl.static_range(4):
            at = column + 2 * PAIR
            low = tl.load(x + row + offsets(at, x_column), mask=keep & (at < columns), other=0)
            high = tl.load(x + row + offsets(at + 1, x_column), mask=keep & (at + 1 < columns), other=0)
            found += (joined(low, high),)
        return found


@triton.jit
def placed(words, AT: tl.constexpr, FIRST: tl.constexpr, TO: tl.constexpr):
    """The word of a pair whose codes start at bit AT of a lane's halves, shifted so that bit FIRST of them lies at TO."""
    SHIFT: tl.constexpr = TO - AT % 16 - FIRST
    word = words[AT // 16]
    if SHIFT > 0:
        return word << SHIFT
    elif SHIFT < 0:
        return word >> -SHIFT
    else:
        return word


@triton.jit
def pair(
    wide, narrow, scale, offset, UNIT_OF_LANE: tl.constexpr, PAIR: tl.constexpr, PART: tl.constexpr,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One of the ``parts`` of a pair of weights, as a word."""
    BFLOAT: tl.constexpr = tl.bfloat16 == DTYPE
    WIDE: tl.constexpr = wide_bits(WIDTH)
    OF_WIDE: tl.constexpr = part(WIDTH, BFLOAT, PART, "wide")
    OF_NARROW: tl.constexpr = part(WIDTH, BFLOAT, PART, "narrow")
    TO: tl.constexpr = part(WIDTH, BFLOAT, PART, "to")
    AT: tl.constexpr = UNIT_OF_LANE * 4 + PAIR
    if OF_WIDE > 0:
        w = placed(wide, AT * WIDE, part(WIDTH, BFLOAT, PART, "first"), TO)
    code = pattern(OF_WIDE + OF_NARROW, BFLOAT)
    if OF_WIDE > 0:
        code = laid_over(w, part(WIDTH, BFLOAT, PART, "wide_mask"), code)
    if OF_NARROW > 0:
        n = placed(narrow, AT * (WIDTH - WIDE), 0, TO + OF_WIDE)
        code = laid_over(n, part(WIDTH, BFLOAT, PART, "narrow_mask"), code)
    HALF: tl.constexpr = UNIT_OF_LANE % 2
    if fused(WIDTH, BFLOAT):
        return affine(code, scale, offset, HALF, HALF, DTYPE)
    else:
        centred = affine(code, twice(1.0, BFLOAT), offset, 0, 0, DTYPE)
        return affine(centred, scale, twice(0.0, BFLOAT), HALF, 0, DTYPE)


@triton.jit
def group_scale(nibbles, GROUP: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """For the two units of a group, a half of a word each: m times the value of a part's lowest bit, and what takes off the
    centre after it or, unless ``fused``, before."""
    BFLOAT: tl.constexpr = tl.bfloat16 == DTYPE
    FIRST: tl.constexpr = part(WIDTH, BFLOAT, PART, "first")
    BITS: tl.constexpr = part(WIDTH, BFLOAT, PART, "wide") + part(WIDTH, BFLOAT, PART, "narrow")
    ONE: tl.constexpr = 128 if BFLOAT else 1024
    # m - 1 in the lowest bits of ONE's mantissa
    n = (nibbles >> (4 * GROUP)) & 0xF000F | pattern(7 if BFLOAT else 10, BFLOAT)
    scale = joint_affine(n, twice(1 << FIRST, BFLOAT), twice((1 - ONE) * (1 << FIRST), BFLOAT), DTYPE)
    offset: tl.constexpr = twice(-centre(WIDTH, FIRST, BITS), BFLOAT)
    if fused(WIDTH, BFLOAT):
        return scale, joint_affine(scale, offset, twice(0.0, BFLOAT), DTYPE)
    else:
        return scale, offset


@triton.jit
def rows_by_columns(
    held, GROUP: tl.constexpr, K16: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Sixteen rows by sixteen columns of a block (``load_blocks``), the left operand of ``multiply``."""
    WIDE: tl.constexpr = wide_bits(WIDTH)
    wide, narrow, nibbles = held[: 2 * WIDE], held[2 * WIDE : 2 * WIDTH], held[2 * WIDTH]
    scale, offset = group_scale(nibbles, GROUP, PART, WIDTH, DTYPE)
    found = ()
    for K8 in tl.static_range(2):
        for HALF in tl.static_range(2):
            found += (pair(wide, narrow, scale, offset, 2 * GROUP + HALF, 2 * K16 + K8, PART, WIDTH, DTYPE),)
    return found


@triton.jit
def multiply_blocks(
    sums, held, b, GROUP: tl.constexpr, K16: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    OCTETS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``sums`` and the products of sixteen columns; ``b``: four words of every eight tokens, for twice as many columns."""
    HELD: tl.constexpr = 2 * WIDTH + 1
    found = ()
    for BLOCK in tl.static_range(BLOCKS):
        own = sums[BLOCK * 4 * OCTETS : (BLOCK + 1) * 4 * OCTETS]
        for PART in tl.static_range(part_count(WIDTH, tl.bfloat16 == DTYPE)):
            a = rows_by_columns(held[BLOCK * HELD : (BLOCK + 1) * HELD], GROUP, K16, PART, WIDTH, DTYPE)
            added = ()
            for OCTET in tl.static_range(OCTETS):
                here = b[4 * OCTET + 2 * K16 : 4 * OCTET + 2 * K16 + 2]
                added += multiply(own[4 * OCTET : 4 * OCTET + 4], a, here, DTYPE)
            own = added
        found += own
    return found


@triton.jit
def load_blocks(
    words, nibbles, held, column_block, across, down, lane, keep, WIDTH: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """A lane's words of the BLOCKS blocks of a column block: planes, then group scales, block by block."""
    WIDE: tl.constexpr = wide_bits(WIDTH)
    found = ()
    for BLOCK in tl.static_range(BLOCKS):
        at = tl.minimum(down * BLOCKS + BLOCK, held - 1) * across + column_block
        found += load_lane(words + at * (WIDTH * UNIT), WIDE, lane, keep)
        if WIDTH > WIDE:
            found += load_lane(words + (at * WIDTH + WIDE) * UNIT, WIDTH - WIDE, lane, keep)
        found += load_words(nibbles + at * 8 + lane // 4, keep, 1, False)
    return found


@triton.jit
def stacked(values, COUNT: tl.constexpr):
    """COUNT (a power of two) tensors [threads] -> [threads, COUNT]."""
    for LEVEL in tl.static_range(1, COUNT.bit_length()):
        values = halved(values, COUNT >> LEVEL)
    return tl.reshape(values[0], (values[0].shape[0], COUNT))


@triton.jit
def halved(values, HALF: tl.constexpr):
    """2 * HALF tensors -> HALF with one axis more."""
    found = ()
    for I in tl.static_range(HALF):  # noqa: E741 - a constant
        found += (tl.join(values[I], values[I + HALF]),)
    return found


@triton.jit
def warp_sums(
    x, words, nibbles, held, first_step, last_step, across, tokens, columns, first_token, x_token, x_column,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, ALONG: tl.constexpr, DOWN: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sums over some columns of ``m * level / 2 * x`` (at 8 bits ``m * level * x``), fp32[DOWN * BLOCKS * 16, TOKENS].

    A warp multiplies BLOCKS row blocks by every ALONG-th column block; DOWN warps share those columns.
    """
    WARPS: tl.constexpr = ALONG * DOWN
    OCTETS: tl.constexpr = TOKENS // 8
    DTYPE: tl.constexpr = x.dtype.element_ty
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    along = thread // 32 // DOWN
    down = thread // 32 % DOWN
    sums = ()
    for _ in tl.static_range(4 * OCTETS * BLOCKS):
        sums += (tl.zeros((32 * WARPS,), tl.float32),)
    HELD: tl.constexpr = 2 * WIDTH + 1
    waiting = ()
    for STAGE in tl.static_range(STAGES - 1):
        column_block = first_step + STAGE * ALONG + along
        keep = column_block < last_step
        waiting += load_blocks(words, nibbles, held, column_block, across, down, lane, keep, WIDTH, BLOCKS)
    for step in tl.range(first_step, last_step, ALONG):
        column_block = step + (STAGES - 1) * ALONG + along
        keep = column_block < last_step
        waiting += load_blocks(words, nibbles, held, column_block, across, down, lane, keep, WIDTH, BLOCKS)
        column_block = step + along
        keep = column_block < last_step
        for GROUP in tl.static_range(4):
            column = column_block * COLUMNS + GROUP * 32 + lane % 4 * 8
            b = ()
            for OCTET in tl.static_range(OCTETS):
                token = first_token + OCTET * 8 + lane // 4
                row = offsets(token, x_token)
                b += load_eight(x, row, column, keep & (token < tokens), columns, x_column, ALIGNED)
            for K16 in tl.static_range(2):
                sums = multiply_blocks(sums, waiting, b, GROUP, K16, WIDTH, BLOCKS, OCTETS, DTYPE)
        waiting = waiting[BLOCKS * HELD :]
    # thread -> along, down, lane // 4, lane % 4; value -> block, tokens, r8, j
    held_sums = tl.reshape(stacked(sums, 4 * OCTETS * BLOCKS), (ALONG, DOWN, 8, 4, BLOCKS, OCTETS, 2, 2))
    held_sums = tl.permute(held_sums, (0, 1, 4, 6, 2, 5, 3, 7))
    return tl.sum(tl.reshape(held_sums, (ALONG, DOWN * BLOCKS * 16, TOKENS)), 0)
