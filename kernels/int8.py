"""Products of 8-bit integers for many tokens: tokens rounded by one kernel, rows by ``expand``, multiplied by another.

The sums are integers, so they depend neither on the tile nor on the order; a result is scaled and rounded once.
``lowering.int8`` says what is computed, and gives the same codes.
"""

# A jitted function is typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from mixcomp.kernels.operand import COLUMNS
from mixcomp.kernels.side_branch import load_x, offsets
from mixcomp.packed import INT8_TOP

TOP = tl.constexpr(INT8_TOP)
#: least number that a token is scaled by (``lowering.int8``)
TINY = tl.constexpr(2.0**-100)
#: added to a number of less than 2**22 and taken off again it leaves the nearest integer, the even one of two
ROUNDER = tl.constexpr(1.5 * 2.0**23)
#: columns of a token that one step of ``round_tokens_kernel`` reads
SPAN = 4096
#: row tiles that share a strip of tokens one after another, so that they find it in the L2
STRIP = tl.constexpr(8)


@dataclass(frozen=True, slots=True)
class Int8Tile:
    """``tokens`` x ``rows`` of a result, made by ``warps`` warps with ``stages`` steps of 128 columns in flight."""

    tokens: int
    rows: int
    warps: int
    stages: int


def choose(tokens: int) -> Int8Tile:
    """The tile for a product of ``tokens`` tokens."""
    return Int8Tile(64, 128, 4, 4) if tokens <= 512 else Int8Tile(256, 128, 8, 3)


@triton.jit
def nearest(x):
    """The nearest integer, the even one of two, for |x| < 2**22; still a float."""
    return (x + ROUNDER) - ROUNDER


@triton.jit(do_not_specialize=["columns", "steps", "x_token", "x_column"])
def round_tokens_kernel(x, codes, scales, columns, steps, x_token, x_column, ALIGNED: tl.constexpr, SPAN: tl.constexpr):
    """``lowering.int8.round_tokens`` of one token a program: codes int8[tokens, steps * 128], zero beyond ``columns``.

    x fp16|bf16|fp32[tokens, columns] of any strides; scales fp32[tokens].  ALIGNED: ``columns`` and ``x_token`` count in
    eights and x's columns are contiguous.
    """
    if ALIGNED:
        columns, x_token = columns * 8, x_token * 8
    token = tl.program_id(0)
    padded = steps * COLUMNS
    source, target = offsets(token, x_token), codes + offsets(token, padded)
    bits = tl.zeros((SPAN,), tl.int32)
    for first in range(0, columns, SPAN):
        numbers = load_x(x, source, first + tl.arange(0, SPAN), True, columns, x_column, ALIGNED).to(tl.float32)
        # as integers absolute values keep their order, with infinity and then NaN at its end
        bits = tl.maximum(bits, numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(bits, 0).to(tl.float32, bitcast=True)
    largest = tl.where(largest < TINY, TINY, largest)
    unit = tl.div_rn(1.0 * TOP, largest)
    for first in range(0, padded, SPAN):
        column = first + tl.arange(0, SPAN)
        numbers = load_x(x, source, column, True, columns, x_column, ALIGNED).to(tl.float32)
        tl.store(target + column, nearest(numbers * unit).to(tl.int8), mask=column < padded)
    tl.store(scales + token, tl.div_rn(largest, 1.0 * TOP))


@triton.jit(do_not_specialize=["tokens", "rows", "steps", "biased"])
def int8_linear_kernel(
    codes, scales, weight, units, bias, out, tokens, rows, steps, biased,
    ALIGNED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[token, row] = scales[token] * units[row] * sum over columns of codes * weight, plus bias[row] if ``biased``.

    codes int8[tokens, steps * 128]; weight int8[rows, steps * 128]; scales, units fp32; bias any float type; out
    fp16|bf16|fp32[tokens, rows].  ALIGNED: ``rows`` counts in eights.
    """
    if ALIGNED:
        rows = rows * 8
    down, across = tl.cdiv(tokens, TOKENS), tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    strip = program // (STRIP * across)
    held = tl.minimum(down - strip * STRIP, STRIP)
    token = (strip * STRIP + program % (STRIP * across) % held) * TOKENS + tl.arange(0, TOKENS)
    row = program % (STRIP * across) // held * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    stride = steps * COLUMNS
    a = codes + offsets(tl.minimum(token, tokens - 1), stride)[:, None] + column[None, :]
    b = weight + offsets(tl.minimum(row, rows - 1), stride)[None, :] + column[:, None]
    sums = tl.zeros((TOKENS, ROWS), tl.int32)
    for _ in tl.range(0, steps, num_stages=STAGES):
        sums = tl.dot(tl.load(a), tl.load(b), acc=sums, out_dtype=tl.int32)
        a += COLUMNS
        b += COLUMNS
    token_keep, row_keep = token < tokens, row < rows
    scale = tl.load(scales + token, mask=token_keep, other=0)
    unit = tl.load(units + row, mask=row_keep, other=0)
    result = sums.to(tl.float32) * scale[:, None] * unit[None, :]
    if biased != 0:
        result += tl.load(bias + row, mask=row_keep, other=0).to(tl.float32)[None, :]
    target = out + offsets(token, rows)[:, None] + row[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=token_keep[:, None] & row_keep[None, :])
