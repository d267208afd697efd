"""Following the output features of every site through the graph, operation by operation.

A *flow* is a tensor whose entries move along when the rows of a site are permuted.  Operations do one of four things:
carry a flow on, couple two flows (they must be permuted alike), confine the order of a flow to blocks, or fix it.
Anything not known to do less fixes it, so an unknown operation costs a scatter, never a wrong result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import gcd

import networkx as nx
import torch
from torch import fx

from mixcomp.ops import LINEAR
from mixcomp.passes import axes
from mixcomp.passes.axes import Layout, Parts, Sizes
from mixcomp.program import META, Program, Site

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Axis:
    """The ``"rows"`` or the ``"columns"`` of a site."""

    site: str
    kind: str


@dataclass(frozen=True, slots=True)
class Flow:
    """The output features of ``site``, lying in a tensor as ``layout`` says."""

    site: str
    layout: Layout


#: layout of an operation's result from (node, layout of its first argument, sizes before, sizes after);
#: None where it does not commute with a permutation of features
Move = Callable[[fx.Node, Layout, Sizes, Sizes], Layout | None]


def _reshaped(_node: fx.Node, layout: Layout, _before: Sizes, after: Sizes) -> Layout | None:
    return axes.reshape(layout, after)


def _same(_node: fx.Node, layout: Layout, _before: Sizes, _after: Sizes) -> Layout | None:
    return layout


def _dropped(node: fx.Node, layout: Layout, _before: Sizes, _after: Sizes) -> Layout | None:
    return None if node.args[2] else layout  # dropout in training draws its mask by position


def _expanded(_node: fx.Node, layout: Layout, _before: Sizes, after: Sizes) -> Layout | None:
    return axes.broadcast(layout, after)


def _sliced(_node: fx.Node, layout: Layout, before: Sizes, after: Sizes) -> Layout | None:
    return axes.resize(layout, before, after)


def _permuted(node: fx.Node, layout: Layout, _before: Sizes, _after: Sizes) -> Layout | None:
    return tuple(layout[i] for i in node.args[1])  # type: ignore[index, union-attr]


def _transposed(node: fx.Node, layout: Layout, _before: Sizes, _after: Sizes) -> Layout | None:
    out, (_, first, second) = list(layout), node.args
    out[first], out[second] = out[second], out[first]  # type: ignore[index]
    return tuple(out)


_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
COPIES = (
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
)
_MOVES: Mapping[object, Move] = {
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(COPIES, _same),
    aten.dropout.default: _dropped,
    aten.expand.default: _expanded,
    aten.slice.Tensor: _sliced,
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
}

#: weighted sums ``p @ v`` and where v stands among the arguments
_AVERAGES: Mapping[object, int] = {
    aten.scaled_dot_product_attention.default: 2,
    aten.matmul.default: 1,
    aten.bmm.default: 1,
}

#: operations that read the shape or type of a tensor, not its values
_METADATA = frozenset({aten.sym_size.int, aten._assert_tensor_metadata.default})

#: elementwise operations that torch does not tag as such
_ALSO_ELEMENTWISE = frozenset({aten.hardswish.default, aten.log_sigmoid.default, aten.where.ScalarOther})


def _is_elementwise(target: object) -> bool:
    """Whether result entry i depends on entry i of the (broadcast) operands alone, and on no random number."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags or target in _ALSO_ELEMENTWISE


