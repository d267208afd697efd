"""Activations of 8 bits: the numbers against sums of Python's integers, and their way from ``compile`` to a saved folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import families
import mixcomp
from artifacts import DROP, forge, put
from formats import draw
from lowering_cases import Case, case
from mixcomp.errors import ArtifactError, ConfigError
from mixcomp.format import WIDTHS, Scales, Segment, SiteFormat
from mixcomp.lowering import int8, ops, select
from mixcomp.lowering.module import MixedLinear
from mixcomp.lowering.ops import MIXED_LINEAR
from mixcomp.lowering.select import MAX_FUSED_TOKENS, choose_path, explain
from mixcomp.lowering.select import Path as Way
from mixcomp.manifest import MANIFEST
from mixcomp.report import describe

MANY = MAX_FUSED_TOKENS + 1
SEGMENTS = [(3, 8), (5, 6), (9, 5), (17, 4), (4, 3), (2, 2)]
MADE = case(SEGMENTS, 300, scatter=True, rank=2, bias=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_take_the_nearest_codes(width: int) -> None:
    drawn = draw(torch.full((7,), width, dtype=torch.uint8), 300, seed=width)
    codes, unit = int8.round_rows(drawn.weight)
    exact = drawn.base / unit.double()[:, None]
    assert ((codes.double() - exact).abs() <= 0.5 + 1e-5).all()
    assert codes.abs().max() <= 127
    if width <= 3:
        assert torch.equal(codes.double(), exact)
    else:
        largest = 16 * (128 if width == 8 else 2**width - 1)
        codes_of_the_largest = largest * drawn.weight.factors.double() / unit.double()
        assert ((codes_of_the_largest > 119.9) & (codes_of_the_largest < 127.5)).all()


def test_rows_that_mix_widths_take_the_nearest_codes() -> None:
    widths = torch.tensor([[2, 4, 4], [4, 8, 2]], dtype=torch.uint8).repeat_interleave(4, 0)
    drawn = draw(widths, 90)
    codes, unit = int8.round_rows(drawn.weight)
    assert ((codes.double() - drawn.base / unit.double()[:, None]).abs() <= 0.5 + 1e-5).all()
    assert 64 < codes.abs().max() <= 127


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tokens_take_the_nearest_codes(dtype: torch.dtype) -> None:
    x = (torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    x[3] = 0
    codes, scale = int8.round_tokens(x)
    assert ((codes * scale[:, None] - x.double()).abs() <= scale[:, None] * (0.5 + 1e-5)).all()
    assert codes.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127]
    assert (scale > 0).all()


def test_sums_are_exact_where_fp32_would_not_be() -> None:
    codes, rows = torch.full((2, 3001), 127, dtype=torch.int8), torch.full((1, 3001), 127, dtype=torch.int8)
    rows[0, 0] = 126
    assert int8.sums(codes, rows).tolist() == [[127 * (3000 * 127 + 126)]] * 2


def by_hand(x: torch.Tensor, made: Case) -> torch.Tensor:
    """fp64, from the codes of both sides, one product of Python's integers after another."""
    (codes, scale), (rows, unit) = int8.round_tokens(x), int8.round_rows(made.weight)
    index = made.weight.row_index
    out = torch.zeros(len(x), len(rows), dtype=torch.float64)
    for t, r in torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(rows))).tolist():
        total = sum(a * b for a, b in zip(codes[t].tolist(), rows[r].tolist(), strict=True))
        out[t, r if index is None else int(index[r])] = total * float(scale[t]) * float(unit[r])
    out += x.double() @ made.side.t()
    return out if made.bias is None else out + made.bias.double()


def test_a_product_is_that_of_its_codes() -> None:
    x = MADE.activations(3)
    got, wanted = int8.mixed_linear(x, MADE.weight, MADE.bias).double(), by_hand(x, MADE)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-4)
    got = int8.mixed_linear(x.double(), MADE.weight, MADE.bias)
    torch.testing.assert_close(got, by_hand(x.double(), MADE), rtol=1e-12, atol=1e-12)


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    rows = st.lists(st.tuples(st.sampled_from((1, 2, 17)), st.sampled_from(WIDTHS)), min_size=1, max_size=4)
    rank, scatter, bias = draw_(st.integers(0, 1)), draw_(st.booleans()), draw_(st.booleans())
    columns, seed = draw_(st.sampled_from((1, 31, 33, 129, 300))), draw_(st.integers(0, 999))
    return case(draw_(rows), columns, rank=rank, scatter=scatter, bias=bias, seed=seed)


