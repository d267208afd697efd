"""assign-features: MixLLM's widths, one global order of output features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from mixcomp.budget import row_span
from mixcomp.errors import BudgetError, ConfigError
from mixcomp.format import GROUP, Scales
from mixcomp.passes.decision import Assignment, Decision, Decisions
from mixcomp.passes.mixllm import check_widths, losses_of, widths_by_share
from mixcomp.passes.rows import RowShop, Widths
from mixcomp.program import Program, Site
from mixcomp.protocol import Context


@dataclass(frozen=True)
class AssignFeatures(Assignment):
    """Give the wide codes to the output features that rounding hurts most, all sites sorted together.

    Under the budget features are ranked by salience per stored bit: a feature of ``down_proj`` costs three times what
    one of ``q_proj`` does, which the paper's count of features does not see.  With ``shares`` the paper's count decides
    (10 % of all features at 8 bits: ``(0.1,)``), and the budget only refuses what does not fit.

    Before: mixllm salience.  After, the same graph and in the table::

        layers.0.q_proj/widths         uint8[576]   width of every output feature, original order
        layers.0.q_proj/{planned_bits, planned_rank}
        budget/{bits, price, gap, loss}             the ceiling, salience saved by one more bit, gap, salience left

    Options:
        budget, fixed: see ``Assignment``.
        widths: falling; those that ``score-features`` scored.
        shares: of all features, for every width but the narrowest; empty: whatever the budget buys.
        group, scale_kind: columns of a group, and 0 for two-level scales or 1 for an fp16 scale and, below 8 bits, an
            integer zero per group; 128 and 1 are the paper's.
    """

    name: ClassVar[str] = "assign-features"

    widths: tuple[int, ...] = (8, 4)
    shares: tuple[float, ...] = ()
    group: int = GROUP
    scale_kind: int = 0

    @property
    def form(self) -> tuple[str, int, Scales]:
        return self.budget.count, self.group, Scales(self.scale_kind)

    def span(self, site: Site, index: bool) -> tuple[int, int]:
        check_widths(self.widths)
        return row_span(site, self.widths[-1], self.widths[0], index, *self.form)

    def decide(
        self, program: Program, sites: tuple[Site, ...], index: Mapping[str, bool], room: int, context: Context
    ) -> Decisions:
        if not sites:
            return Decisions({})
        losses = {s.name: losses_of(self._scores(program, s)) for s in sites}
        shop = RowShop(losses, sites, self.widths[::-1], index, *self.form)
        price = gap = 0.0
        if self.shares:
            parts = self._by_share(program, sites)
        else:
            bought, parts = shop.settle(room)
            price, gap = bought.price, bought.gap
        made = {s.name: Decision(parts[s.name], 0, *self.form[1:]) for s in sites}
        if self.shares:
            self._refuse_overspending(made, sites, index, room)
        return Decisions(made, sum(shop.loss(s, parts[s.name]) for s in sites), price, gap)

    def _by_share(self, program: Program, sites: tuple[Site, ...]) -> Widths:
        scores = torch.cat([self._scores(program, s) for s in sites])
        widths = widths_by_share(scores, self.widths, self.shares).split([s.rows for s in sites])
        return {s.name: own for s, own in zip(sites, widths, strict=True)}

    def _scores(self, program: Program, site: Site) -> torch.Tensor:
        scores = program.tensor(site.name, "mixllm").cpu()
        if scores.shape[1] != len(self.widths) - 1:
            raise ConfigError(
                f"assign-features has widths {self.widths}, site {site.name!r} was scored at {scores.shape[1]} widths; "
                "give score-features the same widths"
            )
        return scores

    def _refuse_overspending(
        self, made: Mapping[str, Decision], sites: tuple[Site, ...], index: Mapping[str, bool], room: int
    ) -> None:
        spent = sum(made[s.name].layout(s, index[s.name]).bits(self.budget.count) for s in sites)
        if spent > room:
            raise BudgetError(
                f"shares {self.shares} of widths {self.widths} take {spent} bits, the budget {self.budget} leaves "
                f"{room}; raise the budget or lower the shares"
            )
