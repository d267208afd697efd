"""Weights by the memory they lie in: a name says nothing about ties, shared modules or overlapping slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from mixcomp.ops import LINEAR


@dataclass(frozen=True, slots=True)
class Weight:
    """One piece of memory, every path to it in the user's model, and who reads it in the graph.

    ``calls`` are the canonical linears that multiply by it, ``others`` all other readers.
    """

    tensor: torch.Tensor
    paths: tuple[str, ...]
    calls: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]

    @property
    def embedded(self) -> bool:
        return any("embedding" in str(n.target) for n in self.others)


def weights_of(module: fx.GraphModule, model: nn.Module) -> dict[str, Weight]:
    """Target of a ``get_attr`` -> its weight, for every parameter and buffer of ``model`` that the graph reads."""
    paths: dict[object, list[str]] = {}
    for path, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        paths.setdefault(identity(tensor), []).append(path)
    nodes: dict[object, list[fx.Node]] = {}
    tensors: dict[object, torch.Tensor] = {}
    for node in module.graph.nodes:
        read = held(module, node)
        if read is not None:
            tensors.setdefault(identity(read), read)
            nodes.setdefault(identity(read), []).append(node)
    out: dict[str, Weight] = {}
    place = {node: i for i, node in enumerate(module.graph.nodes)}
    for key in nodes.keys() & paths.keys():
        reads = sorted({user for node in nodes[key] for user in node.users}, key=place.__getitem__)
        calls = tuple(n for n in reads if n.target is LINEAR and n.args[1] in nodes[key])
        others = tuple(n for n in reads if n not in calls)
        weight = Weight(tensors[key], tuple(paths[key]), calls, others)
        out.update({str(node.target): weight for node in nodes[key]})
    return out


def held(module: nn.Module, node: fx.Node) -> torch.Tensor | None:
    """The tensor that a ``get_attr`` reads; None for any other node."""
    if node.op != "get_attr":
        return None
    path, _, name = str(node.target).rpartition(".")
    found = getattr(module.get_submodule(path), name)
    return found if isinstance(found, torch.Tensor) else None


def identity(tensor: torch.Tensor) -> object:
    """Equal for two live tensors exactly if they show the same elements of one storage."""
    storage, first, _ = extent(tensor)
    return storage, first, tensor.dtype, tuple(tensor.shape), tensor.stride() if tensor.layout == torch.strided else ()


def extent(tensor: torch.Tensor) -> tuple[object, int, int]:
    """(storage, first byte, end byte).  A tensor without plain memory of its own shares nothing."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided or not tensor.numel():
        return id(tensor), 0, 1
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    first = int(tensor.storage_offset()) * tensor.itemsize
    return ("storage", tensor.untyped_storage().data_ptr()), first, first + int(span) * tensor.itemsize


def overlaps(tensor: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    """Whether another view of the same storage shows some of the same bytes."""
    storage, first, end = extent(tensor)
    own = identity(tensor)
    views = ((o, extent(o)) for o in others)
    return any(s == storage and a < end and first < b and identity(o) != own for o, (s, a, b) in views)
