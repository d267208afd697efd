"""Tiles worth trying: checked on data whose results are known exactly, then timed."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fragment_kernel import sites, tiles
from fragment_kernel.tiles import Tile
from mixcomp.format import WIDTHS, Segment, SiteFormat
from mixcomp.kernels import tiles as stored

SWEPT = "4.4 mix"
#: tokens up to which a row serves -> (blocks, along, down, tokens of the tile, stages)
SWEEP = {
    8: [
        (1, 4, 1, 8, 3), (1, 4, 1, 8, 4), (2, 4, 1, 8, 2), (2, 4, 1, 8, 3), (2, 4, 1, 8, 4), (2, 4, 1, 8, 1),
        (1, 8, 1, 8, 2), (1, 8, 1, 8, 3), (1, 8, 1, 8, 1), (2, 8, 1, 8, 2), (2, 8, 1, 8, 3), (2, 2, 1, 8, 4),
        (4, 4, 1, 8, 2), (1, 2, 1, 8, 4), (1, 16, 1, 8, 2), (2, 2, 2, 8, 3), (1, 4, 2, 8, 3), (1, 1, 1, 8, 5),
    ],
    16: [
        (2, 4, 1, 16, 2), (2, 4, 1, 16, 3), (4, 4, 1, 16, 2), (4, 4, 1, 16, 3), (2, 4, 2, 16, 2), (2, 2, 2, 16, 3),
        (2, 1, 4, 16, 3), (1, 4, 2, 16, 3), (2, 8, 1, 16, 2), (1, 2, 4, 16, 2),
    ],
    1 << 30: [
        (2, 1, 4, 64, 3), (2, 1, 4, 64, 2), (1, 1, 8, 64, 2), (1, 2, 4, 64, 2), (1, 1, 4, 64, 3), (2, 1, 4, 32, 3),
        (4, 1, 4, 32, 2), (2, 2, 2, 32, 3),
    ],
}  # fmt: skip
#: programs to aim for: with 1, columns are never split
PROGRAMS = (1, 264, 396, 528, 792, 1056)
#: the same for the product's kernel: (rows, tokens, columns, warps, stages)
STORED = {
    1: [(8, 1, 1024, 4, 2), (8, 1, 1024, 4, 3), (8, 1, 1024, 4, 4), (8, 1, 2048, 4, 3)],
    16: [(64, 16, 128, 4, 3), (64, 16, 256, 4, 3), (64, 16, 128, 4, 4), (32, 16, 256, 2, 3)],
    64: [(64, 64, 128, 4, 3), (64, 64, 128, 4, 4)],
    1 << 30: [(128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 128, 4, 3)],
}
Result = tuple[float, Any]


@dataclass(frozen=True)
class Job:
    """A kernel to compile and check: ``few`` cases for what only has to be in the cache before it is timed."""

    kernel: str
    tile: Any
    widths: tuple[int, ...] = WIDTHS
    dtype: torch.dtype = torch.float16
    few: bool = False


def serving(table: dict[int, list[Any]], tokens: int) -> list[Any]:
    """The row of a table that serves a number of tokens."""
    return next(row for most, row in table.items() if tokens <= most)


def check_job(job: Job) -> str:
    """Compile into the shared cache and run exact cases, also with columns split: what went wrong, or ''."""
    most = job.tile.tokens
    shapes = [(200, 512, most), (130, 2176, max(1, most - 1)), (60, 4096, 1), (97, 8, min(2, most)), (700, 1024, most)]
    try:
        for seed, shape in enumerate(shapes[: 1 if job.few else None]):
            for programs in (1, 60, 1000) if job.kernel != "product" else (None,):
                tile = job.tile if programs is None else replace(job.tile, programs=programs)
                if not is_exact(replace(job, tile=tile), *shape, seed):
                    return f"WRONG on {shape}, {tile}"
    except Exception as problem:  # one tile that does not compile must not end the run
        return f"{type(problem).__name__}: {str(problem)[:150]}"
    return ""


def is_exact(job: Job, rows: int, columns: int, tokens: int, seed: int) -> bool:
    """Whether a kernel's output on dyadic data is that of fp64, bit for bit."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from kernel_cases import Case, dyadic, exact

    each = [rows // len(job.widths)] * len(job.widths)
    each[-1] += rows - sum(each)
    parts = tuple(Segment(n, w) for n, w in zip(each, job.widths, strict=True))
    fmt = SiteFormat(rows, columns, parts, scatter=True)
    weight, x, bias = dyadic(Case(fmt, tokens, job.dtype, job.dtype, seed))
    tensors = {n: None if t is None else t.to(sites.DEVICE) for n, t in sites.operands(job.kernel, weight).items()}
    out = torch.full((tokens, rows), torch.nan, dtype=job.dtype, device=sites.DEVICE)
    moved = [t.to(sites.DEVICE) for t in (x, bias)]
    sites.KERNELS[job.kernel](moved[0], **tensors, bias=moved[1], fmt=fmt, out=out, tile=job.tile)
    return torch.equal(out.cpu(), exact(weight, x, bias))


def own_jobs() -> list[Job]:
    """What the two kernels choose by themselves, in every type."""
    few = [Job("product", tile, few=True) for tile in (*stored.SMALL.values(), stored.LARGE)]
    halves = (torch.float16, torch.bfloat16)
    chosen = [Job("fragments", t, dtype=d) for t in (*tiles.SMALL.values(), tiles.LARGE) for d in halves]
    return [*few, *chosen, Job("fragments", tiles.FP32, dtype=torch.float32)]


def sweep_jobs() -> list[Job]:
    """Everything that ``sweep`` times."""
    ours = [Job("fragments", Tile(*n, programs=1)) for row in SWEEP.values() for n in row]
    return ours + [Job("product", stored.Tile(*n), few=True) for row in STORED.values() for n in row]


def timed_jobs(kinds: Sequence[str], best: Mapping[tuple[str, int, str], Any]) -> list[Job]:
    """What is timed on the layer: ``best``, or where that is empty the chosen tiles, for the widths of every kind."""
    won = {(kernel, tile) for (kernel, _, _), tile in best.items()}
    won = won or {(job.kernel, job.tile) for job in own_jobs() if job.dtype == torch.float16}
    several = any(len(sites.KINDS[kind]) > 1 for kind in kinds)
    alone = {(*sites.KINDS[kind],) for kind in kinds if len(sites.KINDS[kind]) == 1}
    jobs = []
    for kernel, tile in won:
        for name in ("product",) if kernel == "product" else ("fragments", "overlap"):
            jobs += [Job(name, tile, widths, few=True) for widths in alone | ({WIDTHS} if several else set())]
    return jobs


def check_all(jobs: Iterable[Job]) -> None:
    """Check in parallel, once for all numbers of programs; print what fails."""
    jobs = [job if job.kernel == "product" else replace(job, tile=replace(job.tile, programs=1)) for job in jobs]
    jobs = list(dict.fromkeys(jobs))
    start = time.time()
    workers = max(1, min(14, (os.cpu_count() or 2) - 2, len(jobs)))
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=8) as pool:
        found = pool.map(check_job, jobs, chunksize=1)
    bad = [(job, what) for job, what in zip(jobs, found, strict=True) if what]
    print(f"{len(jobs)} kernels compiled and exact but for {len(bad)}, {time.time() - start:.0f} s", flush=True)
    for job, what in bad:
        print("  ", job, what)


