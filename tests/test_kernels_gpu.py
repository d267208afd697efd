"""The kernels on a CUDA device: ``pytest -m gpu tests/test_kernels_gpu.py``.

Each parameter of the first test is one kernel to compile, so ``-n`` compiles in parallel.
"""

from __future__ import annotations

import random

import pytest
import torch

from kernel_cases import EDGES, Case, dyadic, exact, magnitude, product, random_format, random_weight
from mixcomp.format import WIDTHS, Segment, SiteFormat

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # Triton and torch warn about each other's versions
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

if torch.cuda.is_available():
    from mixcomp.kernels import launch, tiles

CASES = 100
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
#: unit roundoff of the activations' types
ROUNDOFF = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24}
#: (tokens to draw from, type): every tile with every type that reaches it
REGIONS = [((1,), F16), ((1,), BF16), ((1,), F32)]
REGIONS += [((2, 3, 15, 16), F16), ((2, 7, 16), BF16), ((2, 5, 16, 33, 129), F32)]
REGIONS += [((17, 33, 64), F16), ((17, 31, 64), BF16), ((65, 127, 128, 257), F16), ((65, 129), BF16)]


def place(weight, x, bias):
    """Everything on the device; each stored tensor inside a larger one full of ones."""
    tensors = {"row_index": None, "branch_a": None, "branch_b": None, "branch_scale": None}
    for name, tensor in weight.tensors().items():
        around = torch.full((tensor.numel() + 32,), 1, dtype=tensor.dtype, device="cuda")
        tensors[name] = around[16:-16].view(tensor.shape).copy_(tensor)
    return x.cuda(), tensors, None if bias is None else bias.cuda()


def run(weight, x, bias, **options):
    """The kernel, writing into the middle of a buffer of NaN whose ends must stay as they are."""
    x, tensors, bias = place(weight, x, bias)
    size = x.shape[0] * weight.fmt.rows
    around = torch.full((size + 64,), torch.nan, dtype=x.dtype, device="cuda")
    out = around[32 : size + 32].view(x.shape[0], weight.fmt.rows)
    launch.mixed_linear(x, **tensors, bias=bias, fmt=weight.fmt, out=out, **options)
    assert around[:32].isnan().all()
    assert around[-32:].isnan().all()
    return out.cpu()


def random_case(seed, tokens, dtype, *, aligned, branch):
    rng = random.Random(seed)
    columns = rng.choice((256, 512, 768, 2048)) if aligned else rng.choice((*EDGES, 500, 1000))
    segments = rng.choice((2, 2, 3, 5, 40))
    rank = rng.choice((1, 7, 16, 33)) if branch else 0
    fmt = random_format(rng, columns, segments=segments, most_rows=rng.choice((3, 40, 150)), rank=rank)
    return Case(fmt, rng.choice(tokens), dtype, rng.choice((None, dtype)), seed)


