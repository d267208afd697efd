"""From words of ``fragments`` to a tensor-core operand: where the bits of a code go (``warps`` puts them there).

A code of width w becomes ``m * level`` (or half of it, which the row factor makes up for) in three instructions a pair:
shift; lay its bits into the mantissas of two fp16 numbers 2**w, which then are 2**w + code; one fused multiply-add with m
and ``-m * centre``.  What it leaves has 11 bits at most: exact.  At width 6 ``m * centre`` itself has 12 bits, so there
the centre is taken off first.  bf16 holds 8 bits: every plane of at most 4 bits is an operand of its own.
"""

# A jitted function is typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def"

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
