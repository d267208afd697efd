"""From tensors to launches: argument checks, the tile, the cached table, the grid.

Nothing here waits for the device or looks at its data.  What all calls of a format with a number of tokens share is found
once (``_plan``), and so is the compiled kernel (``start``), because an eager call at one token should not cost the
processor more than the device.  The first call for a format and a tile copies the tile table to the device (and the first
for a kernel compiles it), so a CUDA graph is captured after an ordinary call of the same shape, as usual.

Programs that share a tile count themselves in counters that belong to a stream.  A graph keeps those of the stream it
was captured on: two graphs of one capture stream must not be replayed at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Any

import torch
import triton

from mixcomp.errors import InputError
from mixcomp.format import BLOCK, blocks
from mixcomp.kernels import int8, tiles
from mixcomp.kernels.expand import expand_kernel
from mixcomp.kernels.gemm import VECTOR, mixed_linear_kernel
from mixcomp.kernels.side_branch import project_kernel

if TYPE_CHECKING:
    from mixcomp.format import SiteFormat
    from mixcomp.kernels.tiles import Tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = not isinstance(mixed_linear_kernel, triton.JITFunction)
#: streams that have counters of their own, and tiles that each of them can count
STREAMS, COUNTERS = 64, 4096
#: warps of a program that expands a weight: each takes a column block
EXPAND_WARPS = 4
#: a product is rounded before anything is added to it, as in plain torch: codes are the same everywhere
SEPARATE = {"enable_fp_fusion": False}
UNIT = VECTOR.value

Maybe = torch.Tensor | None

_slots: dict[tuple[torch.device, int], torch.Tensor] = {}
_compiled: dict[tuple[Any, ...], Any] = {}


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


def stream_counters(device: torch.device) -> torch.Tensor:
    """The counters of the current stream: launches on one stream do not overlap, launches on two may."""
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    found = _slots.get((device, stream))
    if found is None:
        found = _slots[device, stream] = counters(device)[len(_slots) % STREAMS]
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What launches of a format share that have as many tokens of one size on one device."""

    entries: torch.Tensor
    programs: tuple[int, int, int]
    token_tiles: int
    splits: int
    partial: int  # sums that programs leave to each other
    nothing: torch.Tensor  # what is handed over where there are none
    no_index: torch.Tensor  # and where there is no row index
    across: int
    widths: int
    tile: tuple[int, int, int, int, int]
    warps: int


@lru_cache(maxsize=1 << 16)
def _plan(fmt: SiteFormat, tokens: int, element_bytes: int, device: torch.device, given: Tile | None) -> _Plan:
    tile = given or tiles.choose(fmt, tokens, element_bytes)
    entries = table(fmt, tile.rows, device)
    token_tiles = blocks(tokens, tile.tokens)
    count = entries.shape[0] * token_tiles
    splits = tiles.splits(tile, count, fmt) if count <= COUNTERS else 1
    partial = count * splits * tile.rows * tile.tokens if splits > 1 else 0
    numbers = tile.blocks, tile.along, tile.down, tile.tokens, tile.stages
    return _Plan(
        entries, (count * splits, 1, 1), token_tiles, splits, partial, counters(device).view(torch.float32),
        counters(device).view(torch.int16), blocks(fmt.columns, BLOCK[1]), tiles.width_mask(fmt), numbers,
        tile.along * tile.down,
    )  # fmt: skip


def mixed_linear(
    x2d: torch.Tensor, words: torch.Tensor, nibbles: torch.Tensor, factors: torch.Tensor, row_index: Maybe,
    branch_a: Maybe, branch_b: Maybe, branch_scale: Maybe, bias: Maybe, fmt: SiteFormat,
    *, out: Maybe = None, tile: Tile | None = None,
) -> torch.Tensor:  # fmt: skip
    """``x @ weight.T + bias`` of one site: x2d fp16|bf16|fp32[tokens, columns] -> the same type, [tokens, rows].

    The tensors are those of ``SiteFormat.fragments``, contiguous, on x2d's device; bias is any float type[rows] in output
    order.  x2d may have any strides.  All segments take one launch; a side branch takes one more, before it.  ``out``
    (contiguous) receives the result; ``tile`` overrides ``tiles.choose``.  Raises ``InputError``.
    """
    check(x2d, words, out, fmt)
    tokens, device = x2d.shape[0], x2d.device
    if out is None:
        out = torch.empty(tokens, fmt.rows, dtype=x2d.dtype, device=device)
    if tokens == 0:
        return out
    plan = _plan(fmt, tokens, x2d.element_size(), device, tile)
    x_token, x_column = x2d.stride() if tokens > 1 else (0, x2d.stride(1))
    aligned = aligned_rows(x2d, x_token, x_column)
    partial = torch.empty(plan.partial, dtype=torch.float32, device=device) if plan.partial else plan.nothing
    # what a site lacks is a flag and any pointer of the usual type, not another kernel to compile
    index = plan.no_index if row_index is None else row_index
    projected = project(x2d, branch_b, branch_scale, fmt) if fmt.rank else None
    start(
        mixed_linear_kernel, plan.programs,
        (x2d, words, nibbles, factors, index, branch_a, projected, out if bias is None else bias, out, plan.entries,
         partial, stream_counters(device)),
        (plan.across, tokens, fmt.columns // UNIT if aligned else fmt.columns, fmt.rank,
         x_token // UNIT if aligned else x_token, x_column, fmt.rows, plan.token_tiles, plan.splits,
         int(row_index is not None), int(bias is not None)),
        (plan.widths, aligned, *plan.tile), plan.warps, {},
    )  # fmt: skip
    return out


