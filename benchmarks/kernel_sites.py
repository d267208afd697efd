"""Random sites on a device, timed calls of the product's kernels on them, and the libraries they are compared with.

A timing is the median of CUDA-graph replays; a replay walks over enough copies of the weight to leave the L2 cache three
times.  Every kernel is compared with an fp32 product first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from mixcomp.format import Segment, SiteFormat
from mixcomp.kernels import launch
from mixcomp.lowering import gpu
from mixcomp.lowering.module import MixedLinear
from mixcomp.packed import PackedWeight

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (1, 4, 16, 32, 64, 128, 256, 1024, 4096)
#: kind -> width -> share of the rows
KINDS = {
    "4.16 uniform": {4: 1.0},
    "2.16 uniform": {2: 1.0},
    "4.4 mix": {6: 0.09, 5: 0.28, 4: 0.45, 3: 0.18},
    "2.6 mix": {4: 0.08, 3: 0.30, 2: 0.62},
}
DEVICE = "cuda"
TRAFFIC = 160e6
#: relative, of a whole output; fp16 outputs are rounded at 5e-4, 8-bit activations and rows at 1e-2
TOLERANCE = {"fused": 1e-3, "expanded": 1e-3, "int8": 2e-2}
#: name -> the call (x, tensors by name, bias=, fmt=, tile=): one kernel, the weight expanded for cuBLAS, 8-bit integers
KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "fused": launch.mixed_linear,
    "expanded": lambda *args, tile=None, **named: launch.expanded_linear(*args, **named),
    "int8": lambda *args, tile=None, **named: launch.int8_linear(*args, **named),
}
#: name -> tokens for which it is timed: the decode kernel is not made for prompts, nor the others for single tokens
FOR = {"fused": range(257), "expanded": range(32, 1 << 20), "int8": range(64, 1 << 20)}
Calls = list[Callable[[], torch.Tensor]]
Tensors = dict[str, torch.Tensor | None]


def site_format(rows: int, columns: int, kind: str) -> SiteFormat:
    """Rows of every width, each but the last a multiple of 8; scattered if there are several."""
    shares = KINDS[kind]
    parts = [Segment(int(rows * share) // 8 * 8, width) for width, share in [*shares.items()][:-1]]
    parts.append(Segment(rows - sum(part.rows for part in parts), min(shares)))
    return SiteFormat(rows, columns, tuple(parts), scatter=len(parts) > 1)


class Site:
    """A random weight, its dense form fp32[rows, columns], and copies of what kernels read."""

    def __init__(self, fmt: SiteFormat) -> None:
        draw = torch.Generator(DEVICE).manual_seed(0)
        tensors = {}
        for name, (dtype, shape) in fmt.tensors().items():
            if name == "row_index":
                tensors[name] = torch.randperm(fmt.rows, generator=draw, device=DEVICE).to(dtype)
            elif name == "factors":
                tensors[name] = (torch.rand(shape, generator=draw, device=DEVICE) * 1e-3 + 1e-4).to(dtype)
            else:  # random bytes are random codes and group scales
                tensors[name] = torch.randint(0, 256, shape, generator=draw, dtype=dtype, device=DEVICE)
        weight = PackedWeight.from_tensors(fmt, tensors)
        self.fmt = fmt
        self.dense = weight.dequantize()
        self.layer = MixedLinear(weight)
        self.copies = copies(operands(weight))

    def calls(self, kernel: str, x: torch.Tensor, tile: Any = None) -> Calls:
        """A call for every copy."""
        run = partial(KERNELS[kernel], x, bias=None, fmt=self.fmt, tile=tile)
        return [partial(run, **held) for held in self.copies]

    def time(self, kernel: str, x: torch.Tensor, tile: Any = None, seconds: float = 0.03) -> float | str:
        """Microseconds a call, or what went wrong."""
        wanted = x.float() @ self.dense.T
        try:
            calls = self.calls(kernel, x, tile)
            for call in (calls[0], calls[0]):
                error = ((call().float() - wanted).norm() / wanted.norm()).item()
                if not error <= TOLERANCE[kernel]:
                    return f"WRONG {error:.1e}"
            return median_time(calls, seconds)
        except Exception as problem:  # a tile that does not fit is a result, and the rest is worth its time
            return f"{type(problem).__name__}: {str(problem)[:100]}"


def operands(weight: PackedWeight) -> Tensors:
    """The tensors that kernels read, by name."""
    words, nibbles = gpu.to_fragments(weight.codes, weight.scales, weight.fmt)
    others = ("factors", "row_index", "branch_a", "branch_b", "branch_scale")
    return {"words": words, "nibbles": nibbles, **{name: getattr(weight, name) for name in others}}


def copies(tensors: Tensors) -> list[Tensors]:
    """At least two copies, of TRAFFIC bytes together."""
    size = sum(t.nbytes for t in tensors.values() if t is not None)
    count = max(2, math.ceil(TRAFFIC / size)) if torch.cuda.is_available() else 2
    return [{name: None if t is None else t.clone() for name, t in tensors.items()} for _ in range(count)]


def median_time(calls: Calls, seconds: float = 0.03) -> float:
    """Microseconds a call: all calls in one graph, the median of its replays."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = _replay(graph, 1)[0]
    spans = _replay(graph, int(min(40, max(7, seconds * 1e3 / max(1e-3, once)))))
    return statistics.median(spans) * 1e3 / len(calls)


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    """Milliseconds of each of ``times`` replays that follow one another without a gap, after one that does not count."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(then) for first, then in pairwise(events)]


def library_times(rows: int, columns: int, tokens: int) -> dict[str, float]:
    """cuBLAS in fp16 and bf16, in int8 and fp8 without what rounds the activations, tinygemm's 4 bits in groups of 128."""
    times = {}
    count = math.ceil(TRAFFIC / (2 * rows * columns)) + 1
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        x = torch.randn(tokens, columns, dtype=dtype, device=DEVICE)
        weights = [torch.randn(rows, columns, dtype=dtype, device=DEVICE) for _ in range(count)]
        times[name] = median_time([partial(torch.nn.functional.linear, x, w) for w in weights])
    if tokens > 16:  # their least
        count = math.ceil(TRAFFIC / (rows * columns)) + 1
        codes, *eights = (
            torch.randint(-127, 128, (n, columns), device=DEVICE).char() for n in (tokens, *[rows] * count)
        )
        times["_int_mm"] = median_time([partial(torch._int_mm, codes, w.t()) for w in eights])
        one, fp8 = torch.ones((), device=DEVICE), torch.float8_e4m3fn
        mm = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.float16)
        times["fp8"] = median_time([partial(mm, codes.to(fp8), w.to(fp8).t()) for w in eights])
    if tokens > 256:
        return times
    try:
        count = math.ceil(TRAFFIC / (rows * columns / 2)) + 1
        packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
        packed = torch._convert_weight_to_int4pack(packed, 8)
        scales = torch.rand(columns // 128, rows, 2, dtype=torch.bfloat16, device="cuda")
        pairs = [(packed.clone(), scales.clone()) for _ in range(count)]
        mm = torch.ops.aten._weight_int4pack_mm
        times["tinygemm"] = median_time([partial(mm, x, p, 128, s) for p, s in pairs])
    except (AttributeError, RuntimeError) as problem:
        print("tinygemm:", str(problem)[:100])
    return times
