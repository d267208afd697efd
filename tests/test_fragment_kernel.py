"""The candidate kernel of benchmarks/fragment_kernel: its layout here, the kernel under Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mixcomp.format import WIDTHS, Segment, SiteFormat

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the candidate as the benchmarks do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return lambda name: importlib.import_module(f"fragment_kernel.{name}")


FORMATS = [SiteFormat(rows, columns, (Segment(rows, w),)) for w in WIDTHS for rows, columns in ((1, 1), (37, 161))]
FORMATS.append(SiteFormat(100, 300, tuple(Segment(r, w) for r, w in ((1, 8), (16, 2), (17, 5), (33, 3), (33, 6)))))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.rows}x{f.columns} {[s.width for s in f.segments]}")
def test_unpack_inverts_pack(fmt: SiteFormat, load: Any) -> None:
    fragments, draw = load("fragments"), torch.Generator().manual_seed(0)
    codes = torch.randint(256, (fmt.rows, fmt.padded_columns), generator=draw).to(torch.uint8)
    codes &= (2 ** torch.tensor(fmt.row_widths()) - 1).to(torch.uint8)[:, None]
    scales = torch.randint(1, 17, (fmt.rows, fmt.groups), generator=draw).to(torch.uint8)
    words, nibbles = fragments.pack(codes, scales, fmt)
    blocks = [-(-s.rows // 16) for s in fmt.segments]
    across = -(-fmt.columns // 128)
    assert len(words) == sum(n * s.width for n, s in zip(blocks, fmt.segments, strict=True)) * across * 64
    assert nibbles.shape == (sum(blocks), across, 8)
    back = fragments.unpack(words, nibbles, fmt)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scales)


@pytest.mark.parametrize("rows", [16, 32, 128])
def test_every_row_lies_in_one_tile(rows: int, load: Any) -> None:
    for fmt in FORMATS:
        table = load("tiles").tile_table(fmt, rows)
        held = [(first + i, width) for width, first, count, _, _ in table for i in range(count)]
        assert sorted(held) == list(enumerate(fmt.row_widths()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton exists for Linux only")
def test_the_kernel_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "interpreted_fragment_kernel.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=600, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= 20
    assert "skipped" not in done.stdout