@given(cases(), st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)))
def test_a_product_is_off_by_half_a_code_of_either_side_at_most(made: Case, dtype: torch.dtype) -> None:
    x = made.activations(3).to(dtype)
    (_, scale), (_, unit) = int8.round_tokens(x), int8.round_rows(made.weight)
    weights, numbers = made.base.abs().sum(1), x.double().abs().sum(1)
    index = made.weight.row_index
    unit = unit if index is None else torch.empty_like(unit).index_copy_(0, index.long(), unit)
    half = 0.5 + 1e-5
    bound = half * scale.double()[:, None] * weights + half * unit.double() * numbers[:, None]
    bound += half**2 * made.weight.fmt.columns * scale.double()[:, None] * unit.double()
    error = (int8.mixed_linear(x, made.weight, made.bias).double() - made.product(x)).abs()
    assert (error <= bound + 2 * made.bound(x, dtype)).all()


def test_float_group_weights_stay_and_activations_have_a_scale_for_128_columns() -> None:
    drawn = draw(torch.tensor([4, 8, 3, 4], dtype=torch.uint8), 300, group=64, scales=Scales.FLOAT_GROUP)
    x = MADE.activations(5)
    rounded = torch.empty(5, 300, dtype=torch.float64)
    for t in range(5):
        for first in (0, 128, 256):
            part = x[t, first : first + 128].double()
            scale = (part.abs().max() / 127).half().double()
            rounded[t, first : first + 128] = (part / scale).round() * scale
    wanted = rounded @ drawn.output().t()
    torch.testing.assert_close(int8.mixed_linear(x, drawn.weight, None).double(), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, x.double() @ drawn.output().t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(scales: Scales, value: float) -> None:
    drawn = draw(torch.tensor([4, 8, 3], dtype=torch.uint8), 70, scales=scales)
    x = MADE.activations(4)[:, :70].contiguous()
    clean = int8.mixed_linear(x, drawn.weight, None)
    x[2, 7] = value
    got = int8.mixed_linear(x, drawn.weight, None)
    assert not got[2].isfinite().any()
    good = torch.arange(4) != 2
    assert torch.equal(got[good], clean[good])


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "wanted"),
    [
        ("cpu", torch.float32, MANY, Way.INT8),
        ("cpu", torch.float64, MANY, Way.INT8),
        ("cpu", torch.float32, MANY - 1, Way.CPU_GEMM),
        ("cuda", torch.float16, MANY, Way.TRITON_INT8),
        ("cuda", torch.float16, MANY - 1, Way.TRITON),
        ("cuda", torch.float64, MANY, Way.INT8),
        ("mps", torch.float16, MANY, Way.INT8),
    ],
)
def test_path(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, tokens: int, wanted: Way) -> None:
    monkeypatch.setattr(select, "triton_installed", lambda: True)
    fmt = MADE.weight.fmt
    assert choose_path(device, dtype, fmt, tokens, "int8") is wanted
    assert explain(device, dtype, fmt, tokens, "int8").startswith(f"{wanted.value}: ")
    wide = SiteFormat(1, 133_145, (Segment(1, 4),))  # 127 * 127 * 133,145 > 2**31
    assert choose_path("cuda", torch.float16, wide, MANY, "int8") is Way.INT8
    other = draw(torch.tensor([4]), 64, group=64).weight.fmt
    if tokens == MANY:
        assert "groups of 64" in explain("cuda", torch.float16, other, tokens, "int8")


def arguments(x: torch.Tensor, made: Case = MADE) -> tuple[Any, ...]:
    held = MixedLinear(made.weight, made.bias)
    tensors = [held._buffers[name] for name in ("codes", "scales", "factors", "row_index")]
    branch = [held._buffers[name] for name in ("branch_a", "branch_b", "branch_scale")]
    return (x, *tensors, *branch, made.bias, made.weight.fmt.constants(), made.weight.fmt.columns)


def test_few_tokens_are_never_rounded() -> None:
    plain, rounding = MixedLinear(MADE.weight, MADE.bias), MixedLinear(MADE.weight, MADE.bias, None, "int8")
    x = MADE.activations(3, 43)
    assert x[..., 0].numel() == MANY
    assert torch.equal(plain(x[:, :42]), rounding(x[:, :42]))
    flat = x.view(MANY, -1)
    assert torch.equal(rounding(x).view(MANY, -1), int8.mixed_linear(flat, MADE.weight, MADE.bias))
    assert not torch.equal(plain(x), rounding(x))
    assert rounding.extra_repr() == plain.extra_repr() + ", int8 activations"


def test_the_operator_and_the_module_are_one() -> None:
    x = MADE.activations(MANY)
    with torch.no_grad():
        given_ = MIXED_LINEAR(*arguments(x), activations="int8")
    assert torch.equal(given_, MixedLinear(MADE.weight, MADE.bias, None, "int8")(x))
    torch.library.opcheck(MIXED_LINEAR, arguments(x), {"activations": "int8"})


def test_triton_is_called_for_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("mixcomp.kernels.launch")
    monkeypatch.setattr(ops, "choose_path", lambda *_: Way.TRITON_INT8)
    seen: list[Any] = []
    monkeypatch.setattr(launch, "int8_linear", lambda x, *rest: seen.append(rest) or x.new_ones(len(x), 40))
    x, codes, scales, *rest = arguments(MADE.activations(MANY))
    ops.mixed_linear(x, *ops.gpu.to_fragments(codes, scales, MADE.weight.fmt), *rest)
    assert [type(part) for part in seen[0]][-1] is type(MADE.weight.fmt)
    assert torch.equal(ops.mixed_linear(x, codes, scales, *rest), int8.mixed_linear(x, MADE.weight, MADE.bias))


