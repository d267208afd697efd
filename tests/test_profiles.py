"""Profiles: segments of rows that mix widths, where their groups lie, what they cost; and the bytes of every form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import formats
from formats import Drawn, draw, drawn
from mixcomp import packed
from mixcomp.errors import FormatError
from mixcomp.format import ALL_WIDTHS, Scales, Segment, SiteFormat, from_constants
from mixcomp.lowering import reference
from mixcomp.packed import PackedWeight, check_values, pack_codes, pack_zeros, unpack_codes, unpack_zeros
from mixcomp.profiles import group_widths, layout, payload_bits, profiles, site_format

FLOAT = Scales.FLOAT_GROUP


def table(*rows: str) -> torch.Tensor:
    """``table("24", "44")``: a digit a group."""
    return torch.tensor([[int(d) for d in row] for row in rows], dtype=torch.uint8)


@given(drawn())
def test_codes_and_zeros_survive_packing(made: Drawn) -> None:
    weight = made.weight
    assert torch.equal(weight.unpacked(), made.codes.to(torch.uint8))
    assert torch.equal(group_widths(weight.fmt, weight.group_index, "cpu"), made.widths)
    if weight.zeros is not None:
        assert torch.equal(unpack_zeros(weight.zeros, weight.fmt), made.zeros.to(torch.uint8))
    check_values(weight)


@given(drawn())
def test_dequantize_is_the_formula(made: Drawn) -> None:
    found, wanted = made.weight.dequantize().double(), made.output()
    assert (found - wanted).abs().max() <= 2.0**-22 * wanted.abs().max().clamp_min(1)
    if made.weight.offsets is None and not made.weight.fmt.rank:
        assert torch.equal(found, wanted)  # an integer of 12 bits times a factor of 11


@given(drawn(dyadic=True), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_the_reference_is_exact_on_dyadic_data(made: Drawn, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randint(-4, 5, (3, made.weight.fmt.columns), generator=random)
    bias = torch.arange(made.weight.fmt.rows) / 4
    wanted = x.double() @ made.output().T + bias
    assert torch.equal(reference.mixed_linear(x.to(dtype), made.weight, bias), wanted.to(dtype))


@given(drawn())
def test_bits_are_counted_from_what_is_stored(made: Drawn) -> None:
    weight, fmt = made.weight, made.weight.fmt
    assert weight.stored_bits() == fmt.stored_bits() == 8 * sum(t.nbytes for t in weight.tensors().values())
    padded = [min(fmt.group, fmt.padded_columns - g * fmt.group) for g in range(fmt.groups)]
    by_hand = int((made.widths.long() * torch.tensor(padded)).sum())
    if fmt.scales is FLOAT:
        by_hand += 16 * fmt.rows * fmt.groups + 16 * int((made.widths == 1).sum())
        for row in made.widths.tolist():
            held = [w for w in row if w not in (1, 8)]
            by_hand += 0 if not held else 8 * fmt.groups if max(held) > 4 else 8 * ((fmt.groups + 1) // 2)
    else:
        by_hand += fmt.rows * (8 * ((fmt.groups + 1) // 2) + 16)
    mixing = {tuple(row) for row in made.widths.tolist() if len(set(row)) > 1}
    by_hand += len(mixing) * fmt.groups * (8 if fmt.groups <= 256 else 16)
    by_hand += fmt.rank * (8 * (fmt.rows + fmt.columns) + 32) + 16 * fmt.rows * fmt.scatter
    assert fmt.stored_bits() == by_hand
    real = [min(fmt.group, fmt.columns - g * fmt.group) for g in range(fmt.groups)]
    wanted = int((made.widths.long() * torch.tensor(real)).sum())
    assert fmt.payload_bits() == payload_bits(made.widths, fmt.columns, fmt.group) == wanted


@given(drawn())
def test_formats_survive_json_and_the_operator(made: Drawn) -> None:
    fmt = made.weight.fmt
    assert SiteFormat.from_json(fmt.to_json()) == fmt
    assert from_constants(fmt.constants(), fmt.columns, fmt.scatter, fmt.rank, fmt.group, int(fmt.scales)) == fmt


def test_what_is_default_is_spelled_as_it_always_was() -> None:
    fmt = SiteFormat(5, 70, (Segment(3, 4), Segment(2, 8)), True, 1)
    pairs = {"rows": 5, "columns": 70, "segments": [[3, 4], [2, 8]], "scatter": True, "rank": 1}
    assert fmt.to_json() == pairs
    assert fmt.constants() == [3, 4, 2, 8]
    assert list(fmt.tensors()) == [
        "codes", "scales", "factors", "row_index", "branch_a", "branch_b", "branch_scale"
    ]  # fmt: skip
    assert fmt.departure is None


def test_a_layout_by_hand() -> None:
    segments, index = layout(table("2424", "2424", "4444", "4422", "2424"), 100)
    two = ((2, 64), (4, 36))
    other = ((2, 36), (4, 64))
    assert segments == (Segment(2, 4, two, 0), Segment(1, 4), Segment(1, 4, other, 1), Segment(1, 4, two, 0))
    assert index is not None
    assert index.tolist() == [[0, 2, 1, 3], [2, 3, 0, 1]]
    assert [s.label for s in segments] == ["2+4", "4", "2+4", "2+4"]
    assert SiteFormat(5, 100, segments).tensors()["group_index"] == (torch.uint8, (2, 4))


def test_where_a_short_group_lies_its_row_is_padded_and_nowhere_else() -> None:
    """Groups of 128 on 192 columns: one of 128 at 4 bits, the short one (64) at 2, stored first."""
    fmt = site_format(table("42"), 192, group=128)
    assert fmt.padded_columns == 192
    assert [(p.bits, p.first_column, p.columns, p.row_bytes) for p in fmt.planes()] == [
        (2, 0, 64, 16),
        (4, 64, 128, 64),
    ]
    codes = torch.zeros(1, 192, dtype=torch.uint8)
    codes[0, 0], codes[0, 128], codes[0, 191] = 9, 1, 3
    packed_codes = pack_codes(codes, fmt, torch.tensor([[1, 0]]))
    assert packed_codes[[0, 15, 16]].tolist() == [1, 3 << 6, 9]


def test_bits_do_not_depend_on_the_order_of_rows() -> None:
    rows = ("2424", "4444", "8828", "2424", "2222", "8828")
    wanted = site_format(table(*sorted(rows)), 100).stored_bits()
    for order in itertools.permutations(rows):
        assert site_format(table(*order), 100).stored_bits() == wanted


def test_profiles_number_rows_in_the_order_of_their_widths() -> None:
    assert profiles(torch.tensor([4, 2, 8, 4])).tolist() == [1, 0, 2, 1]
    assert profiles(table("42", "24", "42", "22")).tolist() == [2, 1, 2, 0]


@given(st.lists(st.sampled_from(ALL_WIDTHS), min_size=1, max_size=40))
def test_a_width_a_row_is_a_table_of_one_group(row_widths: list[int]) -> None:
    widths = torch.tensor(row_widths, dtype=torch.uint8)
    assert torch.equal(profiles(widths), profiles(widths[:, None]))
    segments, index = layout(widths, 32)
    assert index is None
    assert segments == layout(widths[:, None], 32)[0]
    assert [s.width for s in segments for _ in range(s.rows)] == row_widths


def test_many_groups_take_two_bytes_each() -> None:
    widths = torch.tensor([[2, 4] * 150], dtype=torch.uint8)
    made = draw(widths, 300 * 32)
    assert made.weight.group_index is not None
    assert made.weight.group_index.dtype is torch.uint16
    assert torch.equal(made.weight.dequantize().double(), made.output())


@pytest.mark.parametrize(
    ("segments", "options", "names"),
    [
        ([[1, [[4, 32], [2, 38]], 0]], {}, "ascending"),
        ([[1, [[2, 70]], 0]], {}, "two or more"),
        ([[1, [[2, 32], [7, 38]], 0]], {}, "width 7"),
        ([[1, [[2, 32], [4, 32]], 0]], {}, "no 70 columns"),
        ([[1, [[2, 35], [4, 35]], 0]], {}, "no 70 columns"),
        ([[1, [[2, 32], [4, 38]], 0]], {"group": 64}, "in groups of 64"),
        ([[1, [[2, 32], [4, 38]], 1]], {}, "order 1"),
        ([[1, [[2, 32], [4, 38]], True]], {}, "'segments'"),
        ([[1, [[2, 32], [4, 38.0]], 0]], {}, "'segments'"),
        ([[1, [], 0]], {}, "'segments'"),
        ([[1, 9]], {}, "width 9"),
        ([[1, 4]], {"group": 48}, "48"),
        ([[1, 4]], {"group": 32}, "default"),
        ([[1, 4]], {"scales": "two-level"}, "default"),
        ([[1, 4]], {"scales": "float"}, "'scales'"),
        ([[1, 4]], {"scales": 1}, "'scales'"),
    ],
)
def test_impossible_formats_are_refused(segments: list[Any], options: dict[str, Any], names: str) -> None:
    data = {"rows": 1, "columns": 70, "segments": segments, "scatter": False, "rank": 0, **options}
    with pytest.raises(FormatError, match=names):
        SiteFormat.from_json(data)


def test_one_order_belongs_to_one_profile() -> None:
    parts = (Segment(1, 4, ((2, 32), (4, 64)), 0), Segment(1, 4, ((2, 64), (4, 32)), 0))
    with pytest.raises(FormatError, match="order 0"):
        SiteFormat(2, 96, parts)


@pytest.mark.parametrize("constants", [[1], [1, 0], [1, 0, 0, 2, 2, 32, 4], [1, 0, 0, 0]])
def test_constants_that_describe_nothing_are_refused(constants: list[int]) -> None:
    with pytest.raises(FormatError):
        from_constants(constants, 70, False, 0)
    with pytest.raises(FormatError, match="scales 2"):
        from_constants([1, 4], 70, False, 0, 32, 2)


MIXED = draw(table("2818", "2818", "4444"), 100, scales=FLOAT).weight


@pytest.mark.parametrize(
    ("name", "damage", "names"),
    [
        ("group_index", lambda t: torch.zeros_like(t), "permutation"),
        ("group_index", lambda t: t[:, [1, 0, 2, 3]], "zeros exceed"),
        ("group_index", lambda t: t[:, [3, 1, 2, 0]], "short last group"),
        ("group_index", lambda t: t[:, [0, 1, 3, 2]], "out of their order"),
        ("zeros", lambda t: t | 255, "zeros exceed"),
        ("zeros", lambda t: t ^ 16, "zeros exceed"),
        ("offsets", lambda t: t * torch.inf, "offsets"),
        ("factors", lambda t: t * torch.nan, "factors"),
    ],
)
def test_values_that_no_digest_can_judge(name: str, damage: Any, names: str) -> None:
    check_values(MIXED)
    with pytest.raises(FormatError, match=names):
        check_values(formats.with_tensor(MIXED, name, damage(MIXED.tensors()[name])))


def test_group_scales_are_asked_for_in_vain() -> None:
    with pytest.raises(FormatError, match="float-group"):
        MIXED.group_scales()


@pytest.mark.parametrize(
    "bug",
    [
        ("stored_columns", lambda fmt, order: torch.arange(fmt.padded_columns)),
        ("MIXED_UNIT", -6),
        ("per_column", lambda values, fmt, columns: values.repeat(1, fmt.group)[:, :columns]),
    ],
    ids=lambda b: b[0],
)
def test_planted_bugs_show(monkeypatch: pytest.MonkeyPatch, bug: tuple[str, Any]) -> None:
    made = draw(table("4282", "8888"), 100, scatter=True)
    assert torch.equal(made.weight.dequantize().double(), made.output())
    monkeypatch.setattr(packed, *bug)
    again = PackedWeight.from_tensors(made.weight.fmt, made.weight.tensors())
    assert not torch.equal(again.dequantize().double(), made.output())


def test_zeros_pack_by_segment() -> None:
    fmt = site_format(table("444", "555", "888", "111"), 96, scales=FLOAT)
    zeros = torch.tensor([[15, 1, 2], [31, 0, 3], [0, 0, 0], [0, 0, 0]], dtype=torch.uint8)
    assert pack_zeros(zeros, fmt).tolist() == [31, 2, 31, 0, 3]
    assert torch.equal(unpack_zeros(pack_zeros(zeros, fmt), fmt), zeros)
    assert fmt.tensors()["offsets"] == (torch.float16, (3,))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 8])
def test_every_code_of_every_width_survives(width: int) -> None:
    for columns in (1, 7, 32, 33, 129):
        fmt = SiteFormat(2, columns, (Segment(2, width),))
        codes = (torch.arange(2 * fmt.padded_columns) % 2**width).to(torch.uint8).view(2, -1)
        stored = pack_codes(codes, fmt)
        assert len(stored) == 2 * fmt.padded_columns * width // 8
        assert torch.equal(unpack_codes(stored, fmt), codes)
