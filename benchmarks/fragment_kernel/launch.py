"""From tensors to one launch: argument checks, the tile, the cached table, the grid.

Nothing here waits for the device or looks at its data.  The first call for a format copies its tile tables to the
device (and the first for a kernel compiles it), so a CUDA graph is captured after one ordinary call, as usual.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from fragment_kernel import fragments, tiles
from fragment_kernel.gemm import VECTOR, mixed_linear_kernel
from mixcomp.errors import InputError
from mixcomp.kernels.launch import check, project
from mixcomp.kernels.tiles import width_mask

if TYPE_CHECKING:
    from fragment_kernel.tiles import Tile
    from mixcomp.format import SiteFormat

#: streams that have counters of their own, and tiles that each of them can count
STREAMS, COUNTERS = 32, 4096


@cache
def table(fmt: SiteFormat, rows: int, device: torch.device) -> torch.Tensor:
    """int32[tiles, 5] on the device (``tiles.tile_table``).

    Kept for the life of the process, because a captured CUDA graph reads it at every replay.
    """
    return torch.tensor(tiles.tile_table(fmt, rows), dtype=torch.int32, device=device)


@cache
def counters(device: torch.device) -> torch.Tensor:
    """int32[STREAMS, COUNTERS]: how many programs of a tile are done, zero between launches."""
    return torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)


_slots: dict[tuple[torch.device, int], int] = {}


def stream_slot(device: torch.device) -> int:
    """The counters of the current stream: launches on one stream do not overlap, launches on two may."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _slots.setdefault((device, stream), len(_slots) % STREAMS)


def mixed_linear(
    x2d: torch.Tensor,
    words: torch.Tensor,
    nibbles: torch.Tensor,
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
    overlap: bool = False,
) -> torch.Tensor:
    """``x @ weight.T + bias`` of one site: x2d fp16|bf16|fp32[tokens, columns] -> the same type, [tokens, rows].

    The tensors are those of ``fragments.operands``, contiguous, on x2d's device; bias is any float type[rows] in output
    order.  x2d may have any strides.  All segments take one launch; a side branch takes one more, before it.  ``out``
    (contiguous) receives the result; ``tile`` overrides ``tiles.choose``; ``overlap`` lets the launch begin before its
    predecessor on the stream has ended.  Raises ``InputError``.
    """
    check(x2d, words, out, fmt)
    if words.data_ptr() % 16:
        raise InputError("words must start at a multiple of 16 bytes, as a tensor of its own does; pass words.clone()")
    tokens = x2d.shape[0]
    if out is None:
        out = torch.empty(tokens, fmt.rows, dtype=x2d.dtype, device=x2d.device)
    if tokens == 0:
        return out
    tile = tile or tiles.choose(tokens, x2d.element_size())
    x_token, x_column = x2d.stride() if tokens > 1 else (0, x2d.stride(1))
    unit = VECTOR.value
    aligned = fmt.columns % unit == 0 and x_token % unit == 0 and x_column == 1 and x2d.data_ptr() % 16 == 0
    entries = table(fmt, tile.rows, x2d.device)
    token_tiles = -(-tokens // tile.tokens)
    count = entries.shape[0] * token_tiles
    splits = tiles.splits(tile, count, fmt) if count <= COUNTERS else 1
    done = counters(x2d.device)[stream_slot(x2d.device)]
    partial = done.view(torch.float32)
    if splits > 1:
        partial = torch.empty(count * splits * tile.rows * tile.tokens, dtype=torch.float32, device=x2d.device)
    # what a site lacks is a flag and any pointer of the usual type, not another kernel to compile
    index = factors.view(torch.int16) if row_index is None else row_index
    with torch.cuda.device_of(x2d):
        projected = project(x2d, branch_b, branch_scale, fmt) if fmt.rank else None
        mixed_linear_kernel[(count * splits,)](
            x2d, words, nibbles, factors, index, branch_a, projected, out if bias is None else bias, out, entries,
            partial, done, fragments.blocks(fmt.columns, fragments.COLUMNS), tokens,
            fmt.columns // unit if aligned else fmt.columns, fmt.rank,
            x_token // unit if aligned else x_token, x_column, fmt.rows, token_tiles, splits,
            int(row_index is not None), int(bias is not None),
            WIDTHS=width_mask(fmt), ALIGNED=aligned, BLOCKS=tile.blocks, ALONG=tile.along, DOWN=tile.down,
            TOKENS=tile.tokens, STAGES=tile.stages, OVERLAP=overlap, num_warps=tile.along * tile.down,
            **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return out
