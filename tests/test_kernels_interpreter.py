"""Kernels without a GPU: the tile table as arithmetic, the kernels under Triton's interpreter in their own process."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixcomp.format import WIDTHS, Segment, SiteFormat
from mixcomp.kernels import tiles

HERE = Path(__file__).parent


@st.composite
def formats(draw: st.DrawFn, largest: int = 1) -> SiteFormat:
    parts = draw(st.lists(st.builds(Segment, st.integers(1, 300 * largest), st.sampled_from(WIDTHS)), min_size=1))
    return SiteFormat(sum(part.rows for part in parts), draw(st.integers(1, 20_000 * largest)), tuple(parts))


@given(formats(), st.sampled_from(tiles.ROW_TILES))
def test_every_row_lies_in_one_tile_and_has_its_width(fmt, rows):
    table = tiles.tile_table(fmt, rows)
    held = [(first + i, width) for width, first, count, _, _ in table for i in range(count)]
    assert sorted(held) == list(enumerate(fmt.row_widths()))
    assert all(1 <= count <= rows for _, _, count, _, _ in table)
    assert [entry[0] for entry in table] == sorted((entry[0] for entry in table), reverse=True)


@given(formats(largest=4000), st.integers(0, 10**9))
def test_tiles_point_at_the_bytes_of_the_format(fmt, pick):
    """Also where ``codes`` is larger than 2**31 bytes: the table must fit 32 bits, its meaning needs 64."""
    table = tiles.tile_table(fmt, 1 << 20)
    width, first, _, wide, narrow = table[pick % len(table)]
    planes = [p for p in fmt.planes() if p.first_row <= first < p.first_row + p.rows]
    starts = [(wide, narrow)[i] * 4 * fmt.groups for i in range(len(planes))]
    assert starts == [p.offset + (first - p.first_row) * p.row_bytes for p in planes]
    assert sum(p.bits for p in planes) == width
    assert max(wide, narrow) < 2**31


def test_the_table_of_a_site_beyond_32_bits():
    fmt = SiteFormat(400_000, 16_384, (Segment(300_000, 8), Segment(100_000, 5)))
    last = tiles.tile_table(fmt, 64)[-1]
    planes = list(fmt.planes())
    row = last[1] - planes[2].first_row
    assert planes[2].offset > 2**32
    assert last[3] * 4 * fmt.groups == planes[1].offset + row * planes[1].row_bytes
    assert last[4] * 4 * fmt.groups == planes[2].offset + row * planes[2].row_bytes


def test_tiles_suit_the_kernel():
    sizes = [tiles.choose(tokens, size) for tokens in (1, 2, 16, 17, 64, 65, 10**6) for size in (2, 4)]
    for tile in sizes:
        assert tile.rows in tiles.ROW_TILES
        assert tile.columns >= 64
        assert all(value & (value - 1) == 0 for value in (tile.rows, tile.tokens, tile.columns, tile.warps))
    assert [tiles.choose(tokens, 2).tokens for tokens in (1, 2, 16, 17, 64, 65)] == [1, 16, 16, 64, 64, 128]


def test_one_kernel_serves_all_mixes():
    mixed = [SiteFormat(2, 32, (Segment(1, a), Segment(1, b))) for a in WIDTHS for b in WIDTHS if a != b]
    assert {tiles.width_mask(fmt) for fmt in mixed} == {tiles.ALL_WIDTHS}
    assert tiles.width_mask(SiteFormat(2, 32, (Segment(1, 5), Segment(1, 5)))) == 1 << 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton exists for Linux only")
def test_the_kernels_under_the_interpreter():
    assert importlib.util.find_spec("triton"), "triton is missing; on Linux it is one of mixcomp's dependencies"
    tests = [str(HERE / f"interpreted_{what}.py") for what in ("kernels", "columns")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=1200, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) > 200
    assert "skipped" not in done.stdout
