"""annotate-salience: what quantizing each row to each width would cost the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mixcomp.format import WIDTHS
from mixcomp.passes.gptq import Task, feedback, gptq
from mixcomp.passes.stacks import Stack, batches, stack
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context, Pass
from mixcomp.quant import Rounding, concatenate, fit_grid


@dataclass(frozen=True)
class AnnotateSalience(Pass):
    """Price every row at every width, by quantizing it once at each.

    A row of GPTQ depends on no other row, so six runs, one per width, hold every mix of widths exactly.  The cost of
    row c at width b is second order with both sides, ``1/2 gamma_c * (w - q_b) (S + damping) (w - q_b)^T``: nats per
    token.  Actual errors are priced, never curvature alone.

    Before: statistics.  After, per open site in the table::

        layers.0.q_proj/salience   fp32[576, 6]   loss of each row at 2, 3, 4, 5, 6, 8 bits
    """

    name: ClassVar[str] = "annotate-salience"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.SALIENCE})

    def run(self, program: Program, context: Context) -> Program:
        found: dict[str, torch.Tensor] = {}
        for batch in context.track("salience", batches(program, context.device, len(WIDTHS))):
            found.update(_price(program, [stack(program, *one, context.device) for one in batch], context.device))
        return program.with_tensors(found)


def _price(program: Program, stacks: list[Stack], device: torch.device) -> dict[str, torch.Tensor]:
    """The six runs are one run over six copies of the rows."""
    grids = [[_fit(rows, width) for width in WIDTHS] for rows in stacks]
    tasks = [
        Task(rows.weight.repeat(len(WIDTHS), 1), concatenate(own), feedback(rows.sigma, rows.sites[0].name))
        for rows, own in zip(stacks, grids, strict=True)
    ]
    out: dict[str, torch.Tensor] = {}
    for rows, (_, loss) in zip(stacks, gptq(tasks), strict=True):
        losses = loss.view(len(WIDTHS), -1).T.contiguous()  # [rows, widths]
        for site, part in rows.split(losses):
            gamma = program.gamma(site, device)
            out[f"{site.name}/salience"] = part * gamma[:, None] / 2
    return out


def _fit(rows: Stack, width: int) -> Rounding:
    """Grids of all stacked rows, fitted site by site so that an error names the right one."""
    energy = rows.sigma.diagonal()
    parts = [fit_grid(weight, energy, width, site.name) for site, weight in rows.split(rows.weight)]
    return concatenate(parts)
