"""Which orders of output features the rest of the graph can absorb.

If the rows of a linear are stored in another order, its output features come out in that order.  Nothing has to put
them back where they only meet elementwise operations until they become the columns of other linears, which can be
stored in the same order.  Rows and columns of all sites are the nodes of a graph, an edge says "must have the same
order", and a connected component is one permutation::

    rows gate --- rows up --- columns down     silu(gate x) * (up x) -> down: one free order for all three
    rows v --- columns o                       attention between them: free inside every head
    rows q                                     fixed by the rotary embedding: its features have to be scattered

``flows`` builds the graph; here are its components and the rule that says which of them are worth using.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from types import MappingProxyType

import networkx as nx
import torch

from mixcomp.format import WIDTHS
from mixcomp.passes.flows import Axis, Features
from mixcomp.program import Program, Site

#: rows that the mean segment of an absorbed order keeps whatever the widths; shorter ones leave tiles half empty
MIN_SEGMENT_ROWS = 16


@dataclass(frozen=True, slots=True)
class Absorption:
    """One permutation shared by the rows of ``producers`` and the columns of ``consumers``.

    Producers have ``rows`` rows each, consumers ``rows * repeats`` columns.  The permutation stays inside blocks of
    ``block`` rows (= rows where it is free), and column ``(k * repeats + r) * block + i`` reads row ``k * block + i``.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    block: int
    repeats: int
    rows: int

    def columns(self, order: torch.Tensor) -> torch.Tensor:
        """Column order int64[rows * repeats] of the consumers for a row order int64[rows] of the producers."""
        inside = order.view(-1, 1, self.block) % self.block
        heads = torch.arange(self.rows // self.block * self.repeats).view(-1, self.repeats, 1)
        return (heads * self.block + inside).flatten()


@dataclass(frozen=True, slots=True)
class Couplings:
    """Every open site is a producer of one absorption, or ``scattered`` says why it cannot be."""

    absorptions: tuple[Absorption, ...]
    scattered: Mapping[str, str]


def analyse(program: Program) -> Couplings:
    """Find every permutation that can be absorbed: a pure function of graph and sites."""
    features = Features(program)
    rank = {name: i for i, name in enumerate(features.sites)}
    absorptions: dict[str, Absorption] = {}
    reasons: dict[str, str] = {}
    for component in nx.connected_components(features.graph):
        producers, consumers = (
            sorted((axis.site for axis in component if axis.kind == kind), key=rank.__getitem__)
            for kind in ("rows", "columns")
        )
        found = _permutation(features, producers, consumers)
        if isinstance(found, Absorption):
            absorptions[producers[0]] = found
        else:
            reasons.update({name: _reason(features, Axis(name, "rows"), found) for name in producers})
    scattered = {site.name: reasons[site.name] for site in program.open_sites() if site.name in reasons}
    ordered = tuple(absorptions[name] for name in features.sites if name in absorptions)
    return Couplings(ordered, MappingProxyType(scattered))


def _permutation(
    features: Features, producers: list[str], consumers: list[str]
) -> Absorption | tuple[Axis | None, str]:
    """The permutation of a component, or the axis that fixes it and why (no axis: the component as a whole)."""
    for axis in [*(Axis(name, "rows") for name in producers), *(Axis(name, "columns") for name in consumers)]:
        if axis in features.fixed:
            return axis, features.fixed[axis]
    if not consumers:
        return None, "feeds no linear"
    rows = features.sites[producers[0]].rows
    block = gcd(*(features.block[name] for name in producers))
    blocks, repeats = zip(*(form for name in consumers for form in features.forms[name]), strict=True)
    if len(set(repeats)) > 1 or (repeats[0] > 1 and {*blocks} != {block}) or block == 1:
        return None, "is read in a way that no one order serves"
    return Absorption(tuple(producers), tuple(consumers), block, repeats[0], rows)


def _reason(features: Features, axis: Axis, found: tuple[Axis | None, str]) -> str:
    """Why ``axis`` cannot be permuted, told from its point of view."""
    culprit, reason = found
    if culprit is None or culprit == axis or axis in features.fixed:
        return features.fixed.get(axis, reason)
    link = "shares its order with" if culprit.kind == "rows" else "feeds"
    return f"{link} {culprit.site}, which {reason}"


def sort_block(block: int, rows: int, shards: int) -> int:
    """Rows that are sorted together: inside a block and, where ``shards`` divides the rows, inside one shard."""
    return gcd(block, rows // shards) if rows % shards == 0 else block


def segments_bound(blocks: int, producers: int) -> int:
    """Most segments that sorting in ``blocks`` blocks by the widths of ``producers`` sites leaves in any of them.

    The last producer is sorted inside the runs that the others make, at most one per block and combination of widths.
    Neighbouring runs are sorted in opposite directions: two that hold all widths meet at the same one, so a run brings
    at most ``len(WIDTHS) - 1`` new segments.
    """
    runs: int = blocks * len(WIDTHS) ** (producers - 1)
    return runs * (len(WIDTHS) - 1) + 1


def taken(couplings: Couplings, min_segment_rows: int = MIN_SEGMENT_ROWS, shards: int = 1) -> tuple[Absorption, ...]:
    """The absorptions that are worth it.

    A shared order, or one confined to heads, cuts a site into more segments than a plain sort.  It is used if the mean
    segment keeps ``min_segment_rows`` rows *whatever widths are assigned*: that follows from shapes alone, so stored
    bits can be counted before widths are known.
    """

    def keeps_segments(a: Absorption) -> bool:
        blocks = a.rows // sort_block(a.block, a.rows, shards)
        return a.rows >= min_segment_rows * segments_bound(blocks, len(a.producers))

    return tuple(a for a in couplings.absorptions if keeps_segments(a))


def needs_index(
    sites: Iterable[Site], couplings: Couplings, min_segment_rows: int = MIN_SEGMENT_ROWS, shards: int = 1
) -> dict[str, bool]:
    """Open site -> whether it stores a row index should its widths need sorting; same options as ``taken``."""
    free = {name for a in taken(couplings, min_segment_rows, shards) for name in a.producers}
    return {site.name: site.rows > 1 and site.name not in free for site in sites if site.open}
