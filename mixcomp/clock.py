"""Seconds and peak memory of every stage of a run."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mixcomp.protocol import Progress, silent


class Clock:
    """``stages`` lists what has run: {"stage", "seconds", "host_bytes", "gpu_bytes"}."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress or silent
        self.stages: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block and report its start and, if it succeeds, its end."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self.progress(name, 0, 1)
        try:
            yield
            self.progress(name, 1, 1)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = round(time.perf_counter() - start, 3)
            self.stages.append({"stage": name, "seconds": seconds, **peak_memory()})

    def report(self, device: torch.device, calibration: dict[str, Any]) -> dict[str, Any]:
        """The run as plain data."""
        return {
            "stages": self.stages,
            "seconds": round(sum(s["seconds"] for s in self.stages), 3),
            "calibration": calibration,
            "device": str(device),
        }


def peak_memory() -> dict[str, int]:
    """Highest memory so far in bytes: of the process on the host, and of the allocator on the GPU (per stage)."""
    out = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        out["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return out
