"""Kernels without a GPU: the tile table as arithmetic, the kernels under Triton's interpreter in their own process."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixcomp.format import BLOCK, WIDTHS, Segment, SiteFormat, blocks
from mixcomp.kernels import fragments, tiles
from mixcomp.lowering import gpu

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"


@st.composite
def formats(draw: st.DrawFn, largest: int = 1) -> SiteFormat:
    parts = draw(st.lists(st.builds(Segment, st.integers(1, 300 * largest), st.sampled_from(WIDTHS)), min_size=1))
    return SiteFormat(sum(part.rows for part in parts), draw(st.integers(1, 20_000 * largest)), tuple(parts))


FORMATS = [SiteFormat(rows, columns, (Segment(rows, w),)) for w in WIDTHS for rows, columns in ((1, 1), (37, 161))]
FORMATS.append(SiteFormat(100, 300, tuple(Segment(r, w) for r, w in ((1, 8), (16, 2), (17, 5), (33, 3), (33, 6)))))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.rows}x{f.columns} {[s.width for s in f.segments]}")
def test_stored_bytes_come_back_from_fragments(fmt):
    """Whatever the bytes are: also those of padding."""
    draw = torch.Generator().manual_seed(0)
    stored = fmt.tensors()
    codes, scales = (torch.randint(256, stored[n][1], generator=draw).to(torch.uint8) for n in ("codes", "scales"))
    words, nibbles = gpu.to_fragments(codes, scales, fmt)
    wanted = fmt.fragments()
    assert [(t.dtype, tuple(t.shape)) for t in (words, nibbles)] == [wanted["codes"], wanted["scales"]]
    back = gpu.to_stored(words, nibbles, fmt)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scales)
    assert [(t.dtype, t.shape) for t in gpu.to_stored(words.to("meta"), nibbles.to("meta"), fmt)] == [
        (t.dtype, t.shape) for t in (codes, scales)
    ]


@given(formats(), st.sampled_from((16, 32, 128)))
def test_every_row_lies_in_one_tile_and_has_its_width(fmt, rows):
    table = tiles.tile_table(fmt, rows)
    held = [(first + i, width) for width, first, count, _, _ in table for i in range(count)]
    assert sorted(held) == list(enumerate(fmt.row_widths()))
    assert all(1 <= count <= rows for _, _, count, _, _ in table)
    assert [entry[0] for entry in table] == sorted((entry[0] for entry in table), reverse=True)


@given(formats(largest=100), st.integers(0, 10**9))
def test_tiles_point_at_the_blocks_of_their_rows(fmt, pick):
    """Also where codes take more than 2**31 bytes: the table must fit 32 bits, its meaning needs 64."""
    table = tiles.tile_table(fmt, 1 << 20)
    width, first, _, unit, block = table[pick % len(table)]
    across, above = blocks(fmt.columns, BLOCK[1]), []
    for rows, segment in fmt.row_ranges():
        if rows.start <= first < rows.stop:
            above.append((width, (first - rows.start) // BLOCK[0]))
            break
        above.append((segment.width, blocks(segment.rows, BLOCK[0])))
    assert unit == sum(w * down for w, down in above) * across
    assert block == sum(down for _, down in above)
    assert unit < 2**31
    assert unit * fragments.UNIT < fmt.fragments()["codes"][1][0]


def test_the_table_of_a_site_beyond_32_bits():
    fmt = SiteFormat(400_000, 16_384, (Segment(300_000, 8), Segment(100_000, 5)))
    last = tiles.tile_table(fmt, 64)[-1]
    assert last[3] * fragments.UNIT * 4 > 2**32
    assert last[3:] == ((300_000 * 8 + 5 * (last[1] - 300_000)) // 16 * 128, last[1] // 16)


def test_tiles_suit_the_kernel():
    chosen = [tile for row in tiles.TABLE.values() for tile in row.values()]
    for tile in (*chosen, tiles.FP32):
        numbers = tile.blocks, tile.along, tile.down, tile.tokens
        assert all(value & (value - 1) == 0 for value in numbers)
        assert tile.tokens >= 8
        assert tile.programs >= 1
    fmt = SiteFormat(4096, 4096, (Segment(4096, 4),))
    assert [tiles.choose(fmt, tokens, 2) for tokens in (1, 2, 9, 64, 65)] == [
        tiles.TABLE["small"][row] for row in (1, 8, 16, 64, 64)
    ]
    assert tiles.choose(fmt, 1, 4) is tiles.FP32


def test_shapes_go_to_their_classes():
    shapes = [(1024, 4096), (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (10, 10)]
    wanted = ["deep", "small", "middle", "large", "deep", "large", "small"]
    assert [tiles.shape_class(*shape) for shape in shapes] == wanted


def test_columns_are_split_where_there_are_few_tiles():
    fmt = SiteFormat(4096, 4096, (Segment(4096, 4),))
    tile = tiles.Tile(blocks=2, along=4, down=1, tokens=8, stages=3, programs=264)
    assert [tiles.splits(tile, count, fmt) for count in (1, 128, 264, 1000)] == [8, 2, 1, 1]
    assert tiles.splits(tile, 1, SiteFormat(16, 100, (Segment(16, 4),))) == 1


def test_one_kernel_serves_all_mixes():
    mixed = [SiteFormat(2, 32, (Segment(1, a), Segment(1, b))) for a in WIDTHS for b in WIDTHS if a != b]
    assert {tiles.width_mask(fmt) for fmt in mixed} == {tiles.ALL_WIDTHS}
    assert tiles.width_mask(SiteFormat(2, 32, (Segment(1, 5), Segment(1, 5)))) == 1 << 5


class Jitted:
    """Stands for a kernel that Triton compiles: notes how it was launched."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple]] = []

    def __getitem__(self, programs):
        def launched(*args, num_warps):
            self.seen.append(("found by Triton", (programs, *args)))
            return Compiled(self.seen)

        return launched


