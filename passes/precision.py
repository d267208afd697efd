"""assign-precision: one width for every output feature of every site, under one budget of stored bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from mixcomp.budget import limits, row_bits
from mixcomp.config import Budget
from mixcomp.errors import ConfigError
from mixcomp.format import WIDTHS, SiteFormat, runs
from mixcomp.passes.allocate import Allocation, allocate
from mixcomp.passes.coupling import analyse, needs_index
from mixcomp.passes.directions import branch_bits
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context, Pass

Strategy = Literal["joint", "uniform"]
#: times the budget that freed row indices leave over is spent again
_ROUNDS = 3


@dataclass(frozen=True)
class AssignPrecision(Pass):
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
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.ASSIGNED})

    budget: Budget = field(default_factory=lambda: Budget(4.4))
    strategy: Strategy = "joint"
    fixed: tuple[tuple[str, int], ...] = ()

    def run(self, program: Program, context: Context) -> Program:
        fixed = _fixed_widths(program, self.fixed)
        index = needs_index(program, analyse(program))
        count = self.budget.count
        bounds = limits(program.sites, index, fixed, count)
        ceiling = self.budget.bits(bounds.weights)
        bounds.require(ceiling, str(self.budget))
        free = tuple(s for s in program.open_sites() if s.name not in fixed)
        held = bounds.fixed + sum(_site_bits(program.site(n), count, w) for n, w in fixed.items())
        if self.strategy == "uniform":
            index = dict.fromkeys(index, False)  # wide rows first in their natural order: nothing to scatter
            widths, bought, ranks = _uniform(free, ceiling - held, count), None, dict.fromkeys(index, 0)
        else:
            widths, bought, ranks = _joint(program, free, index, ceiling - held, count)
        limit = {"budget/bits" if count == "stored" else "budget/payload_bits": torch.tensor(ceiling)}
        for name, width in fixed.items():
            widths[name] = torch.full((program.site(name).rows,), width, dtype=torch.uint8)
        return program.with_tensors(_table(program, widths, ranks, index, limit, bought))


def _fixed_widths(program: Program, fixed: tuple[tuple[str, int], ...]) -> dict[str, int]:
    names = {s.name for s in program.open_sites()}
    for name, width in fixed:
        if name not in names or width not in WIDTHS:
            raise ConfigError(
                f"fixed width {width!r} for {name!r}: widths are {WIDTHS}, sites e.g. {sorted(names)[:3]}"
            )
    return dict(fixed)


def _site_bits(site: Site, count: str, width: int) -> int:
    return site.rows * row_bits(site.rows, site.columns, width, False, count)


def _joint(
    program: Program, sites: tuple[Site, ...], index: dict[str, bool], budget: int, count: str
) -> tuple[dict[str, torch.Tensor], Allocation, dict[str, int]]:
    bought, parts = _buy(program, sites, index, budget, count)
    ranks = _directions(program, sites, parts, bought.price) if count == "stored" else {}
    budget -= sum(ranks[s.name] * branch_bits(s.rows, s.columns) for s in sites if s.name in ranks)
    settled: dict[str, torch.Tensor] = {}
    for _ in range(_ROUNDS):
        bought, parts = _buy(program, sites, index, budget, count)
        # a site of one width needs no row index: it is settled, and the others share what its index would have cost
        single = [s for s in sites if index[s.name] and len(parts[s.name].unique()) == 1]
        settled.update({s.name: parts[s.name] for s in single})
        budget -= sum(s.rows * row_bits(s.rows, s.columns, int(parts[s.name][0]), False, count) for s in single)
        sites = tuple(s for s in sites if s.name not in settled)
        if not single or not sites:
            break
    return {**parts, **settled}, bought, ranks


def _buy(
    program: Program, sites: tuple[Site, ...], index: dict[str, bool], budget: int, count: str
) -> tuple[Allocation, dict[str, torch.Tensor]]:
    """Widths uint8[rows] of every site at one price."""
    losses = torch.cat([program.tensor(s.name, "salience").double().cpu() for s in sites])
    costs = torch.cat(
        [
            torch.tensor([[row_bits(s.rows, s.columns, w, index[s.name], count) for w in WIDTHS]]).expand(s.rows, -1)
            for s in sites
        ]
    )
    bought = allocate(losses, costs, budget)
    parts = torch.tensor(WIDTHS, dtype=torch.uint8)[bought.choice].split([s.rows for s in sites])
    return bought, {s.name: widths for s, widths in zip(sites, parts, strict=True)}


def _directions(
    program: Program, sites: tuple[Site, ...], widths: dict[str, torch.Tensor], price: float
) -> dict[str, int]:
    """Rank of every site's side branch: leading directions whose share of the site's loss is worth more than their bits."""
    ranks = {}
    for site in sites:
        loss = float(_predicted(program, site, widths[site.name]))
        gains = program.tensor(site.name, "spectrum").double().cpu() * loss
        pays = gains > price * branch_bits(site.rows, site.columns)
        ranks[site.name] = int(pays.long().cumprod(0).sum())
    return ranks


def _predicted(program: Program, site: Site, widths: torch.Tensor) -> torch.Tensor:
    """Loss of a site at these widths, fp64[]."""
    option = torch.searchsorted(torch.tensor(WIDTHS), widths.long())
    return program.tensor(site.name, "salience").double().cpu().gather(1, option[:, None]).sum()


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


def _table(
    program: Program,
    widths: dict[str, torch.Tensor],
    ranks: dict[str, int],
    index: dict[str, bool],
    limit: dict[str, torch.Tensor],
    bought: Allocation | None,
) -> dict[str, torch.Tensor]:
    out = dict(limit)
    predicted = 0.0
    for name, chosen in widths.items():
        site = program.site(name)
        rank = ranks.get(name, 0)
        ordered = sorted(chosen.tolist())
        # rows that already lie in as few segments as a sort would leave stay where they are
        scatter = index[name] and len(runs(chosen.tolist())) > len(set(ordered))
        fmt = SiteFormat(site.rows, site.columns, runs(ordered), scatter)
        predicted += float(_predicted(program, site, chosen))
        out[f"{name}/widths"] = chosen
        out[f"{name}/planned_bits"] = torch.tensor(fmt.stored_bits())
        out[f"{name}/planned_rank"] = torch.tensor(rank)
    out["budget/loss"] = torch.tensor(predicted, dtype=torch.float64)
    out["budget/price"] = torch.tensor(bought.price if bought else 0.0, dtype=torch.float64)
    out["budget/gap"] = torch.tensor(bought.gap if bought else 0.0, dtype=torch.float64)
    return out
