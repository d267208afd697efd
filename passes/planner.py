"""Widths under one budget: the mathematics of planning, without a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mixcomp.budget import limits, row_bits, row_span
from mixcomp.config import Budget
from mixcomp.format import WIDTHS
from mixcomp.passes.coupling import Couplings, needs_index
from mixcomp.passes.decision import Decision, Decisions, spend
from mixcomp.passes.rows import RowShop, Widths, loss_at
from mixcomp.program import Site

#: strategies that need nothing but prices
STRATEGIES = ("joint", "uniform")


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """All that planning knows of a model.

    ``tensors`` holds "<site>/salience" fp32[rows, widths] of every open site.
    """

    sites: tuple[Site, ...]
    couplings: Couplings
    tensors: Mapping[str, torch.Tensor]

    def open_sites(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.open)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: planning waits for memory, and on a busy machine threads waiting for each other take 5 times
    as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def assign(prices: Prices, budget: Budget, strategy: str, fixed: Mapping[str, int]) -> Decisions:
    """Spend ``budget``; see ``precision.AssignPrecision`` for the strategies, and ``decision.spend`` for errors."""
    index = needs_index(prices.sites, prices.couplings)
    return spend(
        prices.sites, index, budget, fixed,
        lambda site, own: span(site, own, budget.count),
        lambda sites, room: decide(prices.tensors, sites, index, room, strategy, budget.count),
        lambda site, widths: predicted(prices.tensors, site, widths),
    )  # fmt: skip


def span(site: Site, index: bool, count: str) -> tuple[int, int]:
    """Fewest and most bits of a site."""
    return row_span(site, WIDTHS[0], WIDTHS[-1], index, count)


def predicted(tensors: Mapping[str, torch.Tensor], site: Site, widths: torch.Tensor) -> float:
    """Loss of a site at these widths."""
    return loss_at(tensors[f"{site.name}/salience"], torch.tensor(WIDTHS, dtype=torch.uint8), widths)


@_one_thread()
def decide(
    tensors: Mapping[str, torch.Tensor],
    sites: tuple[Site, ...],
    index: Mapping[str, bool],
    room: int,
    strategy: str,
    count: str,
) -> Decisions:
    """Widths of sites within ``room`` bits; ``tensors`` as in ``Prices``."""
    price, gap = 0.0, 0.0
    if strategy == "uniform" or not sites:
        parts = _uniform(sites, room, count)
    else:
        bought, parts = _shop(tensors, sites, index, count).settle(room)
        price, gap = bought.price, bought.gap
    loss = sum(predicted(tensors, s, parts[s.name]) for s in sites)
    return Decisions({s.name: Decision(parts[s.name]) for s in sites}, loss, price, gap)


@_one_thread()
def curve(prices: Prices, count: str = "stored", points: int = 101) -> list[tuple[float, float]]:
    """(bits per weight, predicted loss) that ``joint`` reaches, from the floor to the ceiling, in one sweep.

    Every row that might need an index has one; ``assign`` spends what freed indices are worth on top.
    """
    sites = prices.open_sites()
    index = needs_index(prices.sites, prices.couplings)
    bounds = limits(prices.sites, index, {}, count)
    offers = _shop(prices.tensors, sites, index, count).offers
    low, high = float(offers.bits[:, 0].sum()), float(offers.bits[:, -1].sum())
    bits, loss = offers.sweep(torch.linspace(low, high, points, dtype=torch.float64))
    per_weight = ((bits + bounds.fixed) / bounds.weights).tolist()
    return list(zip(per_weight, loss.tolist(), strict=True))


def _shop(
    tensors: Mapping[str, torch.Tensor], sites: tuple[Site, ...], index: Mapping[str, bool], count: str
) -> RowShop:
    return RowShop({s.name: tensors[f"{s.name}/salience"] for s in sites}, sites, WIDTHS, index, count)


def _uniform(sites: tuple[Site, ...], budget: int, count: str) -> Widths:
    """The widest single width that fits, and as large a common share of rows at the next width as still fits."""
    last = len(WIDTHS) - 1
    costs = {s.name: [row_bits(s.rows, s.columns, w, False, count) for w in WIDTHS] for s in sites}

    def bits(base: int, share: float) -> int:
        wide = {s.name: int(share * s.rows) for s in sites}
        return sum(
            wide[s.name] * costs[s.name][min(base + 1, last)] + (s.rows - wide[s.name]) * costs[s.name][base]
            for s in sites
        )

    base = max((i for i in range(len(WIDTHS)) if bits(i, 0.0) <= budget), default=0)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if bits(base, middle) <= budget else (low, middle)
    found = {}
    for s in sites:
        widths = torch.full((s.rows,), WIDTHS[base], dtype=torch.uint8)
        widths[: int(low * s.rows)] = WIDTHS[min(base + 1, last)]
        found[s.name] = widths
    return found
