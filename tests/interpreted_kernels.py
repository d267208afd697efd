"""The Triton kernels under Triton's interpreter, on the CPU: run by ``test_kernels_interpreter`` in its own process.

Every tensor lies against a page that may not be touched, so a read or write outside of it ends the process.
fp16 and fp32 only: the interpreter computes with the encodings of bf16 (the last test notices when it no longer does).
"""

from __future__ import annotations

import ctypes
import mmap
import random

import pytest
import torch
import triton
import triton.language as tl

from kernel_cases import EDGES, Case, dyadic, exact, operands, random_format
from mixcomp.errors import InputError
from mixcomp.format import WIDTHS, Segment, SiteFormat
from mixcomp.kernels import fragments, gemm, launch, tiles
from mixcomp.kernels.side_branch import offsets

CASES = 200
F16, F32 = torch.float16, torch.float32
#: few programs and many: with columns whole and split
ONE = tiles.Tile(blocks=2, along=4, down=1, tokens=8, stages=3, programs=264)
FLAT = tiles.Tile(blocks=1, along=1, down=1, tokens=16, stages=2, programs=40)
LARGE = tiles.Tile(blocks=2, along=1, down=4, tokens=64, stages=3, programs=1)
TILES = (ONE, FLAT, LARGE, tiles.FP32, tiles.Tile(blocks=1, along=2, down=2, tokens=8, stages=1, programs=1000))
MIXED = (Segment(17, 6), Segment(3, 5), Segment(1, 3), Segment(40, 2), Segment(5, 8))
STRIDES = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every third column": lambda x: torch.full((x.shape[0], 3 * x.shape[1]), torch.nan).to(x)[:, ::3].copy_(x),
    "every other token": lambda x: torch.full((2 * x.shape[0], x.shape[1]), torch.nan).to(x)[::2].copy_(x),
    "inside a larger one": lambda x: torch.full((x.shape[0] + 2, x.shape[1] + 5), torch.nan).to(x)[1:-1, 3:-2].copy_(x),
    "one token expanded": lambda x: x[:1].expand(x.shape[0], -1),
}