class Compiled:
    """Stands for the result."""

    def __init__(self, seen) -> None:
        self.seen = seen

    def __getitem__(self, programs):
        return lambda *args: self.seen.append(("known", (programs, *args)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton exists for Linux only")
def test_a_compiled_kernel_is_found_once_for_what_it_depends_on(monkeypatch):
    launch = importlib.import_module("mixcomp.kernels.launch")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel, x = Jitted(), torch.zeros(64, dtype=torch.float16)
    assert x.data_ptr() % 16 == 0

    def how(*tensors, numbers=(1, 2), constants=(True,)):
        launch.start(kernel, (3, 1, 1), tensors, numbers, constants, 4, {})
        assert kernel.seen[-1][1] == ((3, 1, 1), *tensors, *numbers, *constants)
        return kernel.seen[-1][0]

    new, known = "found by Triton", "known"
    assert [how(x, None), how(x, None), how(x[8:], None, numbers=(5, 6))] == [new, known, known]
    assert [how(x, x), how(x, None, constants=(False,)), how(x.float(), None)] == [new, new, new]
    assert [how(x[1:], None), how(x[1:], None)] == [new, new], "where it starts matters"
    assert [how(x, None, numbers=(1, 2**31)), how(x, None, numbers=(1, 2**31))] == [new, new]
    assert how(x, None) == known


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton exists for Linux only")
def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    launch = importlib.import_module("mixcomp.kernels.launch")
    current, seen = [0], []

    @contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    class Kernel:
        def __getitem__(self, _):
            return lambda *_, num_warps: seen.append(current[0])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    for index in (0, 1, 1):
        tensor = SimpleNamespace(device=SimpleNamespace(index=index), data_ptr=lambda: 8, dtype=torch.float16)
        launch.start(Kernel(), (1, 1, 1), (tensor,), (1,), (), 4, {})
    assert seen == [0, 1, 1]
    assert current == [0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton exists for Linux only")
def test_the_kernels_under_the_interpreter():
    assert importlib.util.find_spec("triton"), "triton is missing; on Linux it is one of mixcomp's dependencies"
    tests = [str(HERE / f"interpreted_{what}.py") for what in ("kernels", "kernel_times", "columns", "int8")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=1200, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) > 320
    assert "skipped" not in done.stdout
