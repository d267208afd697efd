"""From words of ``fragments`` to a tensor-core operand, in the registers of the threads that loaded them.

A code of width w becomes ``m * level`` (or half of it, which the row factor makes up for) in three instructions a pair:
shift; lay its bits into the mantissas of two fp16 numbers 2**w, which then are 2**w + code; one fused multiply-add with m
and ``-m * centre``.  What it leaves has 11 bits at most: exact.  At width 6 ``m * centre`` itself has 12 bits, so there
the centre is taken off first.  bf16 holds 8 bits: every plane of at most 4 bits is an operand of its own.
"""

# A jitted function is typed by Triton at launch, not by annotations; its tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

import os

import triton
import triton.language as tl

from mixcomp.format import PLANES
from mixcomp.kernels import fragments

#: Triton's interpreter knows no assembly
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
COLUMNS = tl.constexpr(fragments.COLUMNS)
UNIT = tl.constexpr(fragments.UNIT)


@triton.constexpr_function
def wide_bits(width):
    """Bits of a width's first plane, the wider one where there are two."""
    return PLANES[width][0]


@triton.constexpr_function
def parts(width, bfloat):
    """What a weight is the sum of, each with numbers by name.

    ``first``: its lowest bit in the code; ``wide``, ``narrow``: bits of either plane; ``to``: where ``first`` lies in half
    a word for them to be the last digits of ``2**bits + code``; ``wide_mask``, ``narrow_mask``: those bits of a word.
    """
    wide, narrow = PLANES[width][0], width - PLANES[width][0]
    split = [(first, min(4, wide), 0) for first in range(0, wide, 4)] + ([(wide, 0, narrow)] if narrow else [])
    found = []
    for first, w, n in split if bfloat else [(0, wide, narrow)]:
        to = (7 if bfloat else 10) - w - n
        masks = {"wide_mask": ((1 << w) - 1 << to) * 0x10001, "narrow_mask": ((1 << n) - 1 << to + w) * 0x10001}
        found.append({"first": first, "wide": w, "narrow": n, "to": to, **masks})
    return found


@triton.constexpr_function
def part_count(width, bfloat):
    """How many operands the weights of a width take."""
    return len(parts(width, bfloat))


@triton.constexpr_function
def part(width, bfloat, index, what):
    """A number of one of the ``parts``."""
    return parts(width, bfloat)[index][what]


@triton.constexpr_function
def centre(width, first, bits):
    """What ``2**bits`` plus a part of the code has to lose, in units of the part's lowest bit.

    Over the parts the rest sums to ``code - (2**width - 1) / 2``, half a level, or at 8 bits to ``code - 128``.
    """
    return 2**bits + (2**bits - (0 if width == 8 and first == 0 else 1)) / 2


@triton.constexpr_function
def fused(width, bfloat):
    """Whether ``m * centre`` is exact in the type."""
    return width != 6 and not bfloat


@triton.constexpr_function
def pattern(bits, bfloat):
    """Two floats ``2**bits`` in a word."""
    return ((127 + bits) << 7 if bfloat else (15 + bits) << 10) * 0x10001


@triton.constexpr_function
def assembly(wide_mask, narrow_mask, one, fused, bfloat):
    """``(wide & wide_mask | narrow & narrow_mask | one) * scale + offset``, or ``(... + offset) * scale``."""
    kind = "bf16x2" if bfloat else "f16x2"
    unit = 0x3F803F80 if bfloat else 0x3C003C00
    lines = [
        ".reg .b32 x, a, b, c;",
        f"mov.b32 x, {one};",
        f"lop3.b32 x, $2, {wide_mask}, x, 0xEA;" if wide_mask else "",
        f"lop3.b32 x, $3, {narrow_mask}, x, 0xEA;" if narrow_mask else "",
        "mov.b32 a, {$4, $4};",
        "mov.b32 b, {$5, $5};",
    ]
    if fused:
        lines.append(f"fma.rn.{kind} x, x, a, b;")
    else:
        lines += [
            f"mov.b32 c, {unit};",
            f"fma.rn.{kind} x, x, c, b;",
            "mov.b32 c, 0x80008000;",
            f"fma.rn.{kind} x, x, a, c;",
        ]
    return "{ " + " ".join(lines) + " mov.b32 {$0, $1}, x; }"


