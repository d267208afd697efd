"""The graph that Dynamo hands to a ``torch.compile`` backend, as a program."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from mixcomp.canonical import activation, owner
from mixcomp.format import Segment, SiteFormat
from mixcomp.program import META, Fact, Program, Site, WeightRef

PLAIN = "not compiled: call mixcomp.compile on the model before torch.compile"


def capture_dynamo(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """A program of a Dynamo graph: same inputs in the same order, lifted parameters included.

    Calls of ``mixcomp::mixed_linear`` are lowered sites, their tensors are in the table where ``example_inputs`` are
    real; plain linears are sites left alone.  ``module`` itself is not changed.

    Raises:
        FormatError: the constants of a ``mixed_linear`` call describe no format.
    """
    program = Program(module, ()).clone()
    graph = program.graph_module.graph
    for node in graph.nodes:
        node.meta.setdefault("val", node.meta.get("example_value"))
        if node.op == "call_method":
            node.op, node.target = "call_function", getattr(torch.Tensor, str(node.target))
        if isinstance(node.target, torch._ops.OpOverloadPacket):
            node.target = node.target.default
    given = dict(zip((n for n in graph.nodes if n.op == "placeholder"), example_inputs, strict=True))
    sites: dict[fx.Node, Site] = {}
    tensors: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        mixed = getattr(node.target, "_schema", None) is not None and node.target.name() == "mixcomp::mixed_linear"
        if not mixed and node.target is not torch.nn.functional.linear:
            continue
        operands = _operands(node)
        source = operands["codes" if mixed else "weight"]
        if source not in sites:
            name = _name(node, {s.name for s in sites.values()})
            sites[source] = _lowered(name, operands) if mixed else _plain(name, operands)
            real = {what: given.get(operand) for what, operand in operands.items() if mixed and what in _stored(sites[source])}
            tensors |= {f"{name}/{what}": t for what, t in real.items() if isinstance(t, torch.Tensor)}
        site = sites[source]
        sites[source] = _called(site, node)
        node.meta[META] = site.name
    program.graph_module.recompile()
    facts = frozenset({Fact.LOWERED}) if tensors else frozenset()
    return Program(program.graph_module, tuple(sites.values()), MappingProxyType(tensors), facts)
