"""Spending bits: one price for all units, the convex hull of each, the rest by best bargain.

Pure numbers, no graph: ``losses`` and ``bits`` are fp64[units, options]; a unit takes exactly one option.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

#: units worked on side by side: their options stay in a cache, and one thread does the work, which waits for no other
_STRIP = 1 << 12


@dataclass(frozen=True, slots=True)
class Allocation:
    """``choice`` int64[units].  ``price`` is the loss one more bit would save; ``gap`` bounds how far ``loss`` can be
    above the best possible (weak duality: every price gives a lower bound on the optimum)."""

    choice: torch.Tensor
    bits: int
    loss: float
    price: float
    gap: float


def allocate(losses: torch.Tensor, bits: torch.Tensor, budget: int) -> Allocation:
    """Least total loss within ``budget`` bits.

    Every unit starts at its cheapest option.  The steps along the lower convex hulls of all units are bought in order of
    loss saved per bit until the budget is reached: the last ratio bought is the price.  What is left over is spent on any
    upgrade that still fits, best ratio first.  Ties go to the unit that comes first.

    ``bits`` must rise along each row; the cheapest options must fit the budget (``budget.Limits`` checks that first).
    """
    return Offers.of(losses, bits).buy(budget)


@dataclass(frozen=True, slots=True, eq=False)
class Offers:
    """Every hull step of every unit, best ratio first: what is bought at one budget is a prefix of what is at a larger.

    ``unit``, ``option`` int64[steps]: the step takes the unit to that option; ``cost``, ``ratio`` fp64[steps]: its bits,
    and the loss it saves per bit.
    """

    losses: torch.Tensor
    bits: torch.Tensor
    unit: torch.Tensor
    option: torch.Tensor
    cost: torch.Tensor
    ratio: torch.Tensor

    @classmethod
    def of(cls, losses: torch.Tensor, bits: torch.Tensor) -> Offers:
        """All offers of fp64[units, options] losses and bits."""
        losses, bits = losses.double().cpu(), bits.double().cpu()
        unit, option, cost, ratio = _hull_steps(losses, bits)
        ratio, order = torch.sort(ratio, descending=True, stable=True)
        pair = (unit * losses.shape[1] + option)[order]  # one gather from far apart instead of two
        return cls(losses, bits, pair // losses.shape[1], pair % losses.shape[1], cost[order], ratio)

    def among(self, units: torch.Tensor) -> Offers:
        """The offers of the units where bool[units] is true; they are numbered anew, in the same order."""
        kept = units[self.unit]
        number = units.long().cumsum(0) - 1
        parts = (number[self.unit[kept]], self.option[kept], self.cost[kept], self.ratio[kept])
        return Offers(self.losses[units], self.bits[units], *parts)

    def buy(self, budget: int) -> Allocation:
        """See ``allocate``."""
        running = float(self.bits[:, 0].sum()) + self.cost.cumsum(0)
        count = int(torch.searchsorted(running, float(budget), right=True))
        choice = torch.zeros(len(self.losses), dtype=torch.int64)
        # the hull steps of a unit come in falling ratio, so the furthest one bought is the unit's choice
        choice.scatter_reduce_(0, self.unit[:count], self.option[:count], "amax")
        price = float(self.ratio[count]) if count < len(self.ratio) else 0.0
        choice = spend_rest(self.losses, self.bits, choice, budget)
        loss, used = (float(table.gather(1, choice[:, None]).sum()) for table in (self.losses, self.bits))
        best = (self.losses + price * self.bits).min(1).values if len(self.losses) else self.losses
        bound = float(best.sum()) - price * budget
        return Allocation(choice, int(used), loss, price, max(0.0, loss - bound))

    def sweep(self, budgets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What hull steps alone buy at each of fp64[n] budgets: bits spent and the loss left, fp64[n] both."""
        first = torch.zeros(1, dtype=torch.float64)
        spent = self.bits[:, 0].sum() + torch.cat((first, self.cost.cumsum(0)))
        left = self.losses[:, 0].sum() - torch.cat((first, (self.ratio * self.cost).cumsum(0)))
        count = (torch.searchsorted(spent, budgets, right=True) - 1).clamp_min(0)
        return spent[count], left[count].clamp_min(0)


def _hull_steps(losses: torch.Tensor, bits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(unit, option, cost, ratio) of all steps along the lower hulls of (bits, loss): all first steps, all second ..."""
    rounds: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(losses.shape[1])]
    for first in range(0, len(losses), _STRIP):
        strip = slice(first, first + _STRIP)
        for number, step in enumerate(_walk(losses[strip].T.contiguous(), bits[strip].T.contiguous())):
            rounds[number].append((step[0] + first, *step[1:]))
    found = [step for steps in rounds for step in steps]
    if not found:
        empty = torch.zeros(0, dtype=torch.int64)
        return empty, empty, empty.double(), empty.double()
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _walk(losses: torch.Tensor, bits: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """From each vertex of the hulls of fp64[options, units] the steepest descent, until no unit goes on."""
    units = torch.arange(losses.shape[1])
    here_loss, here_bits = losses[:1], bits[:1]
    while True:
        more = bits - here_bits
        ratio = torch.where(more > 0, (here_loss - losses) / more.clamp_min(1e-300), -torch.inf)
        best, to = ratio.max(0)
        going = best > 0
        if not going.any():
            return
        if not going.all():
            units, to, best, more = units[going], to[going], best[going], more[:, going]
            losses, bits = losses[:, going], bits[:, going]
        yield units, to, more.gather(0, to[None])[0], best
        here_loss, here_bits = losses.gather(0, to[None]), bits.gather(0, to[None])


def spend_rest(losses: torch.Tensor, bits: torch.Tensor, choice: torch.Tensor, budget: int) -> torch.Tensor:
    """Upgrade single units from ``choice`` int64[units], best loss per bit first, while anything fits."""
    choice = choice.clone()
    rest = budget - float(bits.gather(1, choice[:, None]).sum())
    if not len(choice) or rest < float(bits.diff(dim=1).min()):
        return choice

    def offers(unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bits and ratio of every upgrade of some units that fits now; nothing that does not will fit later."""
        at = choice[unit, None]
        saved = losses[unit].gather(1, at) - losses[unit]
        more = bits[unit] - bits[unit].gather(1, at)
        fits = (more > 0) & (more <= rest) & (saved > 0)
        return more, torch.where(fits, saved / more.clamp_min(1e-300), 0.0)

    more, ratio = offers(torch.arange(len(choice)))
    # few units can still be upgraded: the loop looks at those only
    units = (ratio > 0).any(1).nonzero()[:, 0]
    more, ratio = more[units], ratio[units]
    while len(units):
        at, option = divmod(int(ratio.argmax()), losses.shape[1])
        if not ratio[at, option] > 0:
            break
        rest -= float(more[at, option])
        choice[units[at]] = option
        more[at : at + 1], ratio[at : at + 1] = offers(units[at : at + 1])
        ratio[more > rest] = 0.0
    return choice
