"""Spending bits: one price for all units, the convex hull of each, the rest by best bargain.

Pure numbers, no graph: ``losses`` and ``bits`` are fp64[units, options]; a unit takes exactly one option.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    losses, bits = losses.double().cpu(), bits.double().cpu()
    steps = _hull_steps(losses, bits)
    choice = torch.zeros(len(losses), dtype=torch.int64)
    spent = float(bits[:, 0].sum())
    order = torch.argsort(steps.ratio, descending=True, stable=True)
    running = spent + steps.cost[order].cumsum(0)
    bought = order[: int(torch.searchsorted(running, float(budget), right=True))]
    # the hull steps of a unit come in falling ratio, so the furthest one bought is the unit's choice
    choice.scatter_reduce_(0, steps.unit[bought], steps.option[bought], "amax")
    price = float(steps.ratio[order[len(bought)]]) if len(bought) < len(order) else 0.0
    choice = spend_rest(losses, bits, choice, budget)
    rows = torch.arange(len(losses))
    loss, used = float(losses[rows, choice].sum()), int(bits[rows, choice].sum())
    bound = float((losses + price * bits).min(1).values.sum()) - price * budget if len(losses) else 0.0
    return Allocation(choice, used, loss, price, max(0.0, loss - bound))


@dataclass(frozen=True, slots=True)
class _Steps:
    unit: torch.Tensor
    option: torch.Tensor
    cost: torch.Tensor
    ratio: torch.Tensor


def _hull_steps(losses: torch.Tensor, bits: torch.Tensor) -> _Steps:
    """All steps along the lower hulls of (bits, loss), hull by hull in rounds: from a vertex, the steepest descent."""
    units = torch.arange(len(losses))
    at = torch.zeros(len(losses), dtype=torch.int64)
    found: list[tuple[torch.Tensor, ...]] = []
    while len(units):
        here_loss, here_bits = losses[units].gather(1, at[:, None]), bits[units].gather(1, at[:, None])
        more = bits[units] - here_bits
        ratio = torch.where(more > 0, (here_loss - losses[units]) / more.clamp_min(1e-300), -torch.inf)
        best, to = ratio.max(1)
        going = best > 0
        units, at, best, more = units[going], to[going], best[going], more[going]
        found.append((units, at, more.gather(1, at[:, None])[:, 0], best))
    if not found:
        empty = torch.zeros(0, dtype=torch.int64)
        return _Steps(empty, empty, empty.double(), empty.double())
    return _Steps(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def spend_rest(losses: torch.Tensor, bits: torch.Tensor, choice: torch.Tensor, budget: int) -> torch.Tensor:
    """Upgrade single units from ``choice`` int64[units], best loss per bit first, while anything fits."""
    choice = choice.clone()
    rest = budget - float(bits.gather(1, choice[:, None]).sum())
    while len(choice):
        saved = losses.gather(1, choice[:, None]) - losses
        more = bits - bits.gather(1, choice[:, None])
        ratio = torch.where((more > 0) & (more <= rest) & (saved > 0), saved / more.clamp_min(1e-300), 0.0)
        best = int(ratio.argmax())
        unit, option = divmod(best, losses.shape[1])
        if not ratio[unit, option] > 0:
            break
        rest -= float(more[unit, option])
        choice[unit] = option
    return choice
