"""The stored format: bit planes and scales there and back, bytes equal to what the format promises."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixcomp.errors import FormatError
from mixcomp.format import WIDTHS, Scales, Segment, SiteFormat, runs
from mixcomp.packed import PackedWeight, check_values, levels, pack_codes, pack_scales, unpack_codes, unpack_scales

segments = st.lists(st.builds(Segment, st.integers(1, 5), st.sampled_from(WIDTHS)), min_size=1, max_size=5)


@st.composite
def packed_weights(draw: st.DrawFn) -> tuple[PackedWeight, torch.Tensor, torch.Tensor]:
    """A packed weight with the codes and group scales it was packed from."""
    parts = tuple(draw(segments))
    rows = sum(s.rows for s in parts)
    columns = draw(st.integers(1, 130))
    rank = draw(st.integers(0, min(2, rows, columns)))
    fmt = SiteFormat(rows, columns, parts, draw(st.booleans()), rank)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    top = torch.tensor(fmt.row_widths())[:, None]
    codes = (torch.rand(rows, fmt.padded_columns, generator=random) * 2**top).to(torch.uint8)
    scales = torch.randint(1, 17, (rows, fmt.groups), generator=random, dtype=torch.uint8)
    tensors = {
        "codes": pack_codes(codes, fmt),
        "scales": pack_scales(scales),
        "factors": torch.randn(rows, generator=random).half(),
    }
    if fmt.scatter:
        tensors["row_index"] = torch.randperm(rows, generator=random).to(fmt.index_dtype)
    if rank:
        tensors["branch_a"] = torch.randint(-127, 128, (rows, rank), generator=random, dtype=torch.int8)
        tensors["branch_b"] = torch.randint(-127, 128, (rank, columns), generator=random, dtype=torch.int8)
        tensors["branch_scale"] = torch.rand(rank, generator=random)
    return PackedWeight.from_tensors(fmt, tensors), codes, scales


@given(packed_weights())
def test_codes_and_scales_survive_packing(drawn: tuple[PackedWeight, torch.Tensor, torch.Tensor]) -> None:
    weight, codes, scales = drawn
    assert torch.equal(unpack_codes(weight.codes, weight.fmt), codes)
    assert torch.equal(unpack_scales(weight.scales, weight.fmt.groups), scales)


@given(packed_weights())
def test_bits_are_counted_from_what_is_stored(drawn: tuple[PackedWeight, torch.Tensor, torch.Tensor]) -> None:
    weight = drawn[0]
    fmt = weight.fmt
    assert weight.stored_bits() == fmt.stored_bits() == 8 * sum(t.nbytes for t in weight.tensors().values())
    by_hand = sum(s.rows * s.width * fmt.padded_columns for s in fmt.segments)  # codes
    by_hand += fmt.rows * (8 * ((fmt.groups + 1) // 2) + 16 + 16 * fmt.scatter)  # scales, factor, index
    by_hand += fmt.rank * (8 * (fmt.rows + fmt.columns) + 32)
    assert fmt.stored_bits() == by_hand


@given(packed_weights())
def test_dequantize_is_the_formula_element_by_element(drawn: tuple[PackedWeight, torch.Tensor, torch.Tensor]) -> None:
    weight, codes, scales = drawn
    fmt, out = weight.fmt, weight.dequantize()
    widths = fmt.row_widths()
    row, column = fmt.rows // 2, fmt.columns - 1
    code, width = int(codes[row, column]), widths[row]
    level = code - 128 if width == 8 else 2 * code - (2**width - 1)
    wanted = float(weight.factors[row]) * int(scales[row, column // 32]) * level
    if fmt.rank:
        assert weight.branch_a is not None
        assert weight.branch_b is not None
        assert weight.branch_scale is not None
        wanted += float(
            (weight.branch_a[row].double() * weight.branch_scale.double()) @ weight.branch_b[:, column].double()
        )
    place = row if weight.row_index is None else int(weight.row_index[row])
    assert float(out[place, column]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_levels_are_odd_integers_up_to_six_bits() -> None:
    fmt = SiteFormat(2, 32, (Segment(1, 3), Segment(1, 8)))
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    codes[0, :8], codes[1, :2] = torch.arange(8, dtype=torch.uint8), torch.tensor([0, 255], dtype=torch.uint8)
    found = levels(codes, fmt)
    assert found[0, :8].tolist() == [-7, -5, -3, -1, 1, 3, 5, 7]
    assert found[1, :2].tolist() == [-128, 127]


def test_equal_formats_are_one_key_in_every_process() -> None:
    """The hash is kept, so it may hold nothing that differs between processes, as the hashes of names do."""
    fmt = SiteFormat(5, 64, (Segment(3, 4), Segment(2, 8)), scatter=True, scales=Scales.FLOAT_GROUP)
    assert {fmt: 1}[SiteFormat.from_json(fmt.to_json())] == 1
    made = "SiteFormat(5, 64, (Segment(3, 4), Segment(2, 8)), True, 0, 32, Scales(1))"
    code = f"from mixcomp.format import *; print(hash({made}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == hash(fmt)


def test_runs_and_json_round_trip() -> None:
    fmt = SiteFormat(5, 70, runs([4, 4, 2, 4, 4]), scatter=True, rank=1)
    assert fmt.segments == (Segment(2, 4), Segment(1, 2), Segment(2, 4))
    assert SiteFormat.from_json(fmt.to_json()) == fmt


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"segments": [[5, 7]]}, "width 7"),
        ({"segments": [[4, 4]]}, "segments hold 4 rows"),
        ({"segments": [[0, 4], [5, 4]]}, "rows 0"),
        ({"segments": [[5, True]]}, "'segments'"),
        ({"columns": 0}, "holds no weight"),
        ({"rank": 6}, "rank 6"),
        ({"rank": "1"}, "'rank'"),
        ({"scatter": 1}, "'scatter'"),
        ({"zeros": 1}, "fields"),
    ],
)
def test_impossible_formats_are_refused_by_field(change: dict[str, object], names: str) -> None:
    good = SiteFormat(5, 70, (Segment(5, 4),)).to_json()
    with pytest.raises(FormatError, match=names):
        SiteFormat.from_json({**good, **change})


def test_values_that_no_digest_can_judge() -> None:
    fmt = SiteFormat(2, 32, (Segment(2, 4),), scatter=True)
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    good = {
        "codes": pack_codes(codes, fmt),
        "scales": pack_scales(torch.ones(2, 1, dtype=torch.uint8)),
        "factors": torch.ones(2).half(),
        "row_index": torch.tensor([1, 0], dtype=torch.int16),
    }
    check_values(PackedWeight.from_tensors(fmt, good))
    with pytest.raises(FormatError, match="factors"):
        check_values(PackedWeight.from_tensors(fmt, good | {"factors": torch.tensor([1.0, torch.inf]).half()}))
    with pytest.raises(FormatError, match="permutation"):
        check_values(PackedWeight.from_tensors(fmt, good | {"row_index": torch.tensor([1, 1], dtype=torch.int16)}))
    with pytest.raises(FormatError, match="'factors'"):
        PackedWeight.from_tensors(fmt, good | {"factors": torch.ones(3).half()})
