"""Widths and ranks under one budget: the mathematics of planning, without a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mixcomp.budget import limits, row_bits
from mixcomp.config import Budget
from mixcomp.errors import ConfigError
from mixcomp.format import WIDTHS, Segment, SiteFormat
from mixcomp.passes.allocate import Offers
from mixcomp.passes.coupling import Couplings, needs_index
from mixcomp.passes.directions import branch_bits
from mixcomp.passes.orders import segments
from mixcomp.program import Site

#: times the budget that freed row indices leave over is spent again
_ROUNDS = 3

Widths = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """All that planning knows of a model.

    ``tensors`` holds "<site>/salience" fp32[rows, widths] and "<site>/spectrum" fp32[directions] of every open site.
    """

    sites: tuple[Site, ...]
    couplings: Couplings
    tensors: Mapping[str, torch.Tensor]

    def open_sites(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.open)

    def losses(self, sites: tuple[Site, ...]) -> torch.Tensor:
        """fp64[rows of all sites, widths]."""
        return torch.cat([self.tensors[f"{s.name}/salience"].double().cpu() for s in sites])


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """``widths`` uint8[rows] (original order) and ``ranks`` of every open site; ``loss`` is what they are predicted to
    cost, ``ceiling`` the bits that were there to spend; ``price`` and ``gap`` as in ``allocate.Allocation``."""

    widths: Mapping[str, torch.Tensor]
    ranks: Mapping[str, int]
    ceiling: int
    loss: float
    price: float
    gap: float


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


@_one_thread()
def assign(prices: Prices, budget: Budget, strategy: str, fixed: Mapping[str, int]) -> Assignment:
    """Spend ``budget``; see ``precision.AssignPrecision`` for the strategies.

    Raises:
        BudgetError: it is below the floor or above the ceiling of the weights in scope.
        ConfigError: ``fixed`` names a site that is not open, or a width that does not exist.
    """
    sites = prices.open_sites()
    _check_fixed(sites, fixed)
    index, count = needs_index(prices.sites, prices.couplings), budget.count
    bounds = limits(prices.sites, index, fixed, count)
    ceiling = budget.bits(bounds.weights)
    bounds.require(ceiling, str(budget))
    free = tuple(s for s in sites if s.name not in fixed)
    held = bounds.fixed + sum(_single(s, fixed[s.name], count) for s in sites if s.name in fixed)
    found = {s.name: torch.full((s.rows,), fixed[s.name], dtype=torch.uint8) for s in sites if s.name in fixed}
    ranks = dict.fromkeys((s.name for s in sites), 0)
    price = gap = 0.0
    if strategy == "uniform":
        found |= _uniform(free, ceiling - held, count)
    elif free:
        shop = _Shop(prices, free, index, count)
        bought, price, gap = shop.joint(ceiling - held, ranks)
        found |= bought
    widths = {s.name: found[s.name] for s in sites}
    loss = float(sum(_predicted(prices, s, widths[s.name]) for s in sites))
    return Assignment(widths, ranks, ceiling, loss, price, gap)


@_one_thread()
def curve(prices: Prices, count: str = "stored", points: int = 101) -> list[tuple[float, float]]:
    """(bits per weight, predicted loss) that ``joint`` reaches, from the floor to the ceiling, in one sweep.

    Row widths alone, every row that might need an index with one; ``assign`` spends what side branches and freed
    indices are worth on top.
    """
    sites = prices.open_sites()
    index = needs_index(prices.sites, prices.couplings)
    bounds = limits(prices.sites, index, {}, count)
    offers = _Shop(prices, sites, index, count).offers
    low, high = float(offers.bits[:, 0].sum()), float(offers.bits[:, -1].sum())
    bits, loss = offers.sweep(torch.linspace(low, high, points, dtype=torch.float64))
    per_weight = ((bits + bounds.fixed) / bounds.weights).tolist()
    return list(zip(per_weight, loss.tolist(), strict=True))


def table(prices: Prices, found: Assignment, count: str) -> dict[str, torch.Tensor]:
    """The tensors that ``precision.AssignPrecision`` documents, for a program's table."""
    index = needs_index(prices.sites, prices.couplings)
    out = {"budget/bits" if count == "stored" else "budget/payload_bits": torch.tensor(found.ceiling)}
    for site in prices.open_sites():
        widths = found.widths[site.name]
        out[f"{site.name}/widths"] = widths
        out[f"{site.name}/planned_bits"] = torch.tensor(site_format(site, widths, index[site.name]).stored_bits())
        out[f"{site.name}/planned_rank"] = torch.tensor(found.ranks[site.name])
    for what in ("loss", "price", "gap"):
        out[f"budget/{what}"] = torch.tensor(getattr(found, what), dtype=torch.float64)
    return out


