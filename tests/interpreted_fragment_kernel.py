"""The candidate kernel under Triton's interpreter: run by ``test_fragment_kernel`` in a process of its own."""

from __future__ import annotations

import dataclasses
import json

import kernel_times
import pytest
import torch
from fragment_kernel import fragments, launch, sites, sweep, tiles

from interpreted_kernels import STRIDES, fenced
from kernel_cases import Case, dyadic, exact
from mixcomp.errors import InputError
from mixcomp.format import WIDTHS, Scales, Segment, SiteFormat

F16, F32 = torch.float16, torch.float32
ONE = tiles.SMALL[8]
FLAT = tiles.Tile(blocks=1, along=1, down=1, tokens=16, stages=2, programs=40)
MIXED = (Segment(17, 6), Segment(3, 5), Segment(1, 3), Segment(40, 2), Segment(5, 8))
CASES = {
    "one token, a tail": (Case(SiteFormat(66, 122, MIXED), 1, F16, None, 1), None),
    "scatter and bias": (Case(SiteFormat(66, 257, MIXED, scatter=True), 5, F16, F16, 2), None),
    "side branch": (Case(SiteFormat(66, 130, MIXED, scatter=True, rank=17), 5, F32, F32, 1), None),
    "side branch, one token": (Case(SiteFormat(21, 96, (Segment(21, 4),), rank=1), 1, F16, F32, 4), None),
    "one column": (Case(SiteFormat(3, 1, (Segment(3, 4),)), 5, F16, None, 5), FLAT),
    "split, one token": (Case(SiteFormat(20, 2560, (Segment(17, 4), Segment(3, 3))), 1, F16, F16, 1), ONE),
    "split, a tail": (Case(SiteFormat(20, 1090, (Segment(17, 4), Segment(3, 5)), scatter=True), 5, F16, None, 7), FLAT),
    "tiles of tokens": (Case(SiteFormat(33, 200, (Segment(33, 5),)), 33, F16, None, 8), FLAT),
    "the large tile": (Case(SiteFormat(150, 300, (Segment(150, 3),), scatter=True), 5, F16, None, 10), tiles.LARGE),
}


def run(weight, x, bias, tile=None):
    """The kernel on copies that lie against forbidden pages, into an output full of NaN."""
    tensors = {name: fenced(tensor, behind=True) for name, tensor in fragments.operands(weight).items()}
    out = fenced(torch.full((x.shape[0], weight.fmt.rows), torch.nan, dtype=x.dtype), behind=True)
    x, bias = fenced(x, behind=True), fenced(bias, behind=True)
    assert launch.mixed_linear(x, **tensors, bias=bias, fmt=weight.fmt, out=out, tile=tile) is out
    return out


@pytest.mark.parametrize("name", CASES)
def test_dyadic_data_is_exact(name):
    case, tile = CASES[name]
    weight, x, bias = dyadic(case)
    assert torch.equal(run(weight, x, bias, tile), exact(weight, x, bias))
    assert not launch.counters(x.device).any(), "counters are zero between launches"


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("split")])
def test_the_split_cases_split(name):
    case, tile = CASES[name]
    assert tiles.splits(tile, len(tiles.tile_table(case.fmt, tile.rows)), case.fmt) > 1


@pytest.mark.parametrize("width", WIDTHS)
def test_every_weight_can_be_read_back(width):
    weight, _, _ = dyadic(Case(SiteFormat(9, 122, (Segment(9, width),)), 1, F32, None, width))
    assert torch.equal(run(weight, torch.eye(122), None, tiles.LARGE), weight.dequantize().t())
    assert torch.equal(run(weight, torch.eye(122)[37:38].half(), None)[0].float(), weight.dequantize()[:, 37])


@pytest.mark.parametrize("layout", ["transposed", "every third column"])
def test_activations_of_any_strides(layout):
    weight, x, bias = dyadic(Case(SiteFormat(7, 256, (Segment(3, 5), Segment(4, 3))), 5, F16, F16, 1))
    out = launch.mixed_linear(STRIDES[layout](x), **fragments.operands(weight), bias=bias, fmt=weight.fmt)
    assert torch.equal(out, exact(weight, x, bias))


