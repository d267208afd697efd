"""assign-precision: one width for every output feature of every site, under one budget of stored bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mixcomp.passes import planner
from mixcomp.passes.decision import Assignment, Decisions
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context

Strategy = Literal["joint", "uniform"]


@dataclass(frozen=True)
class AssignPrecision(Assignment):
    """Spend the budget where a bit saves most loss.

    ``joint`` buys widths for single rows at one global price (see ``allocate``); a direction of a side branch is bought
    where it saves more loss than its bits would elsewhere.  ``uniform`` is the baseline at the same stored bits: one
    width for all rows, and the share of rows that the rest can afford, the same in every site, at the next one.

    Before: salience.  After, the same graph and in the table::

        layers.0.q_proj/widths         uint8[576]   width of every output feature, original order
        layers.0.q_proj/planned_bits   int64        stored bits of the site, its side branch not counted
        layers.0.q_proj/planned_rank   int64        rank of its side branch
        budget/{bits, price, gap, loss}             the ceiling, loss saved by one more bit, optimality gap, prediction

    Options:
        budget: a hard ceiling on the weights in scope; its ``count`` says whether everything stored is counted or, to
            match a paper's setting, codes only.
        fixed: (site, width) pairs that are not up for choice.
    """

    name: ClassVar[str] = "assign-precision"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.SALIENCE})

    strategy: Strategy = "joint"

    def span(self, site: Site, index: bool) -> tuple[int, int]:
        return planner.span(site, index, self.budget.count)

    def decide(
        self, program: Program, sites: tuple[Site, ...], index: Mapping[str, bool], room: int, context: Context
    ) -> Decisions:
        return planner.decide(program.tensors, sites, index, room, self.strategy, self.budget.count)

    def pinned_loss(self, program: Program, site: Site, widths: torch.Tensor) -> float:
        return planner.predicted(program.tensors, site, widths)
