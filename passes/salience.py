"""annotate-salience: what quantizing each row to each width would cost the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mixcomp.format import WIDTHS
from mixcomp.passes.gptq import feedback, gptq
from mixcomp.passes.side_branch import MAX_DIRECTIONS, error_spectrum
from mixcomp.passes.stacks import Stack, inputs, stack
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context, Pass
from mixcomp.quant import Grid, dequantize, fit_grid

#: width whose error decides how much a side branch could take away; errors of all widths have nearly the same shape
SPECTRUM_WIDTH = 3


@dataclass(frozen=True)
class AnnotateSalience(Pass):
    """Price every row at every width, by quantizing it once at each.

    A row of GPTQ depends on no other row, so six runs, one per width, hold every mix of widths exactly.  The cost of
    row c at width b is second order with both sides, ``1/2 gamma_c * (w - q_b) (S + damping) (w - q_b)^T``: nats per
    token.  Actual errors are priced, never curvature alone.

    Before: statistics.  After, per open site in the table::

        layers.0.q_proj/salience   fp32[576, 6]   loss of each row at 2, 3, 4, 5, 6, 8 bits
        layers.0.q_proj/spectrum   fp32[8]        share of the site's loss that each rank of a side branch would remove
    """

    name: ClassVar[str] = "annotate-salience"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.SALIENCE})

    def run(self, program: Program, context: Context) -> Program:
        found: dict[str, torch.Tensor] = {}
        by_input = inputs(program)
        for done, (name, sites) in enumerate(by_input.items()):
            context.progress("salience", done, len(by_input))
            found.update(_price(program, stack(program, name, sites, context.device), context))
        return program.with_tensors(found)


def _price(program: Program, rows: Stack, context: Context) -> dict[str, torch.Tensor]:
    known = feedback(rows.sigma, rows.sites[0].name)
    losses, out = [], {}
    for width in WIDTHS:
        grid = _fit(rows, width)
        codes, loss = gptq(rows.weight, grid, known)
        losses.append(loss)
        if width == SPECTRUM_WIDTH:
            error = rows.weight - dequantize(codes, grid)
            for site, part in rows.split(error):
                gamma = program.tensor(site.name, "gamma").to(context.device)
                draw = context.generator("annotate-salience", site.name)
                directions = error_spectrum(part, rows.sigma, gamma, MAX_DIRECTIONS, draw)
                out[f"{site.name}/spectrum"] = directions.shares
    for site, loss in rows.split(torch.stack(losses, -1)):
        gamma = program.tensor(site.name, "gamma").to(context.device)
        out[f"{site.name}/salience"] = (loss * gamma[:, None]).div_(2)
    return out


def _fit(rows: Stack, width: int) -> Grid:
    """Grids of all stacked rows, fitted site by site so that an error names the right one."""
    energy = rows.sigma.diagonal()
    parts = [fit_grid(w, energy, width, site.name) for site, w in rows.split(rows.weight)]
    return Grid(*(torch.cat([getattr(p, f) for p in parts]) for f in ("factors", "scales", "widths")))