def assigned(prices: Prices) -> Assignment:
    """What ``table`` wrote, from a program's tensors."""
    of, names = prices.tensors, [s.name for s in prices.open_sites()]
    ceiling = next(int(of[key]) for key in ("budget/bits", "budget/payload_bits") if key in of)
    loss, price, gap = (float(of[f"budget/{what}"]) for what in ("loss", "price", "gap"))
    ranks = {name: int(of[f"{name}/planned_rank"]) for name in names}
    return Assignment({name: of[f"{name}/widths"].cpu() for name in names}, ranks, ceiling, loss, price, gap)


def site_format(site: Site, widths: torch.Tensor, index: bool) -> SiteFormat:
    """Layout of a site's rows sorted by width, with a row index if they need both sorting and an index.

    Rows that already lie in as few segments as a sort would leave stay where they are.
    """
    held = torch.bincount(widths.long().cpu(), minlength=WIDTHS[-1] + 1).tolist()
    sizes = tuple(Segment(rows, width) for width, rows in enumerate(held) if rows)
    return SiteFormat(site.rows, site.columns, sizes, index and segments(widths) > len(sizes))


def _check_fixed(sites: tuple[Site, ...], fixed: Mapping[str, int]) -> None:
    names = {s.name for s in sites}
    for name, width in fixed.items():
        if name not in names or width not in WIDTHS:
            raise ConfigError(
                f"fixed width {width!r} for {name!r}: widths are {WIDTHS}, sites e.g. {sorted(names)[:3]}"
            )


def _single(site: Site, width: int, count: str) -> int:
    """Bits of a site with one width."""
    return site.rows * row_bits(site.rows, site.columns, width, False, count)


class _Shop:
    """What the rows of some sites cost, and everything that can be bought for them."""

    def __init__(self, prices: Prices, sites: tuple[Site, ...], index: Mapping[str, bool], count: str) -> None:
        self.prices, self.sites, self.index, self.count = prices, sites, index, count
        costs = [[row_bits(s.rows, s.columns, w, index[s.name], count) for w in WIDTHS] for s in sites]
        rows = torch.tensor([s.rows for s in sites])
        self.offers = Offers.of(prices.losses(sites), torch.tensor(costs).repeat_interleave(rows, 0))

    def joint(self, budget: int, ranks: dict[str, int]) -> tuple[Widths, float, float]:
        """Widths of all sites, price and gap; fills in ``ranks``."""
        sites, offers, settled = self.sites, self.offers, dict[str, torch.Tensor]()
        bought = offers.buy(budget)
        if self.count == "stored":
            parts = _split(sites, bought.choice)
            ranks |= {s.name: self._rank(s, parts[s.name], bought.price) for s in sites}
            budget -= sum(ranks[s.name] * branch_bits(s.rows, s.columns) for s in sites)
        for _ in range(_ROUNDS):
            bought = offers.buy(budget)
            parts = _split(sites, bought.choice)
            # a site of one width needs no row index: it is settled, and the others share what its index would have cost
            single = {s.name for s in sites if self.index[s.name] and bool((parts[s.name] == parts[s.name][0]).all())}
            settled |= {name: parts.pop(name) for name in single}
            budget -= sum(_single(s, int(settled[s.name][0]), self.count) for s in sites if s.name in single)
            if not single or not parts:
                break
            left = torch.tensor([s.name not in single for s in sites])
            offers = offers.among(left.repeat_interleave(torch.tensor([s.rows for s in sites])))
            sites = tuple(s for s in sites if s.name not in single)
        return {**parts, **settled}, bought.price, bought.gap

    def _rank(self, site: Site, widths: torch.Tensor, price: float) -> int:
        """Leading directions whose share of the site's loss is worth more than their bits."""
        gains = self.prices.tensors[f"{site.name}/spectrum"].double().cpu() * _predicted(self.prices, site, widths)
        pays = gains > price * branch_bits(site.rows, site.columns)
        return int(pays.long().cumprod(0).sum())


def _split(sites: tuple[Site, ...], choice: torch.Tensor) -> Widths:
    parts = torch.tensor(WIDTHS, dtype=torch.uint8)[choice].split([s.rows for s in sites])
    return {s.name: widths for s, widths in zip(sites, parts, strict=True)}


def _predicted(prices: Prices, site: Site, widths: torch.Tensor) -> float:
    """Loss of a site at these widths."""
    option = torch.searchsorted(torch.tensor(WIDTHS), widths.long())
    return float(prices.losses((site,)).gather(1, option[:, None]).sum())


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
