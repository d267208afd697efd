"""The graph that Dynamo hands to a ``torch.compile`` backend, as a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from mixcomp.canonical import activation, owner
from mixcomp.format import GROUP, SiteFormat, from_constants
from mixcomp.ops import LINEAR
from mixcomp.program import META, Fact, Program, Site, WeightRef
from mixcomp.snapshot import is_dead

PLAIN = "not compiled: call mixcomp.compile on the model before torch.compile"


def capture_dynamo(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """A program of a Dynamo graph: the same inputs in the same order, lifted parameters included.

    Calls of ``mixcomp::mixed_linear`` are lowered sites, with their tensors in the table (not fragments, the form that a
    GPU holds: they are not what is stored); plain linears are sites left alone.  ``module`` itself is not changed.

    Before::

        x = l_x_.view(4, -1)
        y = torch.ops.mixcomp.mixed_linear(x, l_self_..._codes_, ..., [1920, 4, 128, 8], 2048)

    After, the same as functional calls, and a site ``layers.0.q_proj`` of the format {4x1920 8x128}.

    Raises:
        FormatError: the constants of a ``mixed_linear`` call describe no format.
    """
    program = Program(module, ()).clone()
    graph = program.graph_module.graph
    given = dict(zip((n for n in graph.nodes if n.op == "placeholder"), example_inputs, strict=True))
    sites: dict[fx.Node, Site] = {}
    tensors: dict[str, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node.target is torch._C._log_api_usage_once:  # torch counts its own API calls; no business of a graph
            graph.erase_node(node)
            continue
        _make_functional(node)
        linear = _operands(node)
        if linear is None:
            continue
        source = linear["codes" if "codes" in linear else "weight"]
        if source in sites:
            sites[source] = replace(sites[source], calls=(*sites[source].calls, node.name))
        else:
            sites[source] = _site(node, linear, {s.name for s in sites.values()})
            tensors |= _stored(sites[source], linear, given)
        node.meta[META] = sites[source].name
        if "weight" in linear:
            node.target, node.kwargs = LINEAR, {}
            node.args = (linear["x"], linear["weight"], linear["bias"], False)
    for node in reversed(graph.nodes):
        if is_dead(node):  # Dynamo leaves some
            graph.erase_node(node)
    program.graph_module.recompile()
    facts = frozenset({Fact.LOWERED} if any(s.format for s in sites.values()) else ())
    return Program(program.graph_module, tuple(sites.values()), MappingProxyType(tensors), facts)


def _make_functional(node: fx.Node) -> None:
    """Values under ``val``, methods as functions, one overload instead of a packet."""
    node.meta.setdefault("val", node.meta.get("example_value"))
    if node.op == "call_method":
        node.op, node.target = "call_function", getattr(torch.Tensor, str(node.target))
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        node.target = node.target.default


def _operands(node: fx.Node) -> dict[str, Any] | None:
    """Operands of a linear by name: with ``codes`` of a lowered one, with ``weight`` of a plain one."""
    names: Sequence[str]
    if node.target is torch.nn.functional.linear:
        names = ("input", "weight", "bias")
    elif isinstance(node.target, torch._ops.OpOverload) and node.target.name() == "mixcomp::mixed_linear":
        names = [a.name for a in node.target._schema.arguments]
    else:
        return None
    found = {**dict.fromkeys(names), **dict(zip(names, node.args, strict=False)), **node.kwargs}
    found["x"] = found.pop("input", None) or found.get("x")
    return found


def _site(node: fx.Node, linear: dict[str, Any], taken: set[str]) -> Site:
    fmt = _format(linear) if "codes" in linear else None
    name = owner(node).removeprefix("L['self']").removeprefix(".") or node.name
    if name in taken:
        name = f"{name}.{node.name}"
    shape = (fmt.rows, fmt.columns) if fmt else tuple(linear["weight"].meta["val"].shape)
    held = linear["x"] if fmt else linear["weight"]
    reference = WeightRef(f"{name}.weight", (), (shape[0], shape[1]), held.meta["val"].dtype)
    bias = None if linear["bias"] is None else f"{name}.bias"
    reason = None if fmt else PLAIN
    kind = linear.get("activations") or "native"
    return Site(name, (node.name,), reference, bias, activation(linear["x"]).name, True, reason, fmt, kind)


def _format(linear: dict[str, Any]) -> SiteFormat:
    rank = 0 if linear["branch_a"] is None else int(linear["branch_a"].meta["val"].shape[1])
    scatter, form = linear["row_index"] is not None, (linear["group"] or GROUP, linear["scale_kind"] or 0)
    return from_constants(linear["segments"], linear["columns"], scatter, rank, *form)


def _stored(site: Site, linear: dict[str, Any], given: dict[fx.Node, Any]) -> dict[str, torch.Tensor]:
    wanted = site.format.tensors() if site.format else {}
    found = {name: given.get(linear[name]) for name in wanted}
    held = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    if "codes" in held and held["codes"].dtype is torch.int32:
        del held["codes"], held["scales"]
    return {f"{site.name}/{name}": tensor for name, tensor in held.items()}
