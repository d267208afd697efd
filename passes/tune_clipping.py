"""tune-clipping: where float-group ranges are clipped, by gradients of the error of each decoder layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mixcomp.format import Scales
from mixcomp.passes.clipping import Clipped
from mixcomp.passes.layerwise import LayerByLayer
from mixcomp.passes.tunable import Quantized
from mixcomp.program import Program, Site


@dataclass(frozen=True)
class TuneClipping(LayerByLayer):
    """SliM-LLM+: learn both ends of every range of float-group scales, one layer after another.

    (Huang et al., ICML 2025, section 3.4: OmniQuant's learnable clipping on SliM-LLM's widths.)  Kept only if
    KL(original || quantized) on windows that took no part is smaller with it.

    The paper rounds anew for every range, from plain rounding on.  That lost to GPTQ's codes in short runs: the first two
    layers of SmolLM2-135M, 40 steps of 1024 tokens a layer, KL on other windows, N = 3: 0.0917 before, 0.0848 with codes
    kept, 0.1249 rounded anew from GPTQ's codes, 0.2330 from plain rounding; N = 2: 0.525 before, 0.449 with codes kept.
    The paper takes 50 epochs over 128 samples; that many were not tried.

    Before: stored tensors.  After, the same layouts with other numbers::

        layers.0.q_proj/{codes, factors, zeros}   learned

    Options:
        steps: see ``LayerByLayer``.
        rate: first step in the argument of a sigmoid that is half at the start; a quarter of it moves an end by as much
            of itself.
        anew: round weights again for every range, as the paper does, instead of keeping codes and zeros.
    """

    name: ClassVar[str] = "tune-clipping"

    rate: float = 1e-2
    anew: bool = False

    def learns(self, site: Site) -> bool:
        return site.layout.scales is Scales.FLOAT_GROUP

    def tunable(self, program: Program, site: Site, device: torch.device) -> Quantized:
        return Clipped.of(program, site, device, anew=self.anew)

    def rates(self) -> dict[str, float]:
        return {"upper": self.rate, "lower": self.rate}
