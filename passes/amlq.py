"""AMLQ's mathematics: one option per layer out of a table, so that the worst layer is as good as it can be.

(Ou et al., COLM 2024.  No text or code of it could be had: this follows its reviews, so it is AMLQ-*style*.)  An option
is a group size and a mix of widths along the column groups, the hottest groups wide.  Pure numbers, no graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import torch

from mixcomp.errors import BudgetError
from mixcomp.passes.rounding import round_range

#: (width, share of the column groups), hottest groups first; the paper's example is 30 % 4, 30 % 3, 40 % 2 bits
Mix = tuple[tuple[int, float], ...]
MIXES: tuple[Mix, ...] = (
    ((2, 1.0),), ((3, 0.1), (2, 0.9)), ((3, 0.3), (2, 0.7)), ((4, 0.3), (3, 0.3), (2, 0.4)),
    ((3, 1.0),), ((4, 0.1), (3, 0.9)), ((4, 0.3), (3, 0.7)), ((5, 0.1), (4, 0.4), (3, 0.5)),
    ((4, 1.0),), ((5, 0.1), (4, 0.9)), ((6, 0.1), (5, 0.2), (4, 0.7)),
    ((5, 1.0),), ((6, 0.3), (5, 0.7)), ((6, 1.0),), ((8, 1.0),),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Option:
    """``widths`` of the column groups in their original order, ``group`` columns each; ``error`` float[rows, columns]."""

    group: int
    widths: tuple[int, ...]
    error: torch.Tensor


def mix_widths(energy: torch.Tensor, group: int, mix: Mix) -> tuple[int, ...]:
    """Width of every column group: the mix laid over the groups by falling mean energy, ties in their order.

    energy float[columns], the diagonal of S.  Borders between widths are rounded to whole groups, halves up.
    """
    whole = len(energy) // group * group
    heat = torch.cat((energy[:whole].view(-1, group).double().mean(1), energy[whole:].double().mean(0, True)))
    heat = heat[: -(-len(energy) // group)]  # without a short last group there is no mean of it
    order = torch.argsort(heat, descending=True, stable=True).tolist()
    shares = accumulate(Fraction(str(share)) for _, share in mix)
    borders = [int(len(order) * share + Fraction(1, 2)) for share in shares]
    out = [mix[-1][0]] * len(order)
    for (width, _), start, stop in zip(mix, (0, *borders), borders, strict=False):
        for block in order[start:stop]:
            out[block] = width
    return tuple(out)


def options(
    weight: torch.Tensor, energy: torch.Tensor, groups: Sequence[int], mixes: Sequence[Mix]
) -> Iterator[Option]:
    """Every different option of a layer, group size by group size; each block is rounded once per width."""
    for group in groups:
        errors: dict[int, torch.Tensor] = {}
        for widths in dict.fromkeys(mix_widths(energy, group, mix) for mix in mixes):
            for width in set(widths) - set(errors):
                errors[width] = weight - round_range(weight, width, group)
            if len(set(widths)) == 1:
                yield Option(group, widths, errors[widths[0]])
                continue
            parts = {width: error.split(group, 1) for width, error in errors.items()}
            yield Option(group, widths, torch.cat([parts[width][i] for i, width in enumerate(widths)], 1))


def relative_error(error: torch.Tensor, weight: torch.Tensor, sigma: torch.Tensor) -> float:
    """``tr(E S E^T) / tr(W S W^T)``, the share of the output's energy that rounding disturbs; 0 where there is none."""
    whole = float((weight @ sigma * weight).sum(dtype=torch.float64))
    return float((error @ sigma * error).sum(dtype=torch.float64)) / whole if whole > 0 else 0.0


def least_maximum(errors: torch.Tensor, bits: torch.Tensor, budget: int) -> torch.Tensor:
    """The choice whose largest error is least, int64[layers]: AMLQ's bisection on a threshold, made exact.

    With a threshold every layer takes the cheapest option that keeps it (the most accurate of equals); the sum of bits
    falls as the threshold rises, so the least feasible one is found by bisection over the errors that occur.

    Args:
        errors: fp64[layers, options].
        bits: int64[layers, options].
        budget: most bits of all layers together.

    Raises:
        BudgetError: not even the cheapest options fit.
    """
    if int(bits.amin(1).sum()) > budget:
        raise BudgetError(f"a budget of {budget} bits does not hold the cheapest options; raise it or widen the choice")
    levels = errors.unique()
    low, high = 0, len(levels) - 1  # the largest level allows every option
    while low < high:
        middle = (low + high) // 2
        fits = float(_costs(errors, bits, levels[middle]).amin(1).sum()) <= budget
        low, high = (low, middle) if fits else (middle + 1, high)
    costs = _costs(errors, bits, levels[low])
    return torch.where(costs == costs.amin(1, keepdim=True), errors, torch.inf).argmin(1)


def _costs(errors: torch.Tensor, bits: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Bits of the options within the threshold, infinitely many of the others."""
    return torch.where(errors <= threshold, bits.double(), torch.inf)