def _writes(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def value_sizes(node: fx.Node) -> Sizes | None:
    """Sizes of a tensor; None for numbers and tuples."""
    value = node.meta.get("val")
    return axes.sizes_of(value.shape) if isinstance(value, torch.Tensor) else None


class Walk(ABC):
    """One walk over a graph that follows flows, ``flows[node]``; what they are for is up to the subclass."""

    def __init__(self, program: Program) -> None:
        self.sites = {site.name: site for site in program.sites}
        self.flows: dict[fx.Node, Flow] = {}

    def visit(self, node: fx.Node) -> None:
        """Take one node; call it for all of them, in order."""
        target, sizes = node.target, value_sizes(node)
        carried = [n for n in node.all_input_nodes if n in self.flows]
        if target is LINEAR and node.meta.get(META) in self.sites and sizes is not None:
            self._linear(node, carried, sizes)
        elif not carried or target in _METADATA:
            return
        elif sizes is None or _writes(target):
            self._fix(carried, node)
        elif target in _MOVES:
            self._move(node, _MOVES[target], sizes)
        elif target in _AVERAGES:
            self._average(node, carried, _AVERAGES[target], sizes)
        else:
            self._elementwise(node, carried, sizes)

    @abstractmethod
    def _linear(self, node: fx.Node, carried: list[fx.Node], sizes: Sizes) -> None:
        """A call of a site: flows end in its columns, one begins with its rows."""

    @abstractmethod
    def _elementwise(self, node: fx.Node, carried: list[fx.Node], sizes: Sizes) -> None:
        """Any other operation on flows, elementwise or not."""

    @abstractmethod
    def _carry(self, node: fx.Node, flow: Flow, pinned: Iterable[Parts]) -> None:
        """``node`` carries ``flow`` on; dimensions of ``pinned`` meet a tensor that varies along them."""

    @abstractmethod
    def _fix(self, carried: Iterable[fx.Node], node: fx.Node) -> None:
        """The flows of ``carried`` end at ``node``, which does not let them through."""

    def _move(self, node: fx.Node, rule: Move, sizes: Sizes) -> None:
        source = node.args[0]
        if not isinstance(source, fx.Node) or source not in self.flows:
            return  # of other arguments only the dtype is used
        flow, before = self.flows[source], value_sizes(source) or ()
        layout = rule(node, flow.layout, before, sizes)
        if layout is None:
            self._fix([source], node)
        else:
            self.flows[node] = Flow(flow.site, layout)

    def _average(self, node: fx.Node, carried: list[fx.Node], position: int, sizes: Sizes) -> None:
        """The last dimension of v passes; the leading ones stay in place, because the weights have them too."""
        others = [*node.args[:position], *node.args[position + 1 :], *node.kwargs.values()]
        self._fix([n for n in carried if n in others], node)
        value = node.args[position]
        if not isinstance(value, fx.Node) or value not in self.flows:
            return
        flow = self.flows[value]
        layout = axes.weighted_sum(flow.layout, sizes)
        if layout is None:
            self._fix([value], node)
        else:
            self._carry(node, Flow(flow.site, layout), flow.layout[:-2])


class Features(Walk):
    """What one walk over the graph finds out.

    ``graph``: rows and columns of sites, an edge where two have to share an order.  ``block[site]``: the order of its
    rows may only change inside blocks of so many.  ``forms[site]``: how its columns follow the rows that feed them
    (see ``axes.column_blocks``), one entry per way.  ``fixed[axis]``: why it cannot be permuted.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.graph: nx.Graph[Axis] = nx.Graph()
        self.block = {site.name: site.rows for site in program.sites}
        self.forms: dict[str, set[tuple[int, int]]] = {}
        self.fixed: dict[Axis, str] = {}
        for site in program.sites:
            self.graph.add_node(Axis(site.name, "rows"))
            if not site.open:
                self._fix_site(site, f"is not compiled ({site.reason or 'out of scope'})")
            elif site.rows == 1:
                self.fixed[Axis(site.name, "rows")] = "has one output feature"
        for node in program.graph_module.graph.nodes:
            self.visit(node)

    def _fix_site(self, site: Site, reason: str) -> None:
        self.fixed[Axis(site.name, "rows")] = self.fixed[Axis(site.name, "columns")] = reason

    def _linear(self, node: fx.Node, carried: list[fx.Node], sizes: Sizes) -> None:
        """One flow ends in the columns, another begins with the rows."""
        site, source = self.sites[node.meta[META]], node.args[0]
        self._fix([n for n in carried if n is not source], node)
        columns = Axis(site.name, "columns")
        if source in carried:
            self._consume(columns, self.flows[source], node)  # type: ignore[index]
        else:
            self.fixed.setdefault(columns, f"also reads other features (node {node.name})")
        self.flows[node] = Flow(site.name, axes.output_layout(sizes))

    def _consume(self, columns: Axis, flow: Flow, node: fx.Node) -> None:
        self.graph.add_edge(Axis(flow.site, "rows"), columns)
        form = axes.column_blocks(flow.layout, self.sites[flow.site].rows)
        if form is None:
            self._fix_axis(Axis(flow.site, "rows"), node)
            return
        self._confine(flow.site, form[0], node)
        self.forms.setdefault(columns.site, set()).add(form)

    def _elementwise(self, node: fx.Node, carried: list[fx.Node], sizes: Sizes) -> None:
        if not _is_elementwise(node.target):
            self._fix(carried, node)
            return
        self._couple(node, carried, sizes)

    def _couple(self, node: fx.Node, carried: list[fx.Node], sizes: Sizes) -> None:
        """Flows must be laid out alike; an operand without features pins the dimensions it varies along."""
        layouts = {axes.broadcast(self.flows[n].layout, sizes) for n in carried}
        if len(layouts) > 1:
            self._fix(carried, node)
            return
        (layout,) = layouts
        first, *rest = (Axis(self.flows[n].site, "rows") for n in carried)
        self.graph.add_edges_from((first, other) for other in rest)
        others = [value_sizes(n) or () for n in node.all_input_nodes if n not in self.flows]
        pinned = [
            parts
            for other in others
            for parts, size in zip(reversed(layout), reversed(other), strict=False)
            if size != 1
        ]
        self._carry(node, Flow(first.site, layout), pinned)

    def _carry(self, node: fx.Node, flow: Flow, pinned: Iterable[Parts]) -> None:
        """``node`` carries ``flow`` on, with the digits of ``pinned`` dimensions kept in place."""
        for part in (part for parts in pinned for part in parts):
            if part.stride:
                self._confine(flow.site, part.stride, node)
        if self.block[flow.site] > 1:
            self.flows[node] = flow

    def _confine(self, site: str, block: int, node: fx.Node) -> None:
        self.block[site] = gcd(self.block[site], block)
        if self.block[site] == 1:
            self._fix_axis(Axis(site, "rows"), node)

    def _fix(self, carried: Iterable[fx.Node], node: fx.Node) -> None:
        for source in carried:
            self._fix_axis(Axis(self.flows[source].site, "rows"), node)

    def _fix_axis(self, axis: Axis, node: fx.Node) -> None:
        where = "the model's output" if node.op == "output" else f"{node.target} (node {node.name})"
        self.fixed.setdefault(axis, f"has its order fixed by {where}")
