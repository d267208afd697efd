"""reorder-features: gather the rows of one width into segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mixcomp.errors import ConfigError
from mixcomp.passes.coupling import MIN_SEGMENT_ROWS, analyse
from mixcomp.passes.orders import find_orders
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context, Pass

#: tensors this pass makes
ORDERS = ("row_order", "column_order", "absorbed")


@dataclass(frozen=True)
class ReorderFeatures(Pass):
    """Sort rows by width, and let consumers absorb the new order where they can.

    The graph stays as it is; what changes is which row is stored where::

        before                     after
        gate  4 8 4 8              row_order 2 0 3 1   stored 4 4 8 8    absorbed: no index is stored,
        up    8 4 4 8              row_order 2 0 3 1   stored 4 8 8 4    features come out in the new order
        down  columns 0 1 2 3      column_order 2 0 3 1                  and are read in it
        q     8 4 4 8              row_order 1 2 0 3   stored 4 4 8 8    scattered: row_index leads back

    Rows of one width (where rows mix widths: of the same ones) keep their order.  A site whose rows already lie in as
    few segments stays as it is.  Of two producers that share an order the first is sorted, the second inside the runs of
    the first.  Neighbouring runs (and neighbouring blocks, where an order may not leave a head) are sorted in opposite
    directions, so that their ends meet at the same width.

    Writes "<site>/row_order" int64[rows] and "<consumer>/column_order" int64[columns] where they are not the identity,
    and "<site>/absorbed" bool[] (true) at producers whose consumers take over the order.

    Options:
        min_segment_rows: an absorption is used if its mean segment has so many rows at any widths (``coupling.taken``).
        shards: rows are sorted inside this many equal slices, so that a tensor-parallel engine can cut the stored rows
            of a site where it cuts its features; sites whose rows it does not divide are sorted as a whole.
    """

    name: ClassVar[str] = "reorder-features"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ASSIGNED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.REORDERED})

    min_segment_rows: int = MIN_SEGMENT_ROWS
    shards: int = 1

    def __post_init__(self) -> None:
        for option in ("min_segment_rows", "shards"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{self.name}: {option} is {value!r}; it must be a whole number >= 1")

    def run(self, program: Program, context: Context) -> Program:
        tensors: dict[str, torch.Tensor] = {}
        widths = {site.name: program.tensor(site.name, "widths") for site in program.open_sites()}
        for order in find_orders(widths, analyse(program), self.min_segment_rows, self.shards):
            tensors.update({f"{name}/row_order": order.rows for name in order.sites})
            if order.absorption is not None:
                tensors.update({f"{name}/absorbed": torch.tensor(True) for name in order.sites})
                columns = order.absorption.columns(order.rows)
                tensors.update({f"{name}/column_order": columns for name in order.absorption.consumers})
        stale = frozenset(f"{site.name}/{what}" for site in program.sites for what in ORDERS)
        return program.with_tensors(tensors, drop=stale)
