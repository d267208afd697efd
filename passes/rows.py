"""Buying widths for single rows under one budget, the stored row index of mixed sites included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mixcomp.budget import row_bits
from mixcomp.passes.allocate import Allocation, allocate
from mixcomp.program import Site

#: times the budget that freed row indices leave over is spent again
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class RowMarket:
    """What rows cost and lose: ``losses`` fp64[rows, widths] per site, ``widths`` rising, ``index`` per site whether
    mixed rows need a row index, ``count`` which bits are counted."""

    losses: Mapping[str, torch.Tensor]
    widths: Sequence[int]
    index: Mapping[str, bool]
    count: str

    def buy(self, sites: Sequence[Site], budget: int) -> tuple[Allocation, dict[str, torch.Tensor]]:
        """Widths uint8[rows] of every site at one price."""
        losses = torch.cat([self.losses[s.name].double().cpu() for s in sites])
        costs = torch.cat([torch.tensor([self._costs(s)]).expand(s.rows, -1) for s in sites])
        bought = allocate(losses, costs, budget)
        parts = torch.tensor(self.widths, dtype=torch.uint8)[bought.choice].split([s.rows for s in sites])
        return bought, {s.name: widths for s, widths in zip(sites, parts, strict=True)}

    def settle(self, sites: Sequence[Site], budget: int) -> tuple[Allocation, dict[str, torch.Tensor]]:
        """``buy``, and again with what the row indices of sites that came out with one width would have cost."""
        settled: dict[str, torch.Tensor] = {}
        for _ in range(ROUNDS):
            bought, parts = self.buy(sites, budget)
            single = [s for s in sites if self.index[s.name] and len(parts[s.name].unique()) == 1]
            settled.update({s.name: parts[s.name] for s in single})
            for s in single:
                budget -= s.rows * row_bits(s.rows, s.columns, int(parts[s.name][0]), False, self.count)
            sites = [s for s in sites if s.name not in settled]
            if not single or not sites:
                break
        return bought, {**parts, **settled}

    def loss(self, site: Site, widths: torch.Tensor) -> float:
        """Predicted loss of a site at these widths, uint8[rows]."""
        option = torch.searchsorted(torch.tensor(self.widths), widths.long())
        return float(self.losses[site.name].double().cpu().gather(1, option[:, None]).sum())

    def _costs(self, site: Site) -> list[int]:
        index = self.index[site.name]
        return [row_bits(site.rows, site.columns, width, index, self.count) for width in self.widths]
