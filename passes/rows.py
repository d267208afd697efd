"""Buying widths for single rows under one budget, the stored row index of mixed sites included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mixcomp.budget import row_bits, row_span
from mixcomp.passes.allocate import Allocation, Offers
from mixcomp.program import Site

#: times the budget that freed row indices leave over is spent again
_ROUNDS = 3

Widths = dict[str, torch.Tensor]


class RowShop:
    """What the rows of some sites lose and cost, and everything that can be bought for them.

    ``losses`` are fp64[rows, widths] per site, ``widths`` rise, ``index`` tells per site whether mixed rows need a row
    index, ``form`` which bits are counted, of a group and kind of scales: what else ``budget.row_bits`` takes.
    """

    def __init__(
        self,
        losses: Mapping[str, torch.Tensor],
        sites: Sequence[Site],
        widths: Sequence[int],
        index: Mapping[str, bool],
        *form: Any,
    ) -> None:
        self.losses = {s.name: losses[s.name].double().cpu() for s in sites}
        self.sites, self.widths, self.index, self.form = sites, torch.tensor(widths, dtype=torch.uint8), index, form
        costs = [[row_bits(s.rows, s.columns, w, index[s.name], *form) for w in widths] for s in sites]
        rows = torch.tensor([s.rows for s in sites])
        joined = torch.cat([self.losses[s.name] for s in sites])
        self.offers = Offers.of(joined, torch.tensor(costs).repeat_interleave(rows, 0))

    def settle(self, budget: int) -> tuple[Allocation, Widths]:
        """Widths uint8[rows] of every site at one price, bought again with what the row indices of sites that came out
        with one width would have cost."""
        sites, offers, settled = self.sites, self.offers, Widths()
        for _ in range(_ROUNDS):
            bought = offers.buy(budget)
            parts = self._split(sites, bought.choice)
            single = {s.name for s in sites if self.index[s.name] and bool((parts[s.name] == parts[s.name][0]).all())}
            settled |= {name: parts.pop(name) for name in single}
            for s in (s for s in sites if s.name in single):
                width = int(settled[s.name][0])
                budget -= row_span(s, width, width, False, *self.form)[0]
            if not single or not parts:
                break
            left = torch.tensor([s.name not in single for s in sites])
            offers = offers.among(left.repeat_interleave(torch.tensor([s.rows for s in sites])))
            sites = [s for s in sites if s.name not in single]
        return bought, {**parts, **settled}

    def loss(self, site: Site, widths: torch.Tensor) -> float:
        """Predicted loss of a site at these widths, uint8[rows]."""
        return loss_at(self.losses[site.name], self.widths, widths)

    def _split(self, sites: Sequence[Site], choice: torch.Tensor) -> Widths:
        parts = self.widths[choice].split([s.rows for s in sites])
        return {s.name: widths for s, widths in zip(sites, parts, strict=True)}


def loss_at(losses: torch.Tensor, widths: torch.Tensor, chosen: torch.Tensor) -> float:
    """Loss of rows at the ``chosen`` uint8[rows] of the rising ``widths`` that fp[rows, widths] prices."""
    option = torch.searchsorted(widths, chosen.cpu())
    return float(losses.double().cpu().gather(1, option[:, None]).sum())