def candidates(kernel: str, fmt: SiteFormat, tokens: int) -> list[Any]:
    """Tiles to time; of those of one split, one."""
    if kernel == "product":
        return [stored.Tile(*numbers) for numbers in serving(STORED, tokens)]
    found = {}
    for numbers in serving(SWEEP, tokens):
        for programs in PROGRAMS:
            tile = Tile(*numbers, programs=programs)
            count = len(tiles.tile_table(fmt, tile.rows)) * -(-tokens // tile.tokens)
            found.setdefault((numbers, tiles.splits(tile, count, fmt)), tile)
    return list(found.values())


def sweep(limit: float) -> dict[tuple[str, int, str], Any]:
    """(kernel, tokens, shape) -> the fastest tile; ``limit`` seconds are shared by the shapes."""
    best: dict[tuple[str, int, str], Any] = {}
    sums: dict[tuple[int, Tile], dict[str, float]] = {}
    for shape, (rows, columns) in sites.SHAPES.items():
        site, end = sites.Site(sites.site_format(rows, columns, SWEPT)), time.time() + limit / len(sites.SHAPES)
        for tokens in sites.TOKENS:
            x = torch.randn(tokens, columns, dtype=torch.float16, device=sites.DEVICE)
            for kernel in ("product", "fragments"):
                timed: list[Result] = []
                for tile in candidates(kernel, site.fmt, tokens):
                    took = site.time(kernel, x, tile, 0.006) if time.time() < end else "out of time"
                    if isinstance(took, str):
                        print("    ", tile, took)
                        continue
                    timed.append((took, tile))
                    if kernel == "fragments":
                        held = sums.setdefault((tokens, replace(tile, programs=1)), {})
                        held[shape] = min(took, held.get(shape, math.inf))
                timed.sort(key=lambda result: result[0])
                print(f"{shape:8} M={tokens:<3} {kernel}", *(f"{t:.1f} {tile}" for t, tile in timed[:4]), sep="\n    ")
                if timed:
                    best[kernel, tokens, shape] = timed[0][1]
        del site
    for tokens in sites.TOKENS:
        print(f"M={tokens}: a layer with one tile for all shapes, the best split each, us")
        whole = [
            (sum(t.values()), tile) for (m, tile), t in sums.items() if m == tokens and len(t) == len(sites.SHAPES)
        ]
        for total, tile in sorted(whole, key=lambda result: result[0])[:6]:
            print(f"   {total:7.1f}  {tile}")
    return best
