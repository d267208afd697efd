"""Tiles worth trying: checked on data whose results are known exactly, then timed."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import kernel_sites as sites
import torch

from mixcomp.format import WIDTHS, Segment, SiteFormat
from mixcomp.kernels import tiles
from mixcomp.kernels.tiles import Tile

SWEPT = "4.4 mix"
#: row of ``tiles.TABLE`` -> the number of tokens that is timed for it
BUCKETS = {1: 1, 8: 4, 16: 16, 32: 32, 64: 64}
#: tokens up to which a row serves -> (blocks, along, down, tokens of the tile, stages)
SWEEP = {
    8: [
        (1, 2, 1, 8, 2), (1, 2, 1, 8, 3), (1, 4, 1, 8, 1), (1, 4, 1, 8, 2), (1, 8, 1, 8, 1), (1, 8, 1, 8, 2),
        (2, 2, 1, 8, 2), (2, 4, 1, 8, 1), (1, 2, 2, 8, 2), (1, 1, 2, 8, 3),
    ],
    16: [
        (1, 4, 1, 16, 1), (1, 4, 1, 16, 2), (2, 4, 1, 16, 1), (2, 4, 1, 16, 2), (1, 2, 1, 16, 2), (2, 2, 1, 16, 2),
        (2, 2, 2, 16, 1),
    ],
    32: [(1, 4, 1, 32, 1), (2, 4, 1, 32, 1), (2, 2, 1, 32, 1), (2, 2, 2, 32, 1), (2, 2, 2, 32, 2), (4, 2, 1, 32, 1)],
    64: [(1, 4, 1, 64, 1), (2, 2, 2, 64, 1), (2, 2, 1, 64, 1), (2, 1, 4, 64, 1), (2, 2, 2, 32, 1), (2, 4, 1, 32, 1)],
}  # fmt: skip
#: programs to aim for: with 1, columns are never split
PROGRAMS = (1, 264, 528, 1056)
Best = dict[tuple[int, str], Tile]


@dataclass(frozen=True)
class Job:
    """A kernel to compile and check: ``few`` cases for what only has to be in the cache before it is timed."""

    tile: Tile
    widths: tuple[int, ...] = WIDTHS
    dtype: torch.dtype = torch.float16
    few: bool = False


def row_of(table: Iterable[int], tokens: int) -> int:
    """The row of a table, by its most tokens, that serves a number of tokens; the last one serves any."""
    rows = sorted(table)
    return next((most for most in rows if tokens <= most), rows[-1])


def check_job(job: Job) -> str:
    """Compile into the shared cache and run exact cases, also with columns split: what went wrong, or ''."""
    most = job.tile.tokens
    shapes = [(200, 512, most), (130, 2176, max(1, most - 1)), (60, 4096, 1), (97, 8, min(2, most)), (700, 1024, most)]
    try:
        for seed, shape in enumerate(shapes[: 1 if job.few else None]):
            for programs in (1, 60, 1000):
                tile = replace(job.tile, programs=programs)
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
    tensors = {n: None if t is None else t.to(sites.DEVICE) for n, t in sites.operands(weight).items()}
    moved = [t.to(sites.DEVICE) for t in (x, bias)]
    run = sites.KERNELS["fused"]
    outs = [
        run(moved[0], **tensors, bias=moved[1], fmt=fmt, tile=job.tile) for _ in range(2)
    ]  # anew, and as found before
    return all(torch.equal(out.cpu(), exact(weight, x, bias)) for out in outs)


def own_jobs() -> list[Job]:
    """What the product chooses by itself, in every type."""
    halves = (torch.float16, torch.bfloat16)
    chosen = {replace(tile, programs=1) for table in tiles.TABLE.values() for tile in table.values()}
    jobs = [Job(tile, dtype=dtype) for tile in chosen for dtype in halves]
    return [*jobs, Job(tiles.FP32, dtype=torch.float32)]


def sweep_jobs() -> list[Job]:
    """Everything that ``sweep`` times."""
    return [Job(Tile(*n, programs=1)) for row in SWEEP.values() for n in row]


def timed_jobs(kinds: Sequence[str], best: Mapping[tuple[int, str], Tile]) -> list[Job]:
    """What is timed on the layer: ``best``, or where that is empty the chosen tiles, for the widths of every kind."""
    won = set(best.values()) or {job.tile for job in own_jobs() if job.dtype == torch.float16}
    several = any(len(sites.KINDS[kind]) > 1 for kind in kinds)
    widths = {(*sites.KINDS[kind],) for kind in kinds if len(sites.KINDS[kind]) == 1} | ({WIDTHS} if several else set())
    return [Job(tile, each, few=True) for tile in won for each in widths]


def check_all(jobs: Iterable[Job]) -> None:
    """Check in parallel, once for all numbers of programs; print what fails."""
    jobs = list(dict.fromkeys(replace(job, tile=replace(job.tile, programs=1)) for job in jobs))
    start = time.time()
    workers = max(1, min((os.cpu_count() or 2) - 2, len(jobs)))
    # each on one thread: on all of them, checks of 22 workers took five minutes instead of half of one
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,), maxtasksperchild=8) as pool:
        found = pool.map(check_job, jobs, chunksize=1)
    bad = [(job, what) for job, what in zip(jobs, found, strict=True) if what]
    print(f"{len(jobs)} kernels compiled and exact but for {len(bad)}, {time.time() - start:.0f} s", flush=True)
    for job, what in bad:
        print("  ", job, what)


def candidates(fmt: SiteFormat, tokens: int) -> list[Tile]:
    """Tiles to time; of those of one split, one."""
    found = {}
    for numbers in SWEEP[row_of(SWEEP, tokens)]:
        for programs in PROGRAMS:
            tile = Tile(*numbers, programs=programs)
            count = len(tiles.tile_table(fmt, tile.rows)) * -(-tokens // tile.tokens)
            found.setdefault((numbers, tiles.splits(tile, count, fmt)), tile)
    return list(found.values())


def sweep(limit: float) -> Best:
    """(row of the table, shape) -> the fastest tile; ``limit`` seconds are shared by the shapes."""
    best: Best = {}
    for shape, (rows, columns) in sites.SHAPES.items():
        site, end = sites.Site(sites.site_format(rows, columns, SWEPT)), time.time() + limit / len(sites.SHAPES)
        for most, tokens in BUCKETS.items():
            x = torch.randn(tokens, columns, dtype=torch.float16, device=sites.DEVICE)
            timed: list[tuple[float, Tile]] = []
            for tile in candidates(site.fmt, tokens):
                took = site.time("fused", x, tile, 0.006) if time.time() < end else "out of time"
                if isinstance(took, str):
                    print("    ", tile, took)
                else:
                    timed.append((took, tile))
            timed.sort(key=lambda result: result[0])
            print(f"{shape:8} M={tokens:<3}", *(f"{t:.1f} {tile}" for t, tile in timed[:4]), sep="\n    ")
            if timed:
                best[most, shape] = timed[0][1]
        del site
    return best


def told(best: Best) -> str:
    """``best`` as the source of ``tiles.TABLE``, with the tiles of today where nothing was timed."""
    lines = ["TABLE: dict[str, dict[int, Tile]] = {"]
    for shape, (rows, columns) in sites.SHAPES.items():
        name = tiles.shape_class(rows, columns)
        row = {most: best.get((most, shape), tile) for most, tile in tiles.TABLE[name].items()}
        lines += [f'    "{name}": {{', *(f"        {most}: {tile}," for most, tile in row.items()), "    },"]
    return "\n".join([*lines, "}"])
