"""Rows that mix widths along the columns: from a width per row and group to segments, and from stored columns back."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from mixcomp.format import GROUP, Scales, Segment, SiteFormat, runs

if TYPE_CHECKING:
    from collections.abc import Iterator


def profiles(widths: torch.Tensor) -> torch.Tensor:
    """Which rows have equal widths: uint8[rows] or [rows, groups] -> int64[rows], 0, 1, ... in the widths' order."""
    dim = None if widths.dim() == 1 else 0  # by rows, torch compares bytes one by one: a hundred times slower
    kinds: torch.Tensor = torch.unique(widths, dim=dim, return_inverse=True)[1]
    return kinds


def group_sizes(columns: int, group: int) -> torch.Tensor:
    """Columns of every group, int64[groups]; the last one may be short."""
    starts = torch.arange(0, columns, group)
    return (columns - starts).clamp_max(group)


def payload_bits(widths: torch.Tensor, columns: int, group: int = GROUP) -> int:
    """Bits of the codes of real weights: widths uint8[rows] or [rows, groups]."""
    if widths.dim() == 1:
        return columns * int(widths.sum(dtype=torch.int64))
    return int((widths.long().cpu() * group_sizes(columns, group)).sum())


def layout(widths: torch.Tensor, columns: int, group: int = GROUP) -> tuple[tuple[Segment, ...], torch.Tensor | None]:
    """Segments of rows in stored order, and where the groups of their profiles come from.

    Args:
        widths: uint8[rows], or [rows, groups] in original group order.
        columns: of the weight.
        group: columns of a group.

    Returns:
        The segments, and int64[orders, groups] (stored group -> original group) or None where no row mixes widths.
    """
    if widths.dim() == 1:
        return runs(widths.tolist()), None
    widths, sizes = widths.cpu(), group_sizes(columns, group)
    kinds, counts = torch.unique_consecutive(profiles(widths), return_counts=True)
    numbers: dict[int, int] = {}
    index: list[torch.Tensor] = []
    segments: list[Segment] = []
    first = 0
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        row = widths[first]
        held = sorted(set(row.tolist()))
        first += count
        if len(held) == 1:
            segments.append(Segment(count, held[0]))
            continue
        if kind not in numbers:
            numbers[kind] = len(index)
            index.append(torch.argsort(row, stable=True))
        profile = tuple((width, int(sizes[row == width].sum())) for width in held)
        segments.append(Segment(count, held[-1], profile, numbers[kind]))
    return tuple(segments), torch.stack(index) if index else None


def site_format(
    widths: torch.Tensor,
    columns: int,
    *,
    scatter: bool = False,
    group: int = GROUP,
    scales: Scales = Scales.TWO_LEVEL,
) -> SiteFormat:
    """The format of rows of these widths, uint8[rows] or [rows, groups]; its bits do not depend on the rows' order."""
    segments, _ = layout(widths, columns, group)
    return SiteFormat(len(widths), columns, segments, scatter, 0, group, scales)


@lru_cache(maxsize=4096)
def shared_format(rows: int, columns: int, widths: tuple[int, ...], group: int, scales: Scales) -> SiteFormat:
    """The format of rows that all have these widths of groups."""
    (segment,), _ = layout(torch.tensor([widths], dtype=torch.uint8), columns, group)
    return SiteFormat(rows, columns, (replace(segment, rows=rows),), group=group, scales=scales)


def stored_columns(fmt: SiteFormat, order: torch.Tensor) -> torch.Tensor:
    """Original column of every stored one, int64[padded columns], for groups stored in ``order`` int[groups]."""
    offsets = torch.arange(fmt.group, device=order.device)
    columns = (order.long()[:, None] * fmt.group + offsets).flatten()
    # the last group may be short, wherever it is stored; a mask would have to wait for the device
    return columns[(columns >= fmt.padded_columns).byte().argsort(stable=True)[: fmt.padded_columns]]


def group_widths(fmt: SiteFormat, group_index: torch.Tensor | None, device: torch.device | str) -> torch.Tensor:
    """Width of every row and group, uint8[rows, groups]: rows in stored order, groups in original order."""
    out = torch.empty(fmt.rows, fmt.groups, dtype=torch.uint8, device=device)
    for rows, segment, order in ordered(fmt, group_index):
        out[rows] = segment.width if order is None else profile_widths(fmt, segment, order)
    return out


def profile_widths(fmt: SiteFormat, segment: Segment, order: torch.Tensor) -> torch.Tensor:
    """Width of every group of a segment that mixes widths, uint8[groups] in original order."""
    out = torch.empty(fmt.groups, dtype=torch.uint8, device=order.device)
    first = 0
    for width, groups in fmt.group_runs(segment):
        out.index_fill_(0, order[first : first + groups], width)
        first += groups
    return out


def ordered(fmt: SiteFormat, group_index: torch.Tensor | None) -> Iterator[tuple[slice, Segment, torch.Tensor | None]]:
    """Every segment with its stored rows and, where it mixes widths, its order of groups int64[groups]."""
    for rows, segment in fmt.row_ranges():
        mixes = segment.profile and group_index is not None
        yield rows, segment, group_index[segment.order].long() if mixes else None  # type: ignore[index]
