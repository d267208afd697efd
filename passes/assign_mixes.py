"""assign-mixes: AMLQ-style choice of a group size and a mix of widths for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from mixcomp.errors import ConfigError
from mixcomp.format import GROUPS, Scales
from mixcomp.passes import amlq
from mixcomp.passes.allocate import Allocation, allocate, spend_rest
from mixcomp.passes.decision import Assignment, Decision, Decisions
from mixcomp.passes.directions import (
    branch_bits,
    error_loss,
    error_spectrum,
    most_directions,
    rank_by_energy,
    rank_by_price,
)
from mixcomp.passes.rounding import round_mix
from mixcomp.profiles import shared_format
from mixcomp.program import Program, Site
from mixcomp.protocol import Context


@dataclass(frozen=True, slots=True)
class _Choice:
    """One line of a site's table: ``error`` relative, ``loss`` in nats per token, ``bits`` as the budget counts."""

    group: int
    widths: tuple[int, ...]
    error: float
    loss: float
    bits: int


@dataclass(frozen=True)
class AssignMixes(Assignment):
    """Make the worst layer's relative output error as small as the budget allows, then spend what is left.

    Every site has a table of options with ``rho = tr(E S E^T) / tr(W S W^T)`` under plain rounding.  The threshold on rho
    is found exactly (``amlq.least_maximum``); leftover bits go to the best fall of rho per bit.  Side branches are planned
    on the errors of a first round, paid from the budget, and the choice is made again with the rest; where branches
    leave too little for the cheapest options there are none.

    Before: statistics.  After, the same graph and in the table::

        layers.0.q_proj/widths         uint8[576, 5]   width of every row and column group
        layers.0.q_proj/{group, scale_kind}            columns per group, 1: an fp16 scale and integer zero per group
        layers.0.q_proj/{planned_bits, planned_rank}
        budget/{bits, price, gap, loss}                price and gap are in sums of rho: minimizing the largest costs gap

    Options:
        budget, fixed: see ``Assignment``.
        groups: sizes to choose among.
        mixes: to choose among, see ``amlq.Mix``.
        ranks: ``energy``: directions until ``energy`` of a site's error is held (AMLQ); ``price``: those worth more than
            their bits elsewhere; ``none``.
        energy: share of the error for ``ranks="energy"``.
        scale_kind: 1 (the papers) or 0, two-level scales.
    """

    name: ClassVar[str] = "assign-mixes"

    groups: tuple[int, ...] = GROUPS
    mixes: tuple[amlq.Mix, ...] = amlq.MIXES
    ranks: Literal["energy", "price", "none"] = "energy"
    energy: float = 0.1
    scale_kind: int = 1

    def span(self, site: Site, index: bool) -> tuple[int, int]:
        if not self.groups or not set(self.groups) <= set(GROUPS) or not self.mixes:
            raise ConfigError(f"assign-mixes has groups {self.groups} and {len(self.mixes)} mixes; groups are {GROUPS}")
        return _span(site.rows, site.columns, self.groups, self.mixes, self.scale_kind, self.budget.count)

    def decide(
        self, program: Program, sites: tuple[Site, ...], index: Mapping[str, bool], room: int, context: Context
    ) -> Decisions:
        if not sites:
            return Decisions({})
        tables = {}
        for site in context.track("options", sites):
            tables[site.name] = self._options(program, site, context.device)
        chosen, best = _choose(sites, tables, room)
        ranks = self._ranks(program, sites, chosen, best.price, context)
        branches = sum(ranks[s.name] * branch_bits(s.rows, s.columns) for s in sites)
        if branches > room - sum(min(o.bits for o in tables[s.name]) for s in sites):
            ranks, branches = dict.fromkeys(ranks, 0), 0
        chosen, best = _choose(sites, tables, room - branches)
        made = {s.name: self._decision(s, chosen[s.name], ranks[s.name]) for s in sites}
        loss = sum(one.loss for one in chosen.values())
        gap = max(0.0, sum(c.error for c in chosen.values()) - (best.loss - best.gap))
        return Decisions(made, loss, best.price, gap)

    def _bits(self, site: Site, group: int, widths: tuple[int, ...]) -> int:
        return shared_format(site.rows, site.columns, widths, group, Scales(self.scale_kind)).bits(self.budget.count)

    def _options(self, program: Program, site: Site, device: torch.device) -> list[_Choice]:
        """Falling in bits where errors rise is not assumed; sorted by bits, then by error."""
        weight = program.scaled_weight(site, device)
        sigma, gamma = program.sigma(site.input, device), program.gamma(site, device)
        found = []
        for o in amlq.options(weight, sigma.diagonal(), self.groups, self.mixes):
            error = amlq.relative_error(o.error, weight, sigma)
            loss = float(error_loss(o.error, sigma, gamma))
            found.append(_Choice(o.group, o.widths, error, loss, self._bits(site, o.group, o.widths)))
        return sorted(found, key=lambda o: (o.bits, o.error))

    def _ranks(
        self, program: Program, sites: tuple[Site, ...], chosen: Mapping[str, _Choice], price: float, context: Context
    ) -> dict[str, int]:
        if self.ranks == "none" or self.budget.count == "payload":
            return {s.name: 0 for s in sites}
        out = {}
        for site in sites:
            weight = program.scaled_weight(site, context.device)
            sigma = program.sigma(site.input, context.device)
            error = weight - round_mix(weight, chosen[site.name].group, chosen[site.name].widths)
            count, draw = most_directions(*weight.shape), context.generator(self.name, site.name)
            shares = error_spectrum(error, sigma, torch.ones_like(weight[:, 0]), count, draw).shares
            if self.ranks == "energy":
                out[site.name] = rank_by_energy(shares, self.energy)
            else:
                bits = branch_bits(site.rows, site.columns)
                out[site.name] = rank_by_price(shares, chosen[site.name].error, price, bits)
        return out

    def _decision(self, site: Site, one: _Choice, rank: int) -> Decision:
        widths = torch.tensor(one.widths, dtype=torch.uint8).repeat(site.rows, 1)
        return Decision(widths, rank, one.group, Scales(self.scale_kind))


@lru_cache
def _span(
    rows: int, columns: int, groups: tuple[int, ...], mixes: tuple[amlq.Mix, ...], scale_kind: int, count: str
) -> tuple[int, int]:
    """Fewest and most bits; heat moves widths about, and changes no bits but those of a short last group."""
    flat = torch.zeros(columns)
    bits = [
        shared_format(rows, columns, amlq.mix_widths(flat, group, mix), group, Scales(scale_kind)).bits(count)
        for group in groups
        for mix in mixes
    ]
    return min(bits), max(bits)


def _choose(
    sites: tuple[Site, ...], tables: Mapping[str, list[_Choice]], room: int
) -> tuple[dict[str, _Choice], Allocation]:
    """An option for every site, and what minimizing the sum of errors would have chosen."""
    longest = max(len(t) for t in tables.values())
    padded = {name: t + t[-1:] * (longest - len(t)) for name, t in tables.items()}
    errors = torch.tensor([[o.error for o in padded[s.name]] for s in sites], dtype=torch.float64)
    bits = torch.tensor([[o.bits for o in padded[s.name]] for s in sites])
    choice = spend_rest(errors, bits.double(), amlq.least_maximum(errors, bits, room), room)
    chosen = {s.name: padded[s.name][i] for s, i in zip(sites, choice.tolist(), strict=True)}
    return chosen, allocate(errors, bits, room)
