"""assign-precision: one width for every output feature of every site, under one budget of stored bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mixcomp.budget import row_bits
from mixcomp.format import WIDTHS
from mixcomp.passes.coupling import analyse, needs_index
from mixcomp.passes.decision import Assignment, Decisions, row_decision
from mixcomp.passes.directions import branch_bits, rank_by_price
from mixcomp.passes.rows import RowMarket
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
        count = self.budget.count
        least = row_bits(site.rows, site.columns, WIDTHS[0], False, count)
        return site.rows * least, site.rows * row_bits(site.rows, site.columns, WIDTHS[-1], index, count)

    def pinned_loss(self, program: Program, name: str, widths: torch.Tensor) -> float:
        return self._market(program, (program.site(name),), {}).loss(program.site(name), widths)

    def decide(self, program: Program, sites: tuple[Site, ...], room: int, context: Context) -> Decisions:
        index = needs_index(program, analyse(program))
        if self.strategy == "uniform":
            index = dict.fromkeys(index, False)  # wide rows first in their natural order: nothing to scatter
        market = self._market(program, sites, index)
        price = gap = 0.0
        ranks = dict.fromkeys(market.losses, 0)
        if self.strategy == "uniform" or not sites:
            parts = _uniform(sites, room, self.budget.count)
        else:
            bought, parts = market.buy(sites, room)
            if self.budget.count == "stored":
                ranks = {s.name: _rank(program, s, market.loss(s, parts[s.name]), bought.price) for s in sites}
            room -= sum(ranks[s.name] * branch_bits(s.rows, s.columns) for s in sites)
            bought, parts = market.settle(sites, room)
            price, gap = bought.price, bought.gap
        made = {}
        for s in sites:
            own = parts[s.name]
            made[s.name] = row_decision(s, own, index[s.name], market.loss(s, own), ranks[s.name])
        return Decisions(made, price, gap)

    def _market(self, program: Program, sites: tuple[Site, ...], index: dict[str, bool]) -> RowMarket:
        losses = {s.name: program.tensor(s.name, "salience") for s in sites}
        return RowMarket(losses, WIDTHS, index, self.budget.count)


def _rank(program: Program, site: Site, loss: float, price: float) -> int:
    return rank_by_price(program.tensor(site.name, "spectrum"), loss, price, branch_bits(site.rows, site.columns))


def _uniform(sites: tuple[Site, ...], budget: int, count: str) -> dict[str, torch.Tensor]:
    """The widest single width that fits, and as large a common share of rows at the next width as still fits."""

    def widths(base: int, share: float) -> dict[str, list[int]]:
        return {s.name: [WIDTHS[min(base + (row < int(share * s.rows)), 5)] for row in range(s.rows)] for s in sites}

    def bits(base: int, share: float) -> int:
        return sum(
            int(share * s.rows) * row_bits(s.rows, s.columns, WIDTHS[min(base + 1, 5)], False, count)
            + (s.rows - int(share * s.rows)) * row_bits(s.rows, s.columns, WIDTHS[base], False, count)
            for s in sites
        )

    base = max((i for i in range(len(WIDTHS)) if bits(i, 0.0) <= budget), default=0)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if bits(base, middle) <= budget else (low, middle)
    return {name: torch.tensor(w, dtype=torch.uint8) for name, w in widths(base, low).items()}
