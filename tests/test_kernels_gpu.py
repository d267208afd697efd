"""The kernels on a CUDA device: ``pytest -m gpu tests/test_kernels_gpu.py``.

Each parameter of the first test is one kernel to compile, so ``-n`` compiles in parallel; OMP_NUM_THREADS=1 keeps the
fp64 products of many workers from waiting for each other.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

from kernel_cases import EDGES, Case, dyadic, exact, magnitude, operands, product, random_format, random_weight
from mixcomp.backend import mixcomp_backend
from mixcomp.format import WIDTHS, Segment, SiteFormat
from mixcomp.lowering import gpu, int8
from mixcomp.lowering.module import MixedLinear
from mixcomp.lowering.select import MAX_FUSED_TOKENS

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
#: (tokens to draw from, type): every row of the table of tiles with every type that reaches it, and more tokens
REGIONS = [((1,), F16), ((1,), BF16), ((2, 5, 8), F16), ((2, 7, 8), BF16), ((9, 15, 16), F16), ((9, 16), BF16)]
REGIONS += [((17, 31, 32), F16), ((17, 32), BF16), ((33, 63, 64), F16), ((33, 64), BF16), ((65, 129, 257), F16)]
REGIONS += [((1, 2, 8, 9, 33, 129), F32)]


@pytest.fixture(autouse=True)
def _sums_in_fp32(monkeypatch):
    """cuBLAS may otherwise add parts of a product in 16 bits."""
    for name in ("fp16", "bf16"):
        monkeypatch.setattr(torch.backends.cuda.matmul, f"allow_{name}_reduced_precision_reduction", False)


def place(weight, x, bias):
    """Everything on the device; each tensor of the weight inside a larger one full of ones."""
    tensors = operands(weight)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
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


@pytest.mark.parametrize("shape", list(tiles.TABLE) if torch.cuda.is_available() else [])
def test_every_tile_is_exact_however_columns_are_shared(shape):
    fmt = SiteFormat(300, 2176, (Segment(100, 5), Segment(100, 4), Segment(100, 3)), scatter=True, rank=3)
    for most, tile in tiles.TABLE[shape].items():
        for dtype in (F16, BF16):
            weight, x, bias = dyadic(Case(fmt, most, dtype, dtype, 1))
            for programs in (1, 60, 1000):
                each = replace(tile, programs=programs)
                assert torch.equal(run(weight, x, bias, tile=each), exact(weight, x, bias)), each
    assert not any(launch.counters(torch.device("cuda", torch.cuda.current_device())).flatten().tolist())


def test_tensors_that_start_anywhere():
    """Kernels are kept by what they were compiled for; here that changes from call to call."""
    weight, x, bias = dyadic(Case(SiteFormat(90, 512, (Segment(50, 3), Segment(40, 6))), 5, F16, F16, 1))
    x, tensors, bias = place(weight, x, bias)
    wanted = exact(weight, x.cpu(), bias.cpu())
    shifted = torch.empty(91, dtype=F16, device="cuda")[1:].copy_(bias)
    moved = torch.empty(5 * 512 + 1, dtype=F16, device="cuda")[1:].view(5, 512).copy_(x)
    outs = torch.empty(2, 5 * 90 + 1, dtype=F16, device="cuda")
    for _ in range(3):
        for here in (x, moved):
            for given in (bias, shifted, bias.float()):
                for out in (outs[0, :-1].view(5, 90), outs[1, 1:].view(5, 90)):
                    launch.mixed_linear(here, **tensors, bias=given, fmt=weight.fmt, out=out.fill_(torch.nan))
                    assert torch.equal(out.cpu(), wanted)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("columns", [1, 122, 128, 1096, 4096])
def test_a_weight_is_expanded_with_one_rounding(columns, dtype):
    for seed, scatter in enumerate((True, False)):
        parts = tuple(Segment(rows, width) for rows, width in ((17, 6), (3, 5), (1, 3), (40, 2), (5, 8), (64, 4)))
        weight = random_weight(
            SiteFormat(130, columns, parts, scatter), torch.Generator().manual_seed(seed), dyadic=False
        )
        _, tensors, _ = place(weight, torch.zeros(1), None)
        tensors = {name: tensor for name, tensor in tensors.items() if "branch" not in name}
        for _ in range(2):
            assert torch.equal(
                launch.expanded(**tensors, fmt=weight.fmt, dtype=dtype).cpu(), weight.dequantize().to(dtype)
            )


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("rank", [0, 16])
def test_many_tokens_by_an_expanded_weight(dtype, rank):
    """|y - y64| <= what ``test_random_data_is_within_the_bound`` allows, and a rounding of weight, branch and bias each."""
    fmt = SiteFormat(500, 1024, (Segment(200, 4), Segment(200, 3), Segment(100, 8)), scatter=True, rank=rank)
    generator = torch.Generator().manual_seed(0)
    weight, x = random_weight(fmt, generator, dyadic=False), torch.randn(300, 1024, generator=generator).to(dtype)
    x, tensors, _ = place(weight, x, None)
    bias = torch.randn(500, generator=generator)
    out = launch.expanded_linear(x, **tensors, bias=bias.cuda(), fmt=fmt).cpu().double()
    terms = (fmt.columns + rank + 4) * 2.0**-24 + 4 * ROUNDOFF[dtype]
    wanted = product(weight, x.cpu(), bias)
    assert ((out - wanted).abs() <= 2 * terms * magnitude(weight, x.cpu(), bias) + 2.0**-24).all()


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("seed", range(40))
def test_products_of_8_bit_integers_are_those_of_the_reference(dtype, seed):
    rng = random.Random(seed)
    fmt = random_format(rng, rng.choice((*EDGES, 600, 2048)), segments=rng.choice((1, 3, 9)), most_rows=300, rank=0)
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(fmt, generator, dyadic=False)
    x = (torch.randn(rng.choice((1, 129, 300, 2000)), fmt.columns, generator=generator) * 3).to(dtype)
    bias = rng.choice((None, torch.randn(fmt.rows, generator=generator)))
    x, tensors, moved = place(weight, x, bias)
    codes, scales = launch.int8_tokens(x)
    wanted, wanted_scales = int8.round_tokens(x.cpu())
    assert torch.equal(codes[:, : fmt.columns].cpu(), wanted)
    assert torch.equal(scales.cpu(), wanted_scales)
    out = launch.int8_linear(x, **tensors, bias=moved, fmt=fmt)
    exact_out = int8.mixed_linear(x.cpu().float(), weight, bias).double()  # in fp32: rounded here, once
    close = (out.cpu().double() - exact_out).abs() <= (ROUNDOFF[dtype] + 2.0**-22) * exact_out.abs() + 1e-6
    assert close.all()
    if bias is None:
        assert torch.equal(out.cpu(), exact_out.float().to(dtype))


def test_a_module_with_8_bit_activations_takes_them_above_the_fused_tokens():
    weight = random_weight(
        SiteFormat(90, 200, (Segment(50, 4), Segment(40, 6)), scatter=True, rank=3), torch.Generator(), dyadic=False
    )
    plain, rounding = (MixedLinear(weight, None, None, kind).cuda() for kind in ("native", "int8"))
    x = torch.randn(MAX_FUSED_TOKENS + 1, 200, dtype=F16, device="cuda")
    assert torch.equal(plain(x[:-1]), rounding(x[:-1]))
    wanted = int8.mixed_linear(x.cpu().float(), weight, None)
    torch.testing.assert_close(rounding(x).cpu().float(), wanted, rtol=4e-3, atol=4e-3)
    assert not torch.equal(plain(x), rounding(x))


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


def test_streams_do_not_disturb_each_other():
    """Both share columns among programs, so both count."""
    fmt = SiteFormat(64, 8192, (Segment(64, 4),))
    weight, x, _ = dyadic(Case(fmt, 3, F16, None, 1))
    x, tensors, _ = place(weight, x, None)
    wanted, streams = exact(weight, x.cpu(), None), [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outs = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(launch.mixed_linear(x, **tensors, bias=None, fmt=fmt))
    torch.cuda.synchronize()
    assert all(torch.equal(out.cpu(), wanted) for out in outs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_launches_go_to_the_device_of_their_tensors():
    weight, x, bias = dyadic(Case(SiteFormat(90, 512, (Segment(50, 3), Segment(40, 6)), rank=3), 5, F16, F16, 1))
    tensors = {name: None if t is None else t.to("cuda:1") for name, t in operands(weight).items()}
    for _ in range(2):  # anew, and as found before
        out = launch.mixed_linear(x.to("cuda:1"), **tensors, bias=bias.to("cuda:1"), fmt=weight.fmt)
        assert torch.equal(out.cpu(), exact(weight, x, bias))


FORMAT = SiteFormat(500, 1024, (Segment(200, 4), Segment(200, 3), Segment(100, 8)), scatter=True, rank=8)


def test_a_module_on_a_gpu_holds_one_form_and_shows_the_stored_one():
    weight = random_weight(FORMAT, torch.Generator().manual_seed(0), dyadic=False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    layer = MixedLinear(weight, torch.ones(500)).to("cuda")
    assert gpu.are_fragments(layer.codes)
    held = torch.cuda.memory_allocated() - before
    assert held <= sum(512 * -(-b.nbytes // 512) for b in layer.buffers()) + 512
    for shown in (layer.state_dict(), copy.deepcopy(layer).half().packed().tensors(), layer.to("cpu").state_dict()):
        assert all(torch.equal(shown[name].cpu(), tensor) for name, tensor in weight.tensors().items())
    other = MixedLinear(random_weight(FORMAT, torch.Generator().manual_seed(1), dyadic=False), torch.ones(500)).to(
        "cuda"
    )
    other.load_state_dict(layer.state_dict())
    assert gpu.are_fragments(other.codes)
    assert all(torch.equal(t.cpu(), weight.tensors()[name]) for name, t in other.packed().tensors().items())


@pytest.mark.parametrize("dtype", [F16, BF16, F32, torch.float64])
def test_a_module_computes_its_linear_on_every_path(dtype):
    weight = random_weight(FORMAT, torch.Generator().manual_seed(0), dyadic=False)
    layer = MixedLinear(weight, torch.ones(500)).to("cuda")
    for tokens in (0, 1, 7, MAX_FUSED_TOKENS, MAX_FUSED_TOKENS + 1, 300):
        x = torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        wanted, terms = product(weight, x, torch.ones(500)), 1100 * 2.0**-24 + 4 * ROUNDOFF.get(dtype, 0.0)
        with torch.no_grad(), torch.autocast("cuda", BF16):
            out = layer(x.cuda())
        assert out.dtype == dtype
        assert ((out.cpu() - wanted).abs() <= 2 * terms * magnitude(weight, x, torch.ones(500)) + 2.0**-24).all()


@pytest.mark.parametrize("backend", ["eager", mixcomp_backend, "inductor"])
def test_a_module_compiles_whole(backend):
    torch.compiler.reset()
    layer = MixedLinear(random_weight(FORMAT, torch.Generator().manual_seed(0), dyadic=False), torch.ones(500)).to(
        "cuda"
    )
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (3, 5, 64, 70):
            x = torch.randn(tokens, 1024, device="cuda", dtype=F16)
            assert torch.equal(compiled(x), layer(x))


def test_no_tokens():
    weight, x, bias = dyadic(Case(SiteFormat(5, 40, (Segment(5, 4),)), 0, F16, F16, 1))
    assert run(weight, x, bias).shape == (0, 5)
