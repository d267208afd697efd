"""quantize-weights: codes and scales for the assigned widths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from mixcomp.errors import ConfigError
from mixcomp.float_grid import FloatGrid, fit_float
from mixcomp.format import GROUP, Scales, SiteFormat
from mixcomp.packed import pack_codes, pack_scales, pack_zeros
from mixcomp.passes import slim
from mixcomp.passes.gptq import Feedback, Task, feedback, gptq
from mixcomp.passes.refine import refine
from mixcomp.passes.stacks import batches, stack
from mixcomp.profiles import layout
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context, Pass, Semantics
from mixcomp.quant import Grid, concatenate, fit_mixed


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Fit scales, round with GPTQ, improve both by coordinate descent, pack.

    Columns stand in the order an absorbed permutation gave them, so groups form in that order; rows are independent, so
    they are quantized in their original order and permuted when they are packed.

    Before: widths and orders, and per site, where they are not the default, ``group`` and ``scale_kind`` (see
    ``Program.stored_form``).  Widths are uint8[rows], or uint8[rows, groups] where rows mix them.  After, per open site::

        layers.0.q_proj   format 4x560 5x16 scatter
        layers.0.q_proj/{codes, scales, factors, row_index}   the stored tensors

    Options:
        calibration: how float-group ranges are found.  ``energy``: clipping ratios down to a width's own smallest, errors
            weighted by E[x_j^2].  The others are SliM-LLM's SQC (section 3.3), 101 ratios in 0.9..1.1 of the range: as
            ``printed``, where salient weights and the rest are added, so that all count alike; and weighted, every error
            by the ``salience`` w^2 / U_jj^2 of its weight.  Geometric mean over 21 linears of SmolLM2-135M (layers 1, 6
            and 11) of the relative output error after GPTQ on other text, blocks of 128, N = 2 and 3: energy 0.0425 and
            0.0094, salience 0.0490 and 0.0109, printed 0.0571 and 0.0122.
    """

    name: ClassVar[str] = "quantize-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS, Fact.ASSIGNED, Fact.REORDERED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})
    semantics: ClassVar[Semantics] = Semantics.LOSSY

    calibration: Literal["energy", "printed", "salience"] = "energy"

    def run(self, program: Program, context: Context) -> Program:
        tensors: dict[str, torch.Tensor] = {}
        sites: dict[str, Site] = {}
        for batch in context.track("quantize", batches(program, context.device, 1)):
            stacks = [stack(program, *one, context.device) for one in batch]
            known = [feedback(rows.sigma, rows.sites[0].name) for rows in stacks]
            grids = [
                [self._fit(program, site, w, rows.sigma, k) for site, w in rows.split(rows.weight)]
                for rows, k in zip(stacks, known, strict=True)
            ]
            tasks = [Task(rows.weight, concatenate(own), k) for rows, own, k in zip(stacks, grids, known, strict=True)]
            better = refine(tasks, [codes for codes, _ in gptq(tasks)], [_scales(own) for own in grids])
            for rows, own, (codes, scales) in zip(stacks, grids, better, strict=True):
                for (site, part), grid in zip(rows.split(codes), _rescaled(own, scales), strict=True):
                    sites[site.name], stored = _pack(program, site, part, grid)
                    tensors.update({f"{site.name}/{key}": value for key, value in stored.items()})
        return program.with_sites(sites).with_tensors(tensors)

    def _fit(
        self, program: Program, site: Site, weight: torch.Tensor, sigma: torch.Tensor, known: Feedback
    ) -> Grid | FloatGrid:
        widths = program.tensor(site.name, "widths").to(weight.device)
        group, scales = program.stored_form(site)
        if self.calibration == "energy":
            fit = fit_mixed if scales is Scales.TWO_LEVEL else fit_float
            return fit(weight, sigma.diagonal(), widths, site.name, group)
        if scales is Scales.TWO_LEVEL:
            raise ConfigError(
                f"calibration {self.calibration!r} of quantize-weights fits float-group scales, and {site.name} has "
                f"{scales.text} ones; use calibration='energy'"
            )
        salient = self.calibration == "salience"
        counts = slim.element_salience(weight, known).float() if salient else torch.ones_like(weight)
        return fit_float(weight, counts, widths, site.name, group, slim.TAUS)


def _scales(grids: list[Grid | FloatGrid]) -> torch.Tensor | None:
    """Group scales of stacked rows that ``refine`` may change."""
    found = [grid.scales for grid in grids if isinstance(grid, Grid) and grid.group == GROUP]
    return torch.cat(found) if len(found) == len(grids) else None


def _rescaled(grids: list[Grid | FloatGrid], scales: torch.Tensor | None) -> list[Grid | FloatGrid]:
    if scales is None:
        return grids
    parts = scales.split([len(grid.widths) for grid in grids])
    return [replace(grid, scales=part) for grid, part in zip(grids, parts, strict=True)]


def _pack(
    program: Program, site: Site, codes: torch.Tensor, grid: Grid | FloatGrid
) -> tuple[Site, dict[str, torch.Tensor]]:
    """Rows into stored order, codes into bit planes."""
    order = program.find(site.name, "row_order")
    absorbed = order is not None and program.find(site.name, "absorbed") is not None
    if order is not None:
        order = order.to(codes.device)
        codes, grid = codes[order], grid.rows(order)
    scatter = order is not None and not absorbed
    group, scales = program.stored_form(site)
    segments, index = layout(grid.widths, site.columns, group)
    fmt = SiteFormat(site.rows, site.columns, segments, scatter, group=group, scales=scales)
    stored: dict[str, torch.Tensor] = {}
    if index is not None:
        index = index.to(codes.device)
        stored["group_index"] = index.to(fmt.tensors()["group_index"][0])
    padded = torch.nn.functional.pad(codes, (0, fmt.padded_columns - site.columns))
    stored |= {"codes": pack_codes(padded, fmt, index), "factors": grid.factors}
    if isinstance(grid, Grid):
        stored["scales"] = pack_scales(grid.scales)
    else:
        held = {"zeros": pack_zeros(grid.zeros, fmt), "offsets": grid.shifts[grid.widths == 1]}
        stored |= {name: tensor for name, tensor in held.items() if tensor.numel()}
    if order is not None and scatter:
        stored["row_index"] = order.to(fmt.index_dtype)
    return replace(site, format=fmt), {name: stored[name] for name in fmt.tensors()}