@pytest.mark.parametrize(("tokens", "dtype"), REGIONS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("branch", [False, True])
def test_dyadic_data_is_exact(tokens, dtype, aligned, branch):
    wrong = []
    for seed in range(CASES):
        case = random_case(seed, tokens, dtype, aligned=aligned, branch=branch)
        weight, x, bias = dyadic(case)
        if not torch.equal(run(weight, x, bias), exact(weight, x, bias)):
            wrong.append(case)
    assert not wrong, f"{len(wrong)} of {CASES}, the first {wrong[0]}"


@pytest.mark.parametrize("width", WIDTHS)
def test_kernels_of_one_width_read_back_every_weight(width):
    fmt = SiteFormat(200, 256, (Segment(200, width),), scatter=True)
    weight, _, _ = dyadic(Case(fmt, 1, F32, None, width))
    for dtype in (F16, BF16):
        x = torch.eye(256, dtype=dtype)
        assert torch.equal(run(weight, x, None), weight.dequantize().t().to(dtype))
        assert torch.equal(run(weight, x[77:78], None)[0], weight.dequantize()[:, 77].to(dtype))


@pytest.mark.parametrize(("tokens", "dtype"), REGIONS)
@pytest.mark.parametrize("aligned", [True, False])
def test_random_data_is_within_the_bound(tokens, dtype, aligned):
    """|y - y64| <= 2 g(K) |x||W| + u |y64| with g(K) = K u32 / (1 - K u32)."""
    for seed in range(5):
        case = random_case(seed, tokens, dtype, aligned=aligned, branch=False)
        generator = torch.Generator().manual_seed(seed)
        weight = random_weight(case.fmt, generator, dyadic=False)
        x = torch.randn(case.tokens, case.fmt.columns, generator=generator).to(dtype)
        wanted = product(weight, x, None)
        terms = (case.fmt.columns + 4) * 2.0**-24
        bound = 2 * terms / (1 - terms) * magnitude(weight, x, None) + ROUNDOFF[dtype] * wanted.abs() + 2.0**-24
        assert ((run(weight, x, None).double() - wanted).abs() <= bound).all(), case


def test_every_tile_gives_the_same_bits_on_dyadic_data():
    case = Case(SiteFormat(300, 512, (Segment(150, 5), Segment(150, 4)), scatter=True), 100, F16, F16, 1)
    weight, x, bias = dyadic(case)
    for tile in (tiles.SMALL[16], tiles.SMALL[64], tiles.LARGE):
        assert torch.equal(run(weight, x, bias, tile=tile), exact(weight, x, bias)), tile


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_activations_of_any_strides(tokens):
    case = Case(SiteFormat(90, 512, (Segment(50, 3), Segment(40, 6))), tokens, F16, None, 1)
    weight, x, bias = dyadic(case)
    _, tensors, _ = place(weight, x, bias)
    strided, shifted = torch.full((2, 2 * tokens + 2, 3 * 512 + 3), torch.nan, dtype=F16, device="cuda")
    layouts = {
        "transposed": x.cuda().t().contiguous().t(),
        "strided": strided[1:-1:2, 2:-1:3].copy_(x),
        "shifted": shifted[1 : tokens + 1, 3:515].copy_(x),
        "expanded": x[:1].cuda().expand(tokens, -1),
    }
    for name, view in layouts.items():
        out = launch.mixed_linear(view, **tensors, bias=None, fmt=weight.fmt)
        wanted = exact(weight, x[:1].expand(tokens, -1) if name == "expanded" else x, bias)
        assert torch.equal(out.cpu(), wanted), name


@pytest.mark.parametrize("tokens", [1, 9])
def test_launches_repeat_bit_for_bit_and_replay_in_a_graph(tokens):
    generator = torch.Generator().manual_seed(0)
    fmt = SiteFormat(500, 1024, (Segment(200, 4), Segment(200, 3), Segment(100, 8)), scatter=True, rank=8)
    weight = random_weight(fmt, generator, dyadic=False)
    x, tensors, _ = place(weight, torch.randn(tokens, 1024, generator=generator).half(), None)
    first = launch.mixed_linear(x, **tensors, bias=None, fmt=fmt)
    for _ in range(100):
        assert torch.equal(first, launch.mixed_linear(x, **tensors, bias=None, fmt=fmt))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch.mixed_linear(x, **tensors, bias=None, fmt=fmt)
    x.copy_(x.flip(1))
    graph.replay()
    assert torch.equal(out, launch.mixed_linear(x, **tensors, bias=None, fmt=fmt))


def test_a_bad_token_spoils_only_itself():
    weight, x, _ = dyadic(Case(SiteFormat(70, 300, (Segment(70, 4),)), 6, BF16, None, 1))
    wanted = exact(weight, x, None)
    x[2, 7] = torch.nan
    out = run(weight, x, None)
    assert out[2].isnan().all()
    good = torch.arange(6) != 2
    assert torch.equal(out[good], wanted[good])


def test_no_tokens():
    weight, x, bias = dyadic(Case(SiteFormat(5, 40, (Segment(5, 4),)), 0, F16, F16, 1))
    assert run(weight, x, bias).shape == (0, 5)
