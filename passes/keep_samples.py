"""keep-samples: a few input rows of every activation, for scores that second moments cannot give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mixcomp.errors import CalibrationError
from mixcomp.passes.watch import Watch
from mixcomp.program import Program
from mixcomp.protocol import Context, Pass


@dataclass(frozen=True)
class KeepSamples(Pass):
    """Input rows at evenly spaced tokens of evenly spaced sequences: bounded, and the same every time.

    Before: a captured program.  After, per activation that open sites read::

        rms/samples   fp32[256, 576]   rows of x

    Options:
        sequences: calibration sequences that are run, at most.
        tokens: rows kept of each.
    """

    name: ClassVar[str] = "keep-samples"

    sequences: int = 16
    tokens: int = 16

    def run(self, program: Program, context: Context) -> Program:
        text = [row for batch in context.batches for row in batch.split(1)]
        if not text:
            raise CalibrationError("keep-samples has no calibration tokens; give at least one batch")
        speakers = {s.name: s.input for s in reversed(program.open_sites())}
        first = {name: site for site, name in speakers.items()}  # the first site that reads an input speaks for all
        kept: dict[str, list[torch.Tensor]] = {name: [] for name in first}

        def tap(site: str, x: torch.Tensor, _y: torch.Tensor) -> None:
            name = speakers.get(site, "")
            if first.get(name) == site:
                x = x.reshape(-1, x.shape[-1])
                kept[name].append(x[_spread(len(x), self.tokens).to(x.device)].float())

        watch = Watch(program.graph_module, tap, context.device)
        chosen = _spread(len(text), self.sequences).tolist()
        for i in context.track("samples", chosen):
            with torch.no_grad():
                watch.run(text[i].to(context.device))
        return program.with_tensors({f"{name}/samples": torch.cat(rows) for name, rows in kept.items()})


def _spread(length: int, count: int) -> torch.Tensor:
    """At most ``count`` different places in 0..length - 1, evenly spaced, both ends among them."""
    count = min(length, count)
    return torch.arange(count) * (length - 1) // max(count - 1, 1)
