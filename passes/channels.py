"""Which channels of activations can be scaled: divided where they are made, multiplied where they are read.

AWQ's and SmoothQuant's folding, found in the graph instead of in a list of architectures.  A factor that is put on one
channel passes through what is linear in it::

    weight of a norm --- columns q, k, v      w n  ->  (w / s) n
    rows up ------------ columns down         silu(gate x) * (up x)
    rows v ------------- columns o            averages of values; heads that share values share factors
    rows gate            none: silu stands between

Anything not known to let a factor through ends the search there, and so does a reader that cannot take it: an unknown
operation costs a transform, never a wrong result.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mixcomp.passes import axes
from mixcomp.passes.axes import Parts, Sizes
from mixcomp.passes.flows import COPIES, Flow, Walk
from mixcomp.program import META, Program

aten = torch.ops.aten

#: f(s x) = s f(x) for s > 0, in the first argument; others may be anything
_HOMOGENEOUS = frozenset({
    aten.div.Tensor, aten.div.Scalar, aten.mul.Scalar, aten.neg.default, aten.relu.default, aten.leaky_relu.default,
})  # fmt: skip
_PRODUCTS = frozenset({aten.mul.Tensor, operator.mul})
_SUMS = frozenset({aten.add.Tensor, aten.add.Scalar})
#: norms as one operation -> where weight and bias stand
_NORMS: Mapping[object, tuple[int, ...]] = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}


@dataclass(frozen=True, slots=True)
class Vector:
    """A norm's weight or bias as it is used: parameter ``path`` plus ``constant`` (1 in Gemma's norms)."""

    path: str
    constant: float = 0.0


@dataclass(frozen=True, slots=True)
class Channels:
    """``count`` channels whose scale is free.

    They are made by the rows of ``site`` or by the ``norm``, weight first, and read by the columns of ``readers``: by
    column ``(k * repeats + r) * block + i`` channel ``k * block + i``, for all r.
    """

    count: int
    readers: tuple[str, ...]
    block: int
    repeats: int
    site: str | None = None
    norm: tuple[Vector, ...] = ()

    def columns(self) -> torch.Tensor:
        """The channel that every column reads, int64[count * repeats]."""
        found = torch.arange(self.count).view(-1, 1, self.block)
        return found.expand(-1, self.repeats, -1).flatten()


def scalable(program: Program) -> tuple[Channels, ...]:
    """All channels that can be scaled: a pure function of graph and sites.  A reader is in one entry at most."""
    found = _Scalable(program)
    return tuple(c for source in found.readers if (c := found.channels(source)) is not None)


class _Scalable(Walk):
    """``readers[source]``: sites that read a flow, in graph order; ``forms[site]``: (source, block, repeats) of its calls.

    A flow's ``site`` is here the name of a site or the path of a norm's weight.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.module = program.graph_module
        self.vectors: dict[fx.Node, Vector] = {}
        self.norms: dict[str, tuple[Vector, ...]] = {}
        self.counts: dict[str, int] = {}
        self.readers: dict[str, dict[str, None]] = {}
        self.forms: dict[str, set[tuple[str, int, int] | None]] = {}
        self.stuck: set[str] = set()
        for node in self.module.graph.nodes:
            if not self._vector(node):
                self.visit(node)

    def channels(self, source: str) -> Channels | None:
        """The entry of a source, None where something holds it."""
        readers = tuple(self.readers[source])
        forms = {form for name in readers for form in self.forms[name]}
        if source in self.stuck or len(forms) != 1 or None in forms:
            return None
        ((_, block, repeats),) = forms  # type: ignore[misc]
        site = None if source in self.norms else source
        return Channels(self.counts[source], readers, block, repeats, site, self.norms.get(source, ()))

    def _vector(self, node: fx.Node) -> bool:
        """Follow a parameter until it meets an activation; whether the node was one of its."""
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            held = getattr(self.module.get_submodule(owner), name)
            if isinstance(held, nn.Parameter) and held.dim() == 1 and held.is_floating_point():
                self.vectors[node] = Vector(str(node.target))
            return True
        own = [n for n in node.all_input_nodes if n in self.vectors]
        if not own:
            return False
        vector, *_ = node.args
        if node.target in COPIES and vector in own:
            self.vectors[node] = self.vectors[vector]  # type: ignore[index]
        elif node.target in _SUMS and (constant := _constant(node, own)) is not None:
            before = self.vectors[own[0]]
            self.vectors[node] = Vector(before.path, before.constant + constant)
        elif node.target in _PRODUCTS or node.target in _NORMS:
            return self._norm(node, own)
        else:
            self.stuck.update(self.vectors[n].path for n in own)
            return False
        return True

    def _norm(self, node: fx.Node, own: list[fx.Node]) -> bool:
        """A flow begins where a norm's weight meets what it normalized."""
        places = _NORMS.get(node.target)
        found: list[Any] = [node.args[i] for i in places if i < len(node.args)] if places else own
        norm = tuple(self.vectors[n] for n in found if n in self.vectors)
        shape = node.meta["val"].shape
        carried = [n for n in node.all_input_nodes if n in self.flows]
        known = norm and len(norm) == len([n for n in found if n is not None]) == len(own)
        sized = len(shape) > 1 and all(n.meta["val"].shape == shape[-1:] for n in own)
        if not known or (len(norm) > 1 and places is None) or not sized or carried:
            self.stuck.update(self.vectors[n].path for n in own)
            return False
        source = norm[0].path
        if self.norms.setdefault(source, norm) != norm:
            self.stuck.add(source)
        self.counts[source] = int(shape[-1])
        self.flows[node] = Flow(source, axes.output_layout(axes.sizes_of(shape)))
        return True

    def _linear(self, node: fx.Node, carried: list[fx.Node], sizes: Sizes) -> None:
        site, source = self.sites[node.meta[META]], node.args[0]
        self._fix([n for n in carried if n is not source], node)
        form = None
        if source in carried:
            flow = self.flows[source]  # type: ignore[index]
            self.readers.setdefault(flow.site, {})[site.name] = None
            form = axes.column_blocks(flow.layout, self.counts[flow.site])
        known = form is not None and site.open
        self.forms.setdefault(site.name, set()).add((flow.site, *form) if known and form else None)
        if site.open and site.bias is None:
            self.counts[site.name] = site.rows
            self.flows[node] = Flow(site.name, axes.output_layout(sizes))
        else:
            self.stuck.add(site.name)

    def _elementwise(self, node: fx.Node, carried: list[fx.Node], sizes: Sizes) -> None:
        """A product of two flows would take the factor twice."""
        source = carried[0]
        linear = node.target in _PRODUCTS or (node.target in _HOMOGENEOUS and node.args[0] is source)
        if not linear or len(carried) > 1 or list(node.args).count(source) > 1:
            self._fix(carried, node)
            return
        flow = self.flows[source]
        self._carry(node, Flow(flow.site, axes.broadcast(flow.layout, sizes)), ())

    def _carry(self, node: fx.Node, flow: Flow, pinned: Iterable[Parts]) -> None:
        self.flows[node] = flow

    def _fix(self, carried: Iterable[fx.Node], node: fx.Node) -> None:
        self.stuck.update(self.flows[source].site for source in carried)


def _constant(node: fx.Node, own: list[fx.Node]) -> float | None:
    """The number that a sum adds to its vector; None if it adds anything else."""
    numbers = [a for a in node.args if isinstance(a, (int, float))]
    return float(numbers[0]) if len(own) == len(numbers) == 1 and len(node.args) == 2 and not node.kwargs else None
