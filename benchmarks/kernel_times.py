"""Time of the linears of a Llama-3.1-8B layer: the product's kernels, cuBLAS and tinygemm, on one GPU.

    python benchmarks/kernel_times.py [--sweep] [--kinds KIND ...] [--out FILE]

The layer is qkv + o + gate_up + down, one launch each (``kernel_sites`` says how a launch is timed).  First every kernel
runs on data whose results are known exactly.  ``--sweep`` times tiles on the 4.4-bit mix, uses the best of each shape from
there on, and prints them as the source of ``TABLE`` in kernels/tiles.py.  Where "expanded" overtakes "fused" is where
``lowering.select.MAX_FUSED_TOKENS`` belongs.  "int8" counts the rounding of activations and weights in.

The file is not called kernels.py: transformers imports any module of that name that it finds beside a script.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import kernel_sites as sites
import kernel_sweep as sweep
import torch
import triton
from kernel_sites import KERNELS, KINDS
from kernel_sweep import Best

#: read-only, bytes a microsecond, measured on an H100 SXM
BANDWIDTH = 3.10e6
Times = dict[str, float | str]


def layer(kinds: Sequence[str], best: Best) -> Iterator[dict[str, Any]]:
    """A row for every shape, kind and number of tokens, times in microseconds."""
    for shape, (height, columns) in sites.SHAPES.items():
        peers = {tokens: sites.library_times(height, columns, tokens) for tokens in sites.TOKENS}
        for kind in kinds:
            site = sites.Site(sites.site_format(height, columns, kind))
            bits = site.fmt.stored_bits()
            for tokens in sites.TOKENS:
                x = torch.randn(tokens, columns, dtype=torch.float16, device=sites.DEVICE)
                times: Times = {}
                tile = best.get((sweep.row_of(sweep.BUCKETS, tokens), shape))
                for kernel in KERNELS:
                    if tokens in sites.FOR[kernel]:
                        times[kernel] = site.time(kernel, x, tile)
                floor = (bits / 8 + 2 * tokens * (height + columns)) / BANDWIDTH
                times |= {**peers[tokens], "floor": floor}
                told = (f"{name} {t if isinstance(t, str) else round(t, 1)}" for name, t in times.items())
                print(f"{shape:8} M={tokens:<3} {kind:13}", *told, sep="  ", flush=True)
                yield {"shape": shape, "kind": kind, "tokens": tokens, "bits": bits / site.fmt.weights, **times}
            del site


def summary(rows: list[dict[str, Any]]) -> None:
    """Sums over the layer."""
    print("a layer: us; ratio to cuBLAS in fp16; part of the floor (the time of reading everything once)")
    for kind, tokens in dict.fromkeys((row["kind"], row["tokens"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["tokens"]) == (kind, tokens)]
        names = [name for name in own[0] if name not in ("shape", "kind", "tokens", "bits")]
        total = {name: sum(_number(row.get(name)) for row in own) for name in names}
        for name, took in total.items():
            told = f"{took:8.1f} us  {total['fp16'] / took:5.2f} x  {total['floor'] / took:4.0%}"
            print(f"{kind:13} M={tokens:<3} {name:9} {told}")


def _number(time_or_problem: float | str | None) -> float:
    return time_or_problem if isinstance(time_or_problem, float) else math.nan


def hosts() -> dict[str, float]:
    """Processor time of an eager call, microseconds."""
    site = sites.Site(sites.site_format(1024, 4096, "4.4 mix"))
    x = torch.randn(1, 4096, dtype=torch.float16, device=sites.DEVICE)
    weight = torch.randn(1024, 4096, dtype=torch.float16, device=sites.DEVICE)
    calls: dict[str, Callable[[], torch.Tensor]] = {kernel: site.calls(kernel, x)[0] for kernel in KERNELS}
    calls["module"] = lambda: site.layer(x)
    calls["F.linear"] = lambda: torch.nn.functional.linear(x, weight)
    found = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(500):
            call()
        found[name] = (time.perf_counter() - begin) * 2000
        torch.cuda.synchronize()
        print(f"processor time of an eager call: {name} {found[name]:.1f} us")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time tiles and use the best")
    parser.add_argument("--limit", type=float, default=180, help="seconds for the timing of the sweep")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    gc.freeze()  # every capture collects garbage
    device, start = torch.cuda.get_device_name(), time.time()
    print("torch", torch.__version__, device, flush=True)
    sweep.check_all([*sweep.own_jobs(), *(sweep.sweep_jobs() if args.sweep else ())])
    best = sweep.sweep(args.limit) if args.sweep else {}
    if args.sweep:
        print(sweep.told(best))
    sweep.check_all(sweep.timed_jobs(args.kinds, best))
    print(f"[{time.time() - start:.0f} s]", flush=True)
    swept, kinds = " --sweep" if args.sweep else "", " ".join(map(repr, args.kinds))
    found = {
        "command": f"python benchmarks/kernel_times.py{swept} --kinds {kinds}",
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "best": [[*key, str(tile)] for key, tile in best.items()],
        "rows": [],
    }
    for row in layer(args.kinds, best):
        found["rows"].append(row)
        if args.out:  # a run that is cut short leaves what it has
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    summary(found["rows"])
    found["host"] = hosts()
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"[{time.time() - start:.0f} s] end")


if __name__ == "__main__":
    main()
