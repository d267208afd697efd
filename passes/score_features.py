"""score-features: what rounding each output feature would do to the loss, by one backward pass per sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from mixcomp.errors import CalibrationError
from mixcomp.passes.backward import Backward
from mixcomp.passes.mixllm import check_widths, feature_dots, taylor_salience
from mixcomp.passes.rounding import round_range
from mixcomp.program import Program
from mixcomp.protocol import Context, Pass


@dataclass(frozen=True)
class ScoreFeatures(Pass):
    """MixLLM's global salience, ``S_c = 1/|D| sum_d |g_d.delta_c + 1/2 (g_d.delta_c)^2|``.

    ``delta_c`` is the error of plain rounding at the narrow width, ``g_d`` the gradient of sequence d's next-token loss
    (mean over its tokens, labels are the inputs) with respect to row c.  ``g_d.delta_c = sum_t (dL/dy)[t, c]
    (x_t.delta_c)`` needs gradients of activations only.  Sequences go one by one: the absolute value stands between
    the sum over tokens and the mean over sequences.

    Before: a captured program.  After, per open site in the table::

        layers.0.q_proj/mixllm   fp32[576, 1]   S_c at every width but the widest, widest first

    Options:
        widths: falling; the first counts as lossless.
        group: columns that share a range in the plain rounding; by default the stored format's.
        tokens: that take part; the first sequences of the calibration text.
    """

    name: ClassVar[str] = "score-features"

    widths: tuple[int, ...] = (8, 4)
    group: int = 32
    tokens: int = 65536

    def run(self, program: Program, context: Context) -> Program:
        check_widths(self.widths)
        sequences = self._sequences(context)
        sites = {s.name: s for s in program.open_sites()}
        steps = len(self.widths) - 1
        total = {n: torch.zeros(s.rows, steps, device=context.device) for n, s in sites.items()}
        dots = {name: torch.zeros_like(sums) for name, sums in total.items()}

        def add(name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
            self._add_dots(dots[name], program.weight(sites[name]), x, gradient)

        backward = Backward.of(program, context.device)
        for ids in context.track("feature salience", sequences):
            backward.run(ids.to(context.device), partial(_residual, ids=ids.to(context.device)), add)
            for name, own in dots.items():
                # 16-bit gradients of a summed loss stay in range; the mean is taken here
                total[name] += taylor_salience(own / (ids.shape[1] - 1))
                own.zero_()
        return program.with_tensors({f"{n}/mixllm": _finite(n, sums / len(sequences)) for n, sums in total.items()})

    def _sequences(self, context: Context) -> list[torch.Tensor]:
        rows = [row for batch in context.batches for row in batch.split(1) if row.shape[1] > 1]
        if not rows:
            raise CalibrationError("score-features has no sequence of two tokens or more; give calibration text")
        return rows[: max(1, self.tokens // rows[0].shape[1])]

    def _add_dots(self, total: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """fp32[rows, steps].  The error is made anew each time: a kept copy would be a second model in fp32."""
        weight = weight.detach().to(x.device, torch.float32)
        x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        for i, width in enumerate(self.widths[1:]):
            total[:, i] += feature_dots(gradient, x, round_range(weight, width, self.group) - weight)


def _residual(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed negative log-likelihood of one sequence's next tokens at its logits [1, length, tokens]."""
    out = logits.float().softmax(-1)
    out[:, :-1].scatter_add_(-1, ids[:, 1:, None], -torch.ones_like(out[:, :-1, :1]))
    out[:, -1] = 0  # nothing follows
    return out.to(logits.dtype)


def _finite(name: str, scores: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(scores).all():
        raise CalibrationError(f"NaN or infinity in the gradient at {name!r}; use other calibration text or fp32")
    return scores
