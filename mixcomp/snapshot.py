"""What a program looked like before a pass ran, in a form that a careless pass cannot change afterwards.

Passes share parameters and tables with their input, so comparing two programs says nothing about writes in place; a
snapshot keeps addresses, version counters and digests instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from mixcomp.errors import PassError
from mixcomp.ops import LINEAR
from mixcomp.printer import Text, module_tensors, tensor_digest
from mixcomp.program import Program

#: what a broken law says: a sentence, and the node to show if there is one
Finding = tuple[str, fx.Node | None]
Findings = Iterator[Finding]


@dataclass(frozen=True, slots=True)
class Identity:
    """Which memory a tensor is, what it looks like, and (at level 2) what it holds."""

    storage: int
    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    version: int | None
    digest: str | None

    @classmethod
    def of(cls, tensor: torch.Tensor, *, whole: bool) -> Identity:
        return cls(
            storage=tensor.untyped_storage().data_ptr(),
            address=tensor.data_ptr(),
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            dtype=tensor.dtype,
            version=None if tensor.is_inference() else tensor._version,
            digest=tensor_digest(tensor, whole=True) if whole and not tensor.is_meta else None,
        )


@dataclass(frozen=True)
class Snapshot:
    """Signature, parameters and table of a program at one moment.

    ``parameters`` are the graph module's parameters and buffers by path; ``readers`` names the sites that take a
    path as weight or bias.
    """

    signature: tuple[str, ...]
    parameters: Mapping[str, Identity]
    tensors: Mapping[str, Identity]
    readers: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, program: Program, level: int = 1) -> Snapshot:
        whole = level >= 2
        held = module_tensors(program.graph_module)
        return cls(
            signature(program),
            {k: Identity.of(t, whole=whole) for k, t in held.items()},
            {k: Identity.of(t, whole=whole) for k, t in program.tensors.items()},
            _readers(program),
        )


@dataclass(frozen=True)
class Case:
    """What a check may look at."""

    program: Program
    before: Snapshot | None = None
    level: int = 1

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.program.graph_module.graph.nodes}

    @cached_property
    def held(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the graph module by path."""
        return module_tensors(self.program.graph_module)

    @cached_property
    def site_names(self) -> frozenset[str]:
        return frozenset(s.name for s in self.program.sites)

    def before_pass(self) -> Snapshot:
        """``before``, for checks that run only where there is one."""
        if self.before is None:
            raise PassError("this check compares with the program before the pass, and there is none")
        return self.before

    def parameter_of(self, source: Any) -> torch.Tensor | None:
        """The module's tensor behind an operand, or None if the operand does not come from the module."""
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return None
        return self.held.get(str(source.target))

    def linears(self) -> Iterator[fx.Node]:
        """Nodes that compute a site: canonical linears and their lowered form."""
        return (n for n in self.nodes.values() if is_linear(n) or is_mixed(n))

    def fresh(self, key: str) -> bool:
        """Whether a tensor of the table is new since ``before``; old ones were checked when they were new."""
        if self.before is None or key not in self.before.tensors:
            return True
        old = self.before.tensors[key]
        return Identity.of(self.program.tensors[key], whole=old.digest is not None) != old


def is_linear(node: fx.Node) -> bool:
    """A canonical linear."""
    return node.target is LINEAR


def is_mixed(node: fx.Node) -> bool:
    """A lowered linear, known by name: the core does not import lowering, which registers the op."""
    return node.op == "call_function" and str(node.target) == "mixcomp.mixed_linear.default"


def is_dead(node: fx.Node) -> bool:
    """Nobody uses its value, and it does nothing else.  fx knows which operators write in place, but no methods."""
    in_place = getattr(node.target, "__name__", "").endswith("_")
    return node.op in ("get_attr", "call_function") and not node.users and not in_place and not node.is_impure()


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an op call by the names of its schema."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def signature(program: Program) -> tuple[str, ...]:
    """Inputs and outputs as text: names, order, types, structure, which outputs are one value or an input."""
    text = Text(program)
    graph = program.graph_module.graph
    inputs = [text.line(n) for n in graph.nodes if n.op == "placeholder"]
    outputs: dict[fx.Node, str] = {}

    def leaf(node: fx.Node) -> str:
        name = node.name if node.op == "placeholder" else f"output {len(outputs)}"
        return outputs.setdefault(node, f"{name}{text.type_of(node)}")

    return (*inputs, *(str(fx.map_arg(n.args[0], leaf)) for n in graph.nodes if n.op == "output"))


def _readers(program: Program) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    calls = {call: site.name for site in program.sites for call in site.calls}
    for node in program.graph_module.graph.nodes:
        if not is_linear(node) or node.name not in calls:
            continue
        for source in node.args[1:3]:
            if isinstance(source, fx.Node) and source.op == "get_attr":
                names = found.get(str(source.target), ())
                found[str(source.target)] = tuple(dict.fromkeys((*names, calls[node.name])))
    return found
