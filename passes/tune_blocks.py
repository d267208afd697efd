"""tune-blocks: rounding and scales of one decoder layer at a time, by gradients of the error of its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mixcomp.passes.layerwise import LayerByLayer
from mixcomp.passes.tunable import Quantized, Tunable
from mixcomp.program import Program, Site


@dataclass(frozen=True)
class TuneBlocks(LayerByLayer):
    """Learn rounding, group scales and row factors of one layer after another.

    BRECQ's and AdaRound's problem, Adam instead of a regularizer.

    Before: stored tensors.  After, the same layouts with other numbers::

        layers.0.q_proj/{codes, scales, factors}   learned

    Options:
        steps: see ``LayerByLayer``.
        place_rate, ratio_rate, group_rate: first step in cells of the grid, of the row factor's logarithm, and in units
            of the group scale.
    """

    name: ClassVar[str] = "tune-blocks"

    place_rate: float = 3e-3
    ratio_rate: float = 1e-3
    group_rate: float = 2e-2

    def learns(self, site: Site) -> bool:
        return site.layout.departure is None

    def tunable(self, program: Program, site: Site, device: torch.device) -> Quantized:
        return Tunable.of(program, site, device, rounding=True)

    def rates(self) -> dict[str, float]:
        return {"place": self.place_rate, "ratio": self.ratio_rate, "group": self.group_rate}
