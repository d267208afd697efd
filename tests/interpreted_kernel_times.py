"""benchmarks/kernel_times.py under Triton's interpreter: run by ``test_kernels_interpreter`` in its own process."""

from __future__ import annotations

import dataclasses
import json

import kernel_sites as sites
import kernel_sweep as sweep
import kernel_times
import pytest
import torch

from mixcomp.format import WIDTHS
from mixcomp.kernels import tiles

ONE = tiles.Tile(*sweep.SWEEP[8][0], programs=1)


def test_the_command_up_to_the_clock(tmp_path, monkeypatch, capsys):
    """All of it but graphs and libraries, on a tiny layer; every kernel is right there."""
    small = {"DEVICE": "cpu", "SHAPES": {"a": (90, 384)}, "TOKENS": (1, 65)}
    monkeypatch.setattr(sweep, "PROGRAMS", (1, 264))
    monkeypatch.setattr(sweep, "BUCKETS", {1: 1, 8: 5})
    for name, value in small.items():
        monkeypatch.setattr(sites, name, value)
    monkeypatch.setattr(sites, "median_time", lambda calls, _=0.03: float(calls[0]().isfinite().all()))
    monkeypatch.setattr(sites, "library_times", lambda *_: {"fp16": 1.0})
    monkeypatch.setattr(sweep, "SWEEP", {8: sweep.SWEEP[8][1:2]})
    monkeypatch.setattr(sweep, "check_all", lambda jobs: checked.extend(jobs))
    monkeypatch.setattr(kernel_times, "hosts", dict)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    checked: list[sweep.Job] = []
    kernel_times.main(["--sweep", "--kinds", "4.16 uniform", "4.4 mix", "--out", str(tmp_path / "times.json")])
    found = json.loads((tmp_path / "times.json").read_text())
    assert len(found["rows"]) == 2 * 2
    timed = [
        {kernel: row[kernel] for kernel in sites.KERNELS if row["tokens"] in sites.FOR[kernel]} for row in found["rows"]
    ]
    assert timed == 2 * [{"fused": 1.0}, {"fused": 1.0, "expanded": 1.0, "int8": 1.0}], found["rows"]
    assert [best[:2] for best in found["best"]] == [[1, "a"], [8, "a"]]
    assert {job.widths for job in checked} == {WIDTHS, (4,)}
    told = capsys.readouterr().out.partition("TABLE: ")[2]
    for row, tile in tiles.TABLE[tiles.shape_class(90, 384)].items():
        chosen = {1: found["best"][0][2], 8: found["best"][1][2]}.get(row, tile)
        assert f"        {row}: {chosen}," in told


def test_the_check_of_the_command(monkeypatch):
    monkeypatch.setattr(sites, "DEVICE", "cpu")
    assert sweep.is_exact(sweep.Job(ONE), 40, 512, 1, 1)
    assert "power" in sweep.check_job(sweep.Job(dataclasses.replace(ONE, tokens=3)))


def test_a_row_serves_up_to_its_tokens():
    assert [sweep.row_of(sweep.BUCKETS, n) for n in (1, 2, 8, 9, 33, 64, 256)] == [1, 8, 8, 16, 64, 64, 64]
    assert {row for table in tiles.TABLE.values() for row in table} == set(sweep.BUCKETS)


@pytest.mark.parametrize("shape", sites.SHAPES)
def test_every_shape_has_a_class_of_its_own(shape):
    classes = {name: tiles.shape_class(*size) for name, size in sites.SHAPES.items()}
    assert len(set(classes.values())) == len(classes) == len(tiles.TABLE)
    assert classes[shape] in tiles.TABLE