def aligned_rows(x: torch.Tensor, x_token: int, x_column: int) -> bool:
    """Whether rows start at 16 bytes and hold a multiple of 8 columns."""
    return x.shape[1] % UNIT == 0 and x_token % UNIT == 0 and x_column == 1 and x.data_ptr() % 16 == 0


def project(x: torch.Tensor, branch_b: Maybe, branch_scale: Maybe, fmt: SiteFormat) -> torch.Tensor:
    """The side branch's inner product, fp32[tokens, rank]: ``x @ branch_b.T * branch_scale``."""
    tokens = x.shape[0]
    tile = tiles.choose_projection(tokens)
    token_tiles = blocks(tokens, tile.tokens)
    projected = torch.empty(tokens, fmt.rank, dtype=torch.float32, device=x.device)
    start(
        project_kernel, (blocks(fmt.rank, tile.ranks) * token_tiles, 1, 1), (x, branch_b, branch_scale, projected),
        (tokens, fmt.columns, fmt.rank, *x.stride(), token_tiles), (tile.ranks, tile.tokens, tile.columns), 4,
        {"num_stages": 1 if tile.tokens == 1 else 2},
    )  # fmt: skip
    return projected


def expanded(
    words: torch.Tensor, nibbles: torch.Tensor, factors: torch.Tensor, row_index: Maybe, fmt: SiteFormat,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The weight without its side branch, ``dtype`` (fp16|bf16|fp32)[rows, columns], rows in output order.

    The tensors are those of ``SiteFormat.fragments``; exact in fp32, else rounded once.
    """
    out = torch.empty(fmt.rows, fmt.columns, dtype=dtype, device=words.device)
    _expand(words, nibbles, factors, row_index, out, None, fmt)
    return out


def int8_rows(
    words: torch.Tensor, nibbles: torch.Tensor, factors: torch.Tensor, row_index: Maybe, fmt: SiteFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in 8-bit codes: int8[rows, columns padded to 128], units fp32[rows] (``lowering.int8.round_rows``)."""
    padded = blocks(fmt.columns, BLOCK[1]) * BLOCK[1]
    out = torch.empty(fmt.rows, padded, dtype=torch.int8, device=words.device)
    units = torch.empty(fmt.rows, dtype=torch.float32, device=words.device)
    _expand(words, nibbles, factors, row_index, out, units, fmt)
    return out, units


def _expand(
    words: torch.Tensor, nibbles: torch.Tensor, factors: torch.Tensor, row_index: Maybe, out: torch.Tensor,
    units: Maybe, fmt: SiteFormat,
) -> None:  # fmt: skip
    entries = table(fmt, BLOCK[0], words.device)
    across, columns = blocks(fmt.columns, BLOCK[1]), out.shape[1]
    aligned = columns % UNIT == 0
    index = factors.view(torch.int16) if row_index is None else row_index
    start(
        expand_kernel, (entries.shape[0], blocks(across, EXPAND_WARPS), 1),
        (words, nibbles, factors, index, out, units, entries),
        (across, columns // UNIT if aligned else columns, int(row_index is not None)),
        (tiles.width_mask(fmt), aligned, EXPAND_WARPS), EXPAND_WARPS, {},
    )  # fmt: skip


def expanded_linear(
    x2d: torch.Tensor, words: torch.Tensor, nibbles: torch.Tensor, factors: torch.Tensor, row_index: Maybe,
    branch_a: Maybe, branch_b: Maybe, branch_scale: Maybe, bias: Maybe, fmt: SiteFormat,
) -> torch.Tensor:  # fmt: skip
    """``mixed_linear`` for many tokens: the weight is expanded for the call and multiplied by cuBLAS.

    Takes and returns the same; weight and bias are rounded to x2d's type, the side branch's products twice.
    """
    check(x2d, words, None, fmt)
    weight = expanded(words, nibbles, factors, row_index, fmt, x2d.dtype)
    bias = None if bias is None else bias.to(x2d.dtype)
    if branch_a is None:
        return torch.nn.functional.linear(x2d, weight, bias)
    inner, outer = _branch(x2d, row_index, branch_a, branch_b, branch_scale, fmt)
    return torch.nn.functional.linear(inner, outer, bias).addmm_(x2d, weight.t())


def int8_linear(
    x2d: torch.Tensor, words: torch.Tensor, nibbles: torch.Tensor, factors: torch.Tensor, row_index: Maybe,
    branch_a: Maybe, branch_b: Maybe, branch_scale: Maybe, bias: Maybe, fmt: SiteFormat,
    *, tile: int8.Int8Tile | None = None,
) -> torch.Tensor:  # fmt: skip
    """The same in 8-bit integers (``lowering.int8``): tokens are rounded, the weight expanded for the call."""
    check(x2d, words, None, fmt)
    tokens = x2d.shape[0]
    out = torch.empty(tokens, fmt.rows, dtype=x2d.dtype, device=x2d.device)
    if tokens == 0:
        return out
    codes, scales = int8_tokens(x2d)
    weight, units = int8_rows(words, nibbles, factors, row_index, fmt)
    tile, aligned = tile or int8.choose(tokens), fmt.rows % UNIT == 0
    start(
        int8.int8_linear_kernel, (blocks(tokens, tile.tokens) * blocks(fmt.rows, tile.rows), 1, 1),
        (codes, scales, weight, units, out if bias is None else bias, out),
        (tokens, fmt.rows // UNIT if aligned else fmt.rows, blocks(fmt.columns, BLOCK[1]), int(bias is not None)),
        (aligned, tile.tokens, tile.rows, tile.stages), tile.warps, {},
    )  # fmt: skip
    if branch_a is not None:
        inner, outer = _branch(x2d, row_index, branch_a, branch_b, branch_scale, fmt)
        out.addmm_(inner, outer.t())
    return out


def int8_tokens(x2d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x2d fp16|bf16|fp32[tokens, columns] -> codes int8[tokens, columns padded to 128 by 0], scales fp32[tokens]."""
    tokens, columns = x2d.shape
    steps = blocks(columns, BLOCK[1])
    codes = torch.empty(tokens, steps * BLOCK[1], dtype=torch.int8, device=x2d.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x2d.device)
    x_token, x_column = x2d.stride()
    aligned = aligned_rows(x2d, x_token, x_column)
    start(
        int8.round_tokens_kernel, (tokens, 1, 1), (x2d, codes, scales),
        (columns // UNIT if aligned else columns, steps, x_token // UNIT if aligned else x_token, x_column),
        (aligned, int8.SPAN), 4, SEPARATE,
    )  # fmt: skip
    return codes, scales


def _branch(
    x: torch.Tensor, row_index: Maybe, branch_a: torch.Tensor, branch_b: Maybe, branch_scale: Maybe, fmt: SiteFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """The side branch for many tokens: [tokens, rank] and [rows, rank] in output order, of x's type."""
    outer = branch_a.to(x.dtype)
    if row_index is not None:
        outer = torch.empty_like(outer).index_copy_(0, row_index.long(), outer)
    return project(x, branch_b, branch_scale, fmt).to(x.dtype), outer


def start(
    kernel: Any, programs: tuple[int, int, int], tensors: tuple[Maybe, ...], numbers: tuple[int, ...],
    constants: tuple[Any, ...], warps: int, options: dict[str, Any],
) -> None:  # fmt: skip
    """Launch on the current stream of the first tensor's device, by the compiled kernel found before where that is safe.

    A compiled kernel depends on the tensors' types, the constants, and on which tensors start at 16 bytes and which
    numbers need 64 bits: here, all and none.
    """
    device = tensors[0].device.index if tensors[0] is not None and not INTERPRETED else None
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, programs, tensors, numbers, constants, warps, options)
        return
    places = reduce(or_, [tensor.data_ptr() for tensor in tensors if tensor is not None])
    usual = places % 16 == 0 and max(numbers) < 2**31
    key = id(kernel), device, constants, *[None if tensor is None else tensor.dtype for tensor in tensors]
    found = _compiled.get(key) if usual else None
    if found is not None:
        found[programs](*tensors, *numbers, *constants)
        return
    found = kernel[programs](*tensors, *numbers, *constants, num_warps=warps, **options)
    if usual and not INTERPRETED:
        _compiled[key] = found


def check(x2d: torch.Tensor, words: torch.Tensor, out: torch.Tensor | None, fmt: SiteFormat) -> None:
    """Refuse what the kernels would misread; the stored tensors themselves are checked where they are loaded."""
    if x2d.dim() != 2 or x2d.shape[1] != fmt.columns or x2d.dtype not in DTYPES:
        raise InputError(
            f"x2d is {x2d.dtype}{tuple(x2d.shape)}; this site takes [tokens, {fmt.columns}] in one of {DTYPES}"
        )
    if words.device != x2d.device or not (x2d.is_cuda or INTERPRETED):
        raise InputError(
            f"x2d is on {x2d.device} and codes on {words.device}; the Triton kernel needs both on one CUDA device"
        )
    if words.data_ptr() % 16:
        raise InputError("words must start at a multiple of 16 bytes, as a tensor of its own does; pass words.clone()")
    if out is not None:
        shape = (x2d.shape[0], fmt.rows)
        if tuple(out.shape) != shape or out.dtype != x2d.dtype or out.device != x2d.device or not out.is_contiguous():
            raise InputError(
                f"out is {out.dtype}{tuple(out.shape)} on {out.device}; it must be contiguous {x2d.dtype}{shape}"
            )