@triton.jit
def affine(
    wide, narrow, scale, offset,
    WIDE_MASK: tl.constexpr, NARROW_MASK: tl.constexpr, ONE: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """``assembly`` for the two floats of every word, exact: (lower, upper), of scale's type."""
    if INTERPRETED:
        x = (wide & WIDE_MASK) | (narrow & NARROW_MASK) | ONE
        low = (x & 0xFFFF).to(tl.uint16).to(scale.dtype, bitcast=True).to(tl.float32)
        high = ((x >> 16) & 0xFFFF).to(tl.uint16).to(scale.dtype, bitcast=True).to(tl.float32)
        a, b = scale.to(tl.float32), offset.to(tl.float32)
        if FUSED:
            return (low * a + b).to(scale.dtype), (high * a + b).to(scale.dtype)
        else:
            return ((low + b) * a).to(scale.dtype), ((high + b) * a).to(scale.dtype)
    else:
        ASM: tl.constexpr = assembly(WIDE_MASK, NARROW_MASK, ONE, FUSED, scale.dtype == tl.bfloat16)
        return tl.inline_asm_elementwise(
            ASM, "=h,=h,r,r,h,h", [wide, narrow, scale, offset], dtype=(scale.dtype, scale.dtype), is_pure=True, pack=1
        )


@triton.jit
def load_plane(words, AT: tl.constexpr, BITS: tl.constexpr, lane, keep):
    """A plane of some blocks, int32[threads, blocks, vectors, words]; ``words`` points at blocks [.., .., 1, 1]."""
    EACH: tl.constexpr = min(4, 2 * BITS)
    vector = tl.arange(0, 2 * BITS // EACH)[None, None, :, None]
    word = tl.arange(0, EACH)[None, None, None, :]
    return tl.load(words + (AT * UNIT + vector * (32 * EACH) + lane * EACH + word), mask=keep, other=0)


@triton.jit
def per_unit(words, BITS: tl.constexpr):
    """Words of a plane -> a word for every unit, int32[threads, blocks, 8]; two of them at 8 bits."""
    if BITS == 1:
        words = tl.join(tl.join(words, words >> 8), tl.join(words >> 4, words >> 12))
    if BITS == 2:
        words = tl.join(words, words >> 8)
    if BITS == 8:
        return tl.split(tl.reshape(words, (words.shape[0], words.shape[1], 8, 2)))
    else:
        words = tl.reshape(words, (words.shape[0], words.shape[1], 8))
        return words, words


@triton.jit
def placed(units, PAIR: tl.constexpr, PLANE: tl.constexpr, FIRST: tl.constexpr, TO: tl.constexpr):
    """Words shifted so that bit FIRST of the codes of a pair lies at bit TO of each half."""
    AT: tl.constexpr = (PAIR * PLANE) % 16 + FIRST
    word = units[PAIR * PLANE // 16]
    if AT < TO:
        return word << (TO - AT)
    elif AT > TO:
        return word >> (AT - TO)
    else:
        return word


@triton.jit
def group_scales(nibbles, DTYPE: tl.constexpr):
    """A word of eight nibbles -> m = 1..16 of eight units, [threads, blocks, 8]."""
    n = (nibbles >> (tl.arange(0, 8) * 4)[None, None, :]) & 15
    if tl.bfloat16 == DTYPE:
        return (n | 0x4300).to(tl.uint16).to(DTYPE, bitcast=True) - 127
    else:
        return (n | 0x6400).to(tl.uint16).to(DTYPE, bitcast=True) - 1023


@triton.jit
def operand(wide, narrow, m, PART: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr, BLOCKS: tl.constexpr):
    """One of the ``parts`` of a step's weights, [WARPS, BLOCKS * 16, 128], columns in order.

    ``wide`` and ``narrow``: what ``per_unit`` returned; m: fp16|bf16[threads, blocks, 8].
    """
    BFLOAT: tl.constexpr = m.dtype == tl.bfloat16
    WIDE: tl.constexpr = wide_bits(WIDTH)
    FIRST: tl.constexpr = part(WIDTH, BFLOAT, PART, "first")
    OF_WIDE: tl.constexpr = part(WIDTH, BFLOAT, PART, "wide")
    OF_NARROW: tl.constexpr = part(WIDTH, BFLOAT, PART, "narrow")
    BITS: tl.constexpr = OF_WIDE + OF_NARROW
    TO: tl.constexpr = part(WIDTH, BFLOAT, PART, "to")
    WIDE_MASK: tl.constexpr = part(WIDTH, BFLOAT, PART, "wide_mask")
    NARROW_MASK: tl.constexpr = part(WIDTH, BFLOAT, PART, "narrow_mask")
    CENTRE: tl.constexpr = centre(WIDTH, FIRST, BITS)
    FUSED: tl.constexpr = fused(WIDTH, BFLOAT)
    scale = m * (1 << FIRST)
    if FUSED:  # noqa: SIM108 - the two have different types to Triton
        offset = m * -CENTRE
    else:
        offset = tl.full(m.shape, -CENTRE, m.dtype)
    lower, upper = (), ()
    for PAIR in tl.static_range(4):
        if OF_WIDE > 0:
            w = placed(wide, PAIR, WIDE, FIRST, TO)
        if OF_NARROW > 0:
            n = placed(narrow, PAIR, WIDTH - WIDE, 0, TO + OF_WIDE)
            if OF_WIDE == 0:
                w = n
        else:
            n = w
        low, high = affine(w, n, scale, offset, WIDE_MASK, NARROW_MASK, pattern(BITS, BFLOAT), FUSED)
        lower += (low,)
        upper += (high,)
    low = tl.join(tl.join(lower[0], lower[2]), tl.join(lower[1], lower[3]))
    high = tl.join(tl.join(upper[0], upper[2]), tl.join(upper[1], upper[3]))
    # warp, lane // 4, lane % 4, block, group, half, k16, k2, k1
    all_of_it = tl.reshape(tl.join(low, high), (WARPS, 8, 4, BLOCKS, 4, 2, 2, 2, 2))
    return tl.reshape(tl.permute(all_of_it, (0, 3, 5, 1, 4, 6, 2, 7, 8)), (WARPS, BLOCKS * 16, COLUMNS))
