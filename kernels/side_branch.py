"""The side branch of a site, ``out += A (s * B x)``: the inner product in its own launch, the outer one in the epilogue.

``s * B x`` is a few numbers a token and needs all columns, so it comes first; ``side_sums`` adds the rest to a tile's
sums while they are in registers.
"""

# A jitted function is typed by Triton at launch, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

#: ranks of the side branch that one step of the epilogue takes
RANK_STEP = tl.constexpr(16)


@triton.jit
def offsets(index, stride):
    """``index * stride`` in 64 bits: a site, its input or its output may hold more than 2**31 elements."""
    return index.to(tl.int64) * stride


@triton.jit
def load_x(x, token_row, column, token_keep, columns, x_column, ALIGNED: tl.constexpr):
    """x at ``token_row`` (64-bit offsets) and ``column``, zero outside; the arguments broadcast."""
    inside = token_keep & (column < columns)
    if ALIGNED:
        return tl.load(x + token_row + column, mask=inside, other=0)
    else:
        return tl.load(x + token_row + offsets(column, x_column), mask=inside, other=0)


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
        sums = tl.dot(a.to(tl.float32), tl.trans(p), acc=sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["tokens", "columns", "rank", "x_token", "x_column", "token_tiles"])
def project_kernel(
    x, branch_b, branch_scale, projected, tokens, columns, rank, x_token, x_column, token_tiles,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """projected[token, r] = branch_scale[r] * sum over columns of branch_b[r, column] * x[token, column], fp32.

    x fp16|bf16|fp32[tokens, columns] of any strides; branch_b int8[rank, columns]; branch_scale fp32[rank].
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
