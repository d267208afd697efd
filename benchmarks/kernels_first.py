"""Time of one linear layer, Llama-3.1-8B shapes, against ``F.linear`` in fp16: medians of CUDA-graph replays.

    python benchmarks/kernels_first.py [--sweep] [--out FILE]

A replay walks over enough copies of the weight to leave the L2 cache.  ``mixed`` holds 4.4 bits a weight in four
widths and scatters its rows.  Every kernel is compared with fp32 before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mixcomp.format import Segment, SiteFormat
from mixcomp.kernels import launch, tiles
from mixcomp.packed import PackedWeight

SHAPES = {"qkv": (6144, 4096), "q/o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (1, 16, 256)
MIX = {6: 0.06, 5: 0.30, 4: 0.54, 3: 0.10}
TRAFFIC = 200 << 20
SWEEP = {
    1: [tiles.Tile(8, 1, 1024, 4, 2), tiles.Tile(8, 1, 1024, 4, 4), tiles.Tile(8, 1, 2048, 4, 3)],
    16: [tiles.Tile(64, 16, 256, 4, 3), tiles.Tile(64, 16, 128, 4, 4), tiles.Tile(32, 16, 256, 2, 3)],
    256: [tiles.Tile(128, 64, 64, 8, 3), tiles.Tile(64, 128, 64, 4, 3), tiles.Tile(64, 64, 128, 4, 3)],
}


def segments(rows: int, kind: str) -> tuple[Segment, ...]:
    """One width, or the mix, each but the last a multiple of 8 rows."""
    if kind != "mixed":
        return (Segment(rows, int(kind)),)
    parts = [Segment(int(rows * share) // 8 * 8, width) for width, share in MIX.items() if width != 3]
    return (*parts, Segment(rows - sum(part.rows for part in parts), 3))


def random_site(fmt: SiteFormat) -> PackedWeight:
    """Random bytes are random codes; made on the device."""
    tensors = {}
    for name, (dtype, shape) in fmt.tensors().items():
        if name == "row_index":
            tensors[name] = torch.randperm(fmt.rows, device="cuda").to(dtype)
        elif name == "factors":
            tensors[name] = torch.full(shape, 2.0**-12, dtype=dtype, device="cuda")
        else:
            tensors[name] = torch.randint(0, 256, shape, dtype=dtype, device="cuda")
    return PackedWeight.from_tensors(fmt, tensors)


def median_time(calls: list[Callable[[], torch.Tensor]], replays: int = 15) -> float:
    """Microseconds a call: all calls in one graph, the median of its replays."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return sorted(times)[replays // 2]


def dense_time(rows: int, columns: int, x: torch.Tensor) -> float:
    """``F.linear`` in fp16."""
    copies = 1 + TRAFFIC // (2 * rows * columns)
    weights = [torch.randn(rows, columns, dtype=x.dtype, device="cuda") for _ in range(copies)]
    return median_time([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])


def packed_time(site: PackedWeight, x: torch.Tensor, tile: tiles.Tile | None) -> float:
    """One launch over the site's segments."""

    def call(weight: PackedWeight) -> torch.Tensor:
        return linear(weight, x, tile)

    wanted = x.float() @ site.dequantize().T
    worst = ((call(site).float() - wanted).abs().max() / wanted.abs().max()).item()
    if not worst < 2e-3:
        raise SystemExit(f"wrong result: {worst:.1e} of the largest output, {site.fmt.segments}, {tile}")
    copies = [site]
    for _ in range(TRAFFIC // (site.stored_bits() // 8)):
        copies.append(PackedWeight.from_tensors(site.fmt, {k: v.clone() for k, v in site.tensors().items()}))
    return median_time([lambda w=w: call(w) for w in copies])


def linear(weight: PackedWeight, x: torch.Tensor, tile: tiles.Tile | None = None) -> torch.Tensor:
    side = [weight.row_index, weight.branch_a, weight.branch_b, weight.branch_scale]
    return launch.mixed_linear(x, weight.codes, weight.scales, weight.factors, *side, None, weight.fmt, tile=tile)


def host_time(call: Callable[[], torch.Tensor], calls: int = 500) -> float:
    """Microseconds of processor time an eager call takes."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    took = time.perf_counter() - start
    torch.cuda.synchronize()
    return took / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="also time other tiles, on 4 bits")
    parser.add_argument("--kinds", nargs="*", default=["4", "2", "mixed"])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for name, tokens, kind in itertools.product(args.shapes, TOKENS, args.kinds):
        rows, columns = SHAPES[name]
        x = torch.randn(tokens, columns, dtype=torch.float16, device="cuda")
        dense = dense_time(rows, columns, x)
        site = random_site(SiteFormat(rows, columns, segments(rows, kind), scatter=kind == "mixed"))
        for tile in [None, *(SWEEP[tokens] if args.sweep and kind == "4" else [])]:
            took = packed_time(site, x, tile)
            rate = site.stored_bits() / 8e3 / took
            results.append([name, tokens, kind, str(tile or "chosen"), dense, took, dense / took, rate])
            print(f"{name:8} M={tokens:<4} {kind:6} fp16 {dense:7.1f} us  ours {took:7.1f} us", end="  ")
            print(f"{dense / took:5.2f}x {rate:6.0f} GB/s  {tile or ''}", flush=True)
    host = host_time(lambda: linear(site, x))
    weight = torch.randn(columns, columns, dtype=x.dtype, device="cuda")
    print(f"host time of an eager call: ours {host:.0f} us, F.linear", end=" ")
    print(f"{host_time(lambda: torch.nn.functional.linear(x, weight)):.0f} us")
    if args.out:
        args.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
