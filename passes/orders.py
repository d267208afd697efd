"""Orders of rows: which rows of a site are stored where, once every row has a width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mixcomp.passes.coupling import MIN_SEGMENT_ROWS, Absorption, Couplings, sort_block, taken
from mixcomp.profiles import profiles


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """One order int64[rows] of ``sites``; ``absorption`` says who reads it, None: rows are scattered."""

    sites: tuple[str, ...]
    rows: torch.Tensor
    absorption: Absorption | None


def find_orders(
    widths: Mapping[str, torch.Tensor],
    couplings: Couplings,
    min_segment_rows: int = MIN_SEGMENT_ROWS,
    shards: int = 1,
) -> list[Order]:
    """Orders of all sites that do not stay as they are; ``widths`` uint8[rows] or [rows, groups] of every open site."""
    found = []
    absorptions = taken(couplings, min_segment_rows, shards)
    absorbed = {name for absorption in absorptions for name in absorption.producers}
    free: list[tuple[tuple[str, ...], Absorption | None]] = [(a.producers, a) for a in absorptions]
    for names, absorption in free + [((name,), None) for name in widths if name not in absorbed]:
        own = [widths[name].cpu() for name in names]
        block = sort_block(absorption.block if absorption else len(own[0]), len(own[0]), shards)
        if all(bool((w == w[0]).all()) for w in own):
            continue
        order = sorted_order(own, block)
        if sum(segments(w[order]) for w in own) < sum(segments(w) for w in own):
            found.append(Order(names, order, absorption))
    return found


def segments(widths: torch.Tensor) -> int:
    """Number of runs of equal widths, uint8[rows] or [rows, groups]."""
    changed = widths[1:] != widths[:-1]
    return 1 + int((changed if widths.dim() == 1 else changed.any(1)).sum())


def sorted_order(widths: Sequence[torch.Tensor], block: int) -> torch.Tensor:
    """Stable order int64[rows] inside blocks, by the first site's widths, then by the second's, and so on.

    Runs are sorted up and down in turn (a snake), so that neighbours meet at the same width.
    """
    run = torch.arange(len(widths[0])) // block
    for own in widths:
        rank = profiles(own)
        upward, last = run % 2 == 0, int(rank.max())
        key = run * (last + 1) + torch.where(upward, rank, last - rank)
        run = torch.unique(key, return_inverse=True)[1]
    return torch.argsort(run, stable=True)