def fenced(tensor: torch.Tensor | None, *, behind: bool) -> torch.Tensor | None:
    """A copy with a forbidden page right behind it or right before it."""
    if tensor is None or not tensor.numel():
        return tensor
    page, size = mmap.PAGESIZE, tensor.nbytes
    pages = -(-size // page) + 2
    memory = mmap.mmap(-1, pages * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (start, start + (pages - 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    offset = (pages - 1) * page - size if behind else page
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)


def run(weight, x, bias, *, behind=True, tile=None):
    """The kernel on fenced copies of everything but x, into an output full of NaN."""
    tensors = {name: fenced(tensor, behind=behind) for name, tensor in operands(weight).items()}
    out = fenced(torch.full((x.shape[0], weight.fmt.rows), torch.nan, dtype=x.dtype), behind=behind)
    result = launch.mixed_linear(x, **tensors, bias=fenced(bias, behind=behind), fmt=weight.fmt, out=out, tile=tile)
    assert result is out
    assert not launch.counters(x.device).any(), "counters are zero between launches"
    return out


def random_case(seed: int) -> tuple[Case, tiles.Tile]:
    rng = random.Random(seed)
    segments, rank = rng.choice((1, 1, 2, 3)), rng.choice((0, 0, 0, 1, 5, 17))
    fmt = random_format(rng, rng.choice((*EDGES, 600, 1090)), segments=segments, most_rows=20, rank=rank)
    tokens = rng.choice((1, 1, 2, 3, 7, 8, 9, 15, 17, 33))
    dtype = rng.choice((F16, F32))
    bias = rng.choice((None, torch.float16, torch.float32, torch.float64))
    return Case(fmt, tokens, dtype, bias, seed), rng.choice(TILES)


@pytest.mark.parametrize("seed", range(CASES))
def test_dyadic_data_is_exact(seed):
    case, tile = random_case(seed)
    weight, x, bias = dyadic(case)
    behind = seed % 2 == 0
    assert torch.equal(run(weight, fenced(x, behind=behind), bias, behind=behind, tile=tile), exact(weight, x, bias))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_weight_can_be_read_back(width):
    fmt = SiteFormat(9, 122, (Segment(9, width),))
    weight, _, _ = dyadic(Case(fmt, 1, torch.float32, None, width))
    x = torch.eye(122)
    assert torch.equal(run(weight, x, None, tile=LARGE), weight.dequantize().t())
    assert torch.equal(run(weight, x[37:38].half(), None)[0].float(), weight.dequantize()[:, 37])
    for column in (0, 1, 31, 32, 95, 96, 120, 121):
        assert torch.equal(run(weight, x[column : column + 1], None)[0], weight.dequantize()[:, column])


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "tile"),
    [
        (9, 256, 3, tiles.Tile(blocks=1, along=2, down=1, tokens=8, stages=1, programs=1)),
        (35, 130, 9, tiles.Tile(blocks=2, along=1, down=2, tokens=16, stages=2, programs=1000)),
    ],
)
def test_a_lane_at_a_time(rows, columns, tokens, tile, monkeypatch):
    """What runs on a GPU in the order of its registers, every width."""
    monkeypatch.setattr(gemm, "WARPS", tl.constexpr(True))
    for width in WIDTHS:
        fmt = SiteFormat(rows, columns, (Segment(rows, width),), scatter=True)
        weight, x, bias = dyadic(Case(fmt, tokens, F16, F16, 1))
        assert torch.equal(run(weight, x, bias, tile=tile), exact(weight, x, bias)), width


def test_forty_segments_take_one_launch():
    parts = tuple(Segment(1 + i % 3, WIDTHS[i * 5 % 6]) for i in range(40))
    fmt = SiteFormat(sum(part.rows for part in parts), 70, parts, scatter=True)
    weight, x, bias = dyadic(Case(fmt, 2, torch.float16, torch.float16, 4))
    assert torch.equal(run(weight, x, bias, tile=FLAT), exact(weight, x, bias))


@pytest.mark.parametrize("tile", [ONE, FLAT], ids=["one token", "tokens"])
@pytest.mark.parametrize("columns", [256, 257])
@pytest.mark.parametrize("layout", STRIDES)
def test_activations_of_any_strides(layout, columns, tile):
    fmt = SiteFormat(7, columns, (Segment(3, 5), Segment(4, 3)), rank=2)
    weight, x, bias = dyadic(Case(fmt, min(tile.tokens, 5), torch.float16, torch.float16, 1))
    x = STRIDES[layout](x)
    assert torch.equal(run(weight, x, bias, tile=tile), exact(weight, x, bias))


@pytest.mark.parametrize(("columns", "tile"), [(2560, ONE), (1090, FLAT)])
def test_programs_share_columns(columns, tile):
    fmt = SiteFormat(20, columns, (Segment(17, 4), Segment(3, 5)), scatter=True)
    assert tiles.splits(tile, len(tiles.tile_table(fmt, tile.rows)), fmt) > 1
    weight, x, bias = dyadic(Case(fmt, 5, F16, F16, 1))
    assert torch.equal(run(weight, x, bias, tile=tile), exact(weight, x, bias))
    assert torch.equal(run(weight, x[:1], bias, tile=tile), exact(weight, x[:1], bias))


def test_the_table_of_tiles_serves_every_number_of_tokens():
    weight, _, bias = dyadic(Case(SiteFormat(66, 257, MIXED, scatter=True, rank=3), 1, F16, F16, 2))
    for tokens in (1, 8, 9, 16, 17, 33, 64, 65):
        _, x, _ = dyadic(Case(weight.fmt, tokens, F16, None, 4))
        assert torch.equal(run(weight, x, bias), exact(weight, x, bias)), tokens


@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("columns", [1, 122, 128, 1096])
def test_a_weight_is_expanded_exactly(columns, dtype):
    """Power-of-two factors: every weight is exact in both types."""
    weight, _, _ = dyadic(Case(SiteFormat(66, columns, MIXED, scatter=columns != 122), 1, F16, None, 1))
    tensors = {name: fenced(tensor, behind=True) for name, tensor in operands(weight).items() if "branch" not in name}
    assert torch.equal(launch.expanded(**tensors, fmt=weight.fmt, dtype=dtype).float(), weight.dequantize())


@pytest.mark.parametrize("rank", [0, 5])
def test_many_tokens_by_a_matrix_product(rank):
    weight, x, bias = dyadic(Case(SiteFormat(66, 130, MIXED, scatter=True, rank=rank), 70, F32, F16, 1))
    out = launch.expanded_linear(x, **operands(weight), bias=bias, fmt=weight.fmt)
    assert torch.equal(out, exact(weight, x, bias))
    alone = launch.expanded_linear(x, **operands(weight), bias=None, fmt=weight.fmt)
    assert torch.equal(alone, exact(weight, x, None))


def test_a_wrong_order_of_the_codes_is_noticed(monkeypatch):
    """Packing and unpacking stay inverse to each other; only the kernel can tell."""
    weight, x, _ = dyadic(Case(SiteFormat(17, 130, (Segment(17, 5),)), 5, F16, None, 1))
    monkeypatch.setattr(fragments, "_ORDER", (*fragments._ORDER[:7], *fragments._ORDER[:6:-1]))
    words, nibbles = fragments.pack(weight.unpacked(), weight.group_scales(), weight.fmt)
    assert torch.equal(fragments.unpack(words, nibbles, weight.fmt)[0], weight.unpacked())
    assert not torch.equal(run(weight, x, None), exact(weight, x, None))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_token_spoils_only_itself(value):
    weight, x, bias = dyadic(Case(SiteFormat(5, 40, (Segment(5, 4),), rank=3), 6, torch.float32, None, 1))
    wanted = exact(weight, x, bias)
    x[2, 7] = value
    out = run(weight, x, bias)
    assert not out[2].isfinite().any()
    good = torch.arange(6) != 2
    assert torch.equal(out[good], wanted[good])


def test_no_tokens():
    weight, x, bias = dyadic(Case(SiteFormat(5, 40, (Segment(5, 4),)), 0, torch.float16, torch.float16, 1))
    assert run(weight, x, bias).shape == (0, 5)


def test_a_new_output_and_equal_bits_each_time():
    weight, _, _ = dyadic(Case(SiteFormat(9, 200, (Segment(9, 6),)), 1, torch.float32, None, 1))
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    first, again = (launch.mixed_linear(x, **operands(weight), bias=None, fmt=weight.fmt) for _ in range(2))
    assert first.data_ptr() != again.data_ptr()
    assert torch.equal(first, again)


@triton.jit
def probe_offsets(index, out, stride, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, offsets(tl.load(index + i), stride))


def test_offsets_reach_beyond_32_bits():
    index = torch.tensor([0, 1, 46341, 70_000], dtype=torch.int32)
    out = torch.zeros(4, dtype=torch.int64)
    probe_offsets[(1,)](index, out, 70_000, N=4)
    assert torch.equal(out, index.long() * 70_000)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x2d": torch.zeros(2, 39)}, r"\[tokens, 40\]"),
        ({"x2d": torch.zeros(2, 3, 40)}, r"\[tokens, 40\]"),
        ({"x2d": torch.zeros(2, 40, dtype=torch.float64)}, "float64"),
        ({"x2d": torch.zeros(2, 40, device="meta")}, "meta"),
        ({"words": torch.zeros(257, dtype=torch.int32)[1:]}, "multiple of 16"),
        ({"out": torch.zeros(2, 6)}, r"float32\(2, 5\)"),
        ({"out": torch.zeros(5, 2).t()}, "contiguous"),
    ],
)
def test_refuses_what_it_would_misread(change, says):
    weight, x, _ = dyadic(Case(SiteFormat(5, 40, (Segment(5, 4),)), 2, torch.float32, None, 1))
    with pytest.raises(InputError, match=says):
        launch.mixed_linear(**{"x2d": x, **operands(weight), "bias": None, "fmt": weight.fmt, **change})


@triton.jit
def probe_bf16(x, out):
    tl.store(out, tl.load(x) + 1.5)


@pytest.mark.xfail(strict=True, reason="Triton's interpreter does not do bf16 (triton issues 11584, 11604)")
def test_the_interpreter_does_bf16():
    x, out = torch.tensor([2.25], dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    probe_bf16[(1,)](x, out)
    assert out.item() == 3.75