def test_a_wrong_order_of_the_codes_is_noticed(monkeypatch):
    """Packing and unpacking stay inverse to each other; only the kernel can tell."""
    weight, x, _ = dyadic(Case(SiteFormat(17, 130, (Segment(17, 5),)), 5, F16, None, 1))
    monkeypatch.setattr(fragments, "_ORDER", (*fragments._ORDER[:7], 8, 7))
    words, nibbles = fragments.pack(weight.unpacked(), weight.group_scales(), weight.fmt)
    assert torch.equal(fragments.unpack(words, nibbles, weight.fmt)[1], weight.group_scales())
    assert not torch.equal(run(weight, x, None), exact(weight, x, None))


def test_refuses_what_it_would_misread():
    weight, x, _ = dyadic(Case(SiteFormat(5, 40, (Segment(5, 4),)), 2, F32, None, 1))
    tensors = fragments.operands(weight) | {"words": torch.zeros(257, dtype=torch.int32)[1:]}
    with pytest.raises(InputError, match="multiple of 16"):
        launch.mixed_linear(x, **tensors, bias=None, fmt=weight.fmt)
    departed = type(weight)(SiteFormat(5, 40, (Segment(5, 4),), scales=Scales.FLOAT_GROUP), weight.codes, None, x)
    with pytest.raises(InputError, match="scales"):
        fragments.operands(departed)


def test_the_command_up_to_the_clock(tmp_path, monkeypatch):
    """All of benchmarks/kernel_times.py but graphs and libraries, on a tiny layer; every kernel is right there."""
    small = {"DEVICE": "cpu", "SHAPES": {"a": (90, 384)}, "TOKENS": (1, 5)}
    monkeypatch.setitem(sites.KERNELS, "overlap", launch.mixed_linear)  # the interpreter knows no overlapping launches
    monkeypatch.setattr(sweep, "PROGRAMS", (1, 264))
    for name, value in small.items():
        monkeypatch.setattr(sites, name, value)
    monkeypatch.setattr(sites, "median_time", lambda calls, _=0.03: float(calls[0]().isfinite().all()))
    monkeypatch.setattr(sites, "library_times", lambda *_: {"fp16": 1.0})
    monkeypatch.setattr(sweep, "SWEEP", {1: sweep.SWEEP[8][:1], 1 << 30: sweep.SWEEP[16][:1]})
    monkeypatch.setattr(sweep, "STORED", {1: sweep.STORED[1][:1], 1 << 30: sweep.STORED[16][:1]})
    monkeypatch.setattr(sweep, "check_all", lambda jobs: checked.extend(jobs))
    monkeypatch.setattr(kernel_times, "hosts", dict)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    checked: list[sweep.Job] = []
    kernel_times.main(["--sweep", "--kinds", "4.16 uniform", "4.4 mix", "--out", str(tmp_path / "times.json")])
    found = json.loads((tmp_path / "times.json").read_text())
    assert len(found["rows"]) == 2 * 2
    assert all(row[kernel] == 1.0 for row in found["rows"] for kernel in sites.KERNELS), found["rows"]
    assert len(found["best"]) == 2 * 2
    assert {job.kernel for job in checked} == set(sites.KERNELS)
    assert {job.widths for job in checked} == {WIDTHS, (4,)}


@pytest.mark.parametrize("kernel", ["product", "fragments"])
def test_the_check_of_the_command(kernel, monkeypatch):
    monkeypatch.setattr(sites, "DEVICE", "cpu")
    tile = {"product": sweep.stored.SMALL[1], "fragments": ONE}[kernel]
    assert sweep.is_exact(sweep.Job(kernel, tile), 40, 512, 1, 1)
    assert "power" in sweep.check_job(sweep.Job("fragments", dataclasses.replace(ONE, tokens=3)))
