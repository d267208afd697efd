"""From tensors to one launch: argument checks, the tile, the cached table, the grid.

Nothing here waits for the device or looks at its data.  The first call for a format copies its tile tables to the
device (and the first for a kernel compiles it), so a CUDA graph is captured after one ordinary call, as usual.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import triton

from mixcomp.errors import InputError
from mixcomp.kernels import tiles
from mixcomp.kernels.mixed_gemm import COLUMN_UNIT, TOKEN_UNIT, mixed_linear_kernel, project_kernel

if TYPE_CHECKING:
    from mixcomp.format import SiteFormat
    from mixcomp.kernels.tiles import Tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = not isinstance(mixed_linear_kernel, triton.JITFunction)


@cache
def tables(fmt: SiteFormat, device: torch.device) -> dict[int, torch.Tensor]:
    """Rows of a tile -> int32[tiles, 5] on the device (``tiles.tile_table``), for every size a tile may have.

    Kept for the life of the process, because a captured CUDA graph reads them at every replay.
    """
    return {
        rows: torch.tensor(tiles.tile_table(fmt, rows), dtype=torch.int32, device=device) for rows in tiles.ROW_TILES
    }


def mixed_linear(
    x2d: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    factors: torch.Tensor,
    row_index: torch.Tensor | None,
    branch_a: torch.Tensor | None,
    branch_b: torch.Tensor | None,
    branch_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    fmt: SiteFormat,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias`` of one site: x2d fp16|bf16|fp32[tokens, columns] -> the same type, [tokens, rows].

    The tensors are those of ``SiteFormat.tensors``, contiguous, on x2d's device; bias is any float type[rows] in output
    order.  x2d may have any strides.  All segments take one launch; a side branch takes one more, before it.
    ``out`` (contiguous) receives the result; ``tile`` overrides ``tiles.choose``.  Raises ``InputError``.
    """
    check(x2d, codes, out, fmt)
    tokens = x2d.shape[0]
    if out is None:
        out = torch.empty(tokens, fmt.rows, dtype=x2d.dtype, device=x2d.device)
    if tokens == 0:
        return out
    tile = tile or tiles.choose(tokens, x2d.element_size())
    x_token, x_column = x2d.stride() if tokens > 1 else (0, x2d.stride(1))
    aligned = fmt.columns % COLUMN_UNIT.value == 0 and x_token % TOKEN_UNIT.value == 0 and x_column == 1
    table = tables(fmt, x2d.device)[tile.rows]
    token_tiles = -(-tokens // tile.tokens)
    # what a site lacks is a flag and any pointer of the usual type, not another kernel to compile
    index = factors.view(torch.int16) if row_index is None else row_index
    with torch.cuda.device_of(x2d):
        projected = project(x2d, branch_b, branch_scale, fmt) if fmt.rank else None
        mixed_linear_kernel[(table.shape[0] * token_tiles,)](
            x2d, codes.view(torch.int32), scales, factors, index, branch_a, projected,
            out if bias is None else bias, out, table,
            tokens, fmt.columns // COLUMN_UNIT.value if aligned else fmt.columns, fmt.rank,
            x_token // TOKEN_UNIT.value if aligned else x_token, x_column, fmt.rows, token_tiles,
            int(row_index is not None), int(bias is not None),
            WIDTHS=tiles.width_mask(fmt), ALIGNED=aligned, ROWS=tile.rows, TOKENS=tile.tokens, COLUMNS=tile.columns,
            STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out


def project(
    x: torch.Tensor, branch_b: torch.Tensor | None, branch_scale: torch.Tensor | None, fmt: SiteFormat
) -> torch.Tensor:
    """The side branch's inner product, fp32[tokens, rank]: ``x @ branch_b.T * branch_scale``."""
    tokens = x.shape[0]
    tile = tiles.choose_projection(tokens)
    token_tiles = -(-tokens // tile.tokens)
    projected = torch.empty(tokens, fmt.rank, dtype=torch.float32, device=x.device)
    project_kernel[(-(-fmt.rank // tile.rows) * token_tiles,)](
        x, branch_b, branch_scale, projected, tokens, fmt.columns, fmt.rank, *x.stride(), token_tiles,
        RANKS=tile.rows, TOKENS=tile.tokens, COLUMNS=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return projected


def check(x2d: torch.Tensor, codes: torch.Tensor, out: torch.Tensor | None, fmt: SiteFormat) -> None:
    """Refuse what the kernel would misread; the stored tensors themselves are checked where they are loaded."""
    if x2d.dim() != 2 or x2d.shape[1] != fmt.columns or x2d.dtype not in DTYPES:
        raise InputError(
            f"x2d is {x2d.dtype}{tuple(x2d.shape)}; this site takes [tokens, {fmt.columns}] in one of {DTYPES}"
        )
    if codes.device != x2d.device or not (x2d.is_cuda or INTERPRETED):
        raise InputError(
            f"x2d is on {x2d.device} and codes on {codes.device}; the Triton kernel needs both on one CUDA device"
        )
    if codes.data_ptr() % 4:
        raise InputError("codes must start at a multiple of 4 bytes, as a tensor of its own does; pass codes.clone()")
    if out is not None:
        shape = (x2d.shape[0], fmt.rows)
        if tuple(out.shape) != shape or out.dtype != x2d.dtype or out.device != x2d.device or not out.is_contiguous():
            raise InputError(
                f"out is {out.dtype}{tuple(out.shape)} on {out.device}; it must be contiguous {x2d.dtype}{shape}"
            )
