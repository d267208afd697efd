"""Every path of a compiled linear against exact arithmetic on dyadic data, and against its error bound elsewhere."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lowering_cases import Case, case
from mixcomp.format import WIDTHS
from mixcomp.lowering import cpu, reference
from mixcomp.lowering.select import MIN_BAG_COLUMNS
from mixcomp.packed import PackedWeight

Path = Callable[[torch.Tensor, PackedWeight, torch.Tensor | None], torch.Tensor]


def _bags(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return cpu.by_bags(x, cpu.table_form(weight), bias)


def _gemm(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return cpu.by_gemm(x, cpu.table_form(weight), bias)


PATHS: dict[str, Path] = {"bags": _bags, "gemm": _gemm, "reference": reference.mixed_linear}
COLUMNS = (1, 31, 33, 70, 129)
TOKENS = (1, 2, 17)
MIXED = (
    [(1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 8)],
    [(5, 4), (3, 2), (9, 4), (16, 3)],
    [(17, 8), (1, 2)],
    [(2, 5), (33, 3)],
)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Path:
    return PATHS[request.param]


def _exact(path: Path, made: Case) -> None:
    for tokens in TOKENS:
        x = made.activations(tokens, dyadic=True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = path(x.to(dtype), made.weight, made.bias)
            assert got.dtype == dtype
            assert got.is_contiguous()
            assert torch.equal(got, made.product(x).to(dtype))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 17, 32])
def test_every_width_is_exact_on_dyadic_data(path: Path, width: int, rows: int) -> None:
    for columns in COLUMNS:
        _exact(path, case([(rows, width)], columns, dyadic=True, bias=rows > 1))


@pytest.mark.parametrize("segments", MIXED)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_mixed_segments_are_exact_on_dyadic_data(path: Path, segments: list[tuple[int, int]], rank: int) -> None:
    for columns in COLUMNS[1:]:
        for scatter in (False, True):
            _exact(path, case(segments, columns, scatter=scatter, rank=rank, bias=scatter, dyadic=True))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    segments = draw(
        st.lists(st.tuples(st.sampled_from((1, 2, 17, 33)), st.sampled_from(WIDTHS)), min_size=1, max_size=4)
    )
    columns = draw(st.sampled_from((MIN_BAG_COLUMNS, 65, 70, 129, 300)))
    rank = draw(st.integers(0, min(4, sum(n for n, _ in segments))))
    flags = draw(st.booleans()), draw(st.booleans())
    return case(segments, columns, rank=rank, scatter=flags[0], bias=flags[1], seed=draw(st.integers(0, 999)))


@given(cases(), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), st.sampled_from(sorted(PATHS)))
@example(case([(2, 2), (1, 8)], MIN_BAG_COLUMNS), torch.float32, "bags")
def test_random_data_stays_within_the_componentwise_bound(made: Case, dtype: torch.dtype, name: str) -> None:
    x = made.activations(3).to(dtype)
    error = (PATHS[name](x, made.weight, made.bias).double() - made.product(x)).abs()
    assert (error <= made.bound(x, dtype)).all()


def test_bags_keep_the_bound_where_rounding_is_worst() -> None:
    """Levels of +-1 in a table made for wide rows: what is added and taken away again is largest beside the result."""
    for wide in (5, 6, 8):
        made = case([(40, 2), (1, wide)], MIN_BAG_COLUMNS, seed=wide)
        x = made.activations(50) + 3
        error = (_bags(x, made.weight, None).double() - made.product(x)).abs()
        assert (error <= made.bound(x, torch.float32)).all()


def test_fp64_activations_get_fp64_results() -> None:
    made = case([(17, 5), (3, 8)], 70, rank=2, scatter=True, bias=True)
    x = made.activations(4).double()
    torch.testing.assert_close(
        reference.mixed_linear(x, made.weight, made.bias), made.product(x), rtol=1e-13, atol=1e-13
    )


def test_what_is_not_finite_stays_in_its_row(path: Path) -> None:
    made = case([(9, 3), (8, 5)], 96, rank=1, bias=True)
    clean = made.activations(5)
    dirty = clean.clone()
    dirty[1, 7], dirty[3, 95] = float("nan"), float("inf")
    got, wanted = path(dirty, made.weight, made.bias), path(clean, made.weight, made.bias)
    assert not got[[1, 3]].isfinite().any()
    assert torch.equal(got[[0, 2, 4]], wanted[[0, 2, 4]])


def test_repeated_calls_are_bit_equal(path: Path) -> None:
    made = case([(20, 3), (13, 5)], 129, rank=2, scatter=True)
    x = made.activations(3)
    first = path(x, made.weight, None)
    assert all(torch.equal(path(x, made.weight, None), first) for _ in range(20))


@pytest.mark.parametrize("segments", [[(30, 3), (34, 4)], [(30, 3), (34, 5)]])
def test_a_form_costs_what_it_says(segments: list[tuple[int, int]]) -> None:
    form = cpu.make_form(case(segments, 128).weight)
    codes = 4 if form.nibbles else 8
    assert form.nibbles == (segments[1][1] <= 4)
    assert form.scale.nbytes * 8 == 64 * 128
    header = form.table.nbytes * 8 - codes * 64 * 128
    assert header == 128 * 8 * (4 if form.nibbles else 8)


class TestForms:
    """When a form is made, shared, made again and dropped."""

    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch) -> list[PackedWeight]:
        """The weights for which a form was made, in order."""
        seen: list[PackedWeight] = []
        make = cpu.make_form

        def counted(weight: PackedWeight) -> cpu.TableForm:
            seen.append(weight)
            return make(weight)

        monkeypatch.setattr(cpu, "make_form", counted)
        return seen

    def test_made_once(self, made: list[PackedWeight]) -> None:
        weight = case([(4, 4)], 64).weight
        assert cpu.table_form(weight) is cpu.table_form(weight)
        assert len(made) == 1

    @pytest.mark.parametrize(
        "name", ["codes", "scales", "factors", "row_index", "branch_a", "branch_b", "branch_scale"]
    )
    def test_made_again_when_a_tensor_changes(self, made: list[PackedWeight], name: str) -> None:
        weight = case([(8, 3), (8, 5)], 64, scatter=True, rank=2).weight
        cpu.table_form(weight)
        exchanged = replace(weight, **{name: weight.tensors()[name].flip(0)})
        self.require_current(exchanged)
        exchanged.tensors()[name].copy_(weight.tensors()[name])
        self.require_current(exchanged)
        assert len(made) == 3

    def require_current(self, weight: PackedWeight) -> None:
        x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
        got = cpu.by_bags(x, cpu.table_form(weight), None)
        torch.testing.assert_close(got, reference.mixed_linear(x, weight, None), rtol=1e-4, atol=1e-5)

    def test_dropped_with_its_codes(self) -> None:
        gc.collect()
        before = len(cpu._forms)
        weight = case([(4, 4)], 64).weight
        cpu.table_form(weight)
        assert len(cpu._forms) == before + 1
        del weight
        gc.collect()
        assert len(cpu._forms) == before

    def test_threads_share_one(self, made: list[PackedWeight]) -> None:
        weight = case([(64, 4), (64, 5)], 256).weight
        start, forms = threading.Barrier(8), []

        def work() -> None:
            start.wait()
            forms.append(cpu.table_form(weight))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert all(form is forms[0] for form in forms)

    def test_inference_tensors(self) -> None:
        with torch.inference_mode():
            made = case([(8, 3)], 64, dyadic=True)
            x = made.activations(1, dyadic=True)
            assert torch.equal(cpu.by_bags(x, cpu.table_form(made.weight), None), made.product(x).float())
