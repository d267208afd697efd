"""Time of one linear layer, Llama-3.1-8B shapes, against ``F.linear`` in fp16: medians of CUDA-graph replays.

    python benchmarks/kernels_first.py [--sweep] [--out FILE]

A replay walks over enough copies of the weight to leave the L2 cache.  ``mixed`` holds 4.4 bits a weight in four
widths and scatters its rows.  Every kernel is compared with fp32 before it is timed.
"""

from __future__ import annotations

import argparse
import json
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
    names = ("row_index", "branch_a", "branch_b", "branch_scale")

    def call(weight: PackedWeight) -> torch.Tensor:
        side = [getattr(weight, name) for name in names]
        return launch.mixed_linear(x, weight.codes, weight.scales, weight.factors, *side, None, weight.fmt, tile=tile)

    wanted = x.float() @ site.dequantize().T
    worst = ((call(site).float() - wanted).abs().max() / wanted.abs().max()).item()
    if not worst < 2e-3:
        raise SystemExit(f"wrong result: {worst:.1e} of the largest output, {site.fmt.segments}, {tile}")
    copies = 1 + TRAFFIC // (site.stored_bits() // 8)
    fresh = [site, *(PackedWeight.from_tensors(site.fmt, {k: v.clone() for k, v in site.tensors().items()}) for _ in range(copies - 1))]
    return median_time([lambda w=w: call(w) for w in fresh])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="also time other tiles, on the mix")
    parser.add_argument("--kinds", nargs="*", default=["4", "2", "mixed"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    rows_out = []
    for name, (rows, columns) in SHAPES.items():
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, dtype=torch.float16, device="cuda")
            dense = dense_time(rows, columns, x)
            for kind in args.kinds:
                fmt = SiteFormat(rows, columns, segments(rows, kind), scatter=kind == "mixed")
                site = random_site(fmt)
                for tile in [None, *(SWEEP[tokens] if args.sweep and kind == "mixed" else [])]:
                    took = packed_time(site, x, tile)
                    gbs = site.stored_bits() / 8e3 / took
                    rows_out.append([name, tokens, kind, str(tile or "chosen"), dense, took, dense / took, gbs])
                    print(f"{name:8} M={tokens:<4} {kind:6} fp16 {dense:7.1f} us  ours {took:7.1f} us  {dense / took:5.2f}x "
                          f"{gbs:6.0f} GB/s  {tile or ''}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows_out))


if __name__ == "__main__":
    main()