def test_unknown_activations_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"activations 'int4' is unknown; did you mean 'int8'\?"):
        MixedLinear(MADE.weight, None, None, "int4")
    with pytest.raises(ConfigError, match="int4"):
        MIXED_LINEAR(*arguments(MADE.activations(1)), activations="int4")


IDS = torch.randint(0, 100, (3, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The same model and plan with native activations and with those of 8 bits."""
    text = [torch.randint(0, 100, (8, 32), generator=torch.Generator().manual_seed(0))]
    original = families.FAMILIES["llama"]()
    options: dict[str, Any] = {"calibration": text, "effort": "fast", "copy": True}
    return mixcomp.compile(original, 5.0, **options), mixcomp.compile(original, 5.0, activations="int8", **options)


@torch.no_grad()
def natively(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the same weights with native activations."""
    modules = [module for module in model.modules() if isinstance(module, MixedLinear)]
    for module in modules:
        module.activations = "native"
    logits: torch.Tensor = model(ids).logits
    for module in modules:
        module.activations = "int8"
    return logits


def test_compile_plans_the_same_scales_for_it_and_rounds_prompts(models: tuple[Any, Any], tmp_path: Path) -> None:
    native, rounding = models
    plans = native.mixcomp.plan, rounding.mixcomp.plan
    assert plans[0].sites == plans[1].sites
    assert [p.options["activations"] for p in plans] == ["native", "int8"]
    with torch.no_grad():
        wanted, got = natively(rounding, IDS), rounding(IDS).logits
        assert torch.equal(natively(rounding, IDS[:, :21]), rounding(IDS[:, :21]).logits)
        assert not torch.equal(wanted, native(IDS).logits), "channels are scaled otherwise"
    assert 0 < float((got - wanted).norm() / wanted.norm()) < 0.05
    assert rounding.generate(IDS, max_new_tokens=3, do_sample=False).shape == (3, 51)
    assert describe(native).sites[0].paths == {1: "cpu-bags", 512: "cpu-gemm"}
    assert describe(rounding).sites[0].paths == {1: "cpu-bags", 512: "int8"}
    assert [any("8 bits in prompts" in line for line in describe(m).summary()) for m in models] == [False, True]
    mixcomp.save(rounding, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(mixcomp.load(tmp_path / "out")(IDS).logits, got)
        mended = type(rounding).from_pretrained(tmp_path / "out")
        assert torch.equal(mended(IDS).logits, got)


def test_a_folder_that_does_not_say_is_native(models: tuple[Any, Any], tmp_path: Path) -> None:
    mixcomp.save(models[1], tmp_path / "out")
    sites = json.loads((tmp_path / "out" / MANIFEST).read_text())["sites"]
    assert {site["activations"] for site in sites.values()} == {"int8"}
    for name in sites:
        forge(tmp_path / "out", put("sites", name, "activations", DROP))
    with torch.no_grad():
        assert torch.equal(mixcomp.load(tmp_path / "out")(IDS).logits, natively(models[1], IDS))
    forge(tmp_path / "out", put("sites", next(iter(sites)), "activations", "int9"))
    with pytest.raises(ArtifactError, match=r"activations.*int9.*native"):
        mixcomp.load(tmp_path / "out")


def test_mixllm_is_as_published_with_them() -> None:
    text = [torch.randint(0, 100, (8, 32), generator=torch.Generator().manual_seed(0))]
    model = mixcomp.compile(families.FAMILIES["llama"](), 6.0, calibration=text, strategy="mixllm", activations="int8")
    modules = [module for module in model.modules() if isinstance(module, MixedLinear)]
    assert {(m.fmt.scales, m.fmt.group, m.activations) for m in modules} == {(Scales.FLOAT_GROUP, 128, "int8")}
    assert {site["scales"] for site in model.mixcomp.plan.sites.values()} == {"float-group"}
    x = torch.randn(MANY, modules[0].in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(modules[0](x), int8.mixed_linear(x, modules[0].packed(), modules[0].bias))


def test_a_plan_carries_them() -> None:
    original = families.FAMILIES["llama"]()
    text = [torch.randint(0, 100, (8, 32), generator=torch.Generator().manual_seed(0))]
    plan = mixcomp.plan(mixcomp.measure(original, text), 5.0, activations="int8")
    model = mixcomp.apply(original, plan)
    assert {m.activations for m in model.modules() if isinstance(m, MixedLinear)} == {"int8"}


def test_the_backend_computes_the_same(models: tuple[Any, Any]) -> None:
    _, model = models
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
        got = torch.compile(model, backend="mixcomp", dynamic=True)(IDS, use_cache=False).logits
    torch.testing.assert_close(got, wanted)
