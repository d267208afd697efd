"""The last step: canonical linears become calls of the packed operator, and packed modules go into the user's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from mixcomp.errors import InputError
from mixcomp.format import NAMES, SiteFormat
from mixcomp.lowering.module import MixedLinear
from mixcomp.lowering.ops import MIXED_LINEAR
from mixcomp.ops import LINEAR
from mixcomp.packed import PackedWeight
from mixcomp.program import META, Fact, Program, Site
from mixcomp.protocol import Context, Pass, Semantics

#: where the graph module keeps packed tensors
PREFIX = "_packed"
_FIRST, _MORE = NAMES[:7], NAMES[7:]


@dataclass(frozen=True)
class LowerLinears(Pass):
    """Replace every canonical linear of a compiled site by ``mixed_linear`` on its stored tensors.

    Before::

        %7 = linear(%6, @layers.0.q_proj.weight, @layers.0.q_proj.bias, False)

    After; the weight is gone, and the bias too if the site's rows stay permuted (its copy follows them)::

        %7 = mixed_linear(%6, @_packed.layers.0.q_proj.codes, @_packed.layers.0.q_proj.scales,
                          @_packed.layers.0.q_proj.factors, None, None, None, None, @layers.0.q_proj.bias,
                          [560, 4, 16, 5], 576)

    The graph's own copy of a norm that was learned is exchanged for what the table holds, under the same path.
    ``activations`` is what the calls multiply with (``config.ACTIVATIONS``).
    """

    activations: str = "native"
    name: ClassVar[str] = "lower-linears"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.BRANCHED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED})
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def run(self, program: Program, context: Context) -> Program:
        module = program.graph_module
        compiled = (site for site in program.sites if site.format is not None)
        sites = {site.name: replace(site, activations=self.activations) for site in compiled}
        packed: dict[str, _Operands] = {}
        for node in list(module.graph.nodes):
            site = sites.get(node.meta.get(META, ""))
            if site is not None and node.target is LINEAR:
                operands = packed.get(site.name) or _place(program, site, node)
                packed[site.name] = operands
                _rewrite(node, operands, self.activations)
                context.progress("lower", len(packed), len(sites))
        for path, value in program.norms().items():
            owner, _, name = path.rpartition(".")
            module.get_submodule(owner).register_parameter(name, nn.Parameter(value, requires_grad=False))
        lowered = fx.GraphModule(module, module.graph, type(module).__name__)
        return replace(program.with_sites(sites), graph_module=lowered)


@dataclass(frozen=True)
class _Operands:
    """What all calls of a site share; ``bias`` replaces the call's own where it is set."""

    tensors: Mapping[str, fx.Node]
    bias: fx.Node | None
    fmt: SiteFormat


def _place(program: Program, site: Site, first: fx.Node) -> _Operands:
    """Register a site's tensors as buffers, read just before its first call."""
    weight = packed_weight(program, site)
    order = absorbed_order(program, site)
    stored = weight.tensors()
    own_bias = first.args[2]
    if order is not None and isinstance(own_bias, fx.Node):
        old = _lookup(program.graph_module, str(own_bias.target))
        stored["bias"] = old.detach()[order.to(old.device)]
    with first.graph.inserting_before(first):
        place = f"{PREFIX}.{site.name}"
        nodes = {name: _buffer(program.graph_module, first, f"{place}.{name}", t) for name, t in stored.items()}
    bias = nodes.pop("bias", None)
    return _Operands(nodes, bias, weight.fmt)


def _buffer(module: fx.GraphModule, call: fx.Node, path: str, tensor: torch.Tensor) -> fx.Node:
    """A node that reads ``tensor``, from now on a buffer of the graph module."""
    owner: nn.Module = module
    *folders, name = path.split(".")
    for folder in folders:
        if folder not in owner._modules:
            owner.add_module(folder, nn.Module())
        owner = owner.get_submodule(folder)
    owner.register_buffer(name, tensor)
    node = call.graph.create_node("get_attr", path)
    example = call.meta.get("val")
    if isinstance(example, FakeTensor):
        node.meta["val"] = example.fake_mode.from_tensor(tensor, static_shapes=True)
    return node


def _rewrite(node: fx.Node, operands: _Operands, activations: str) -> None:
    """Change the call in place: its name, by which sites know it, and its meta stay."""
    x, weight, bias, _ = node.args
    tensors, fmt = operands.tensors, operands.fmt
    more = (*map(tensors.get, _MORE), fmt.group, int(fmt.scales)) if fmt.departure else ()
    node.target = MIXED_LINEAR
    node.args = (x, *map(tensors.get, _FIRST), operands.bias or bias, fmt.constants(), fmt.columns, *more)
    if activations != "native":
        node.kwargs = {"activations": activations}
    for source in (weight, bias):
        if isinstance(source, fx.Node) and not source.users:
            node.graph.erase_node(source)


def _lookup(module: nn.Module, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    found = getattr(module.get_submodule(owner), name)
    if not isinstance(found, torch.Tensor):
        raise InputError(f"{path} is a {type(found).__name__}, not a tensor")
    return found


def packed_weight(program: Program, site: Site) -> PackedWeight:
    """The stored tensors of a compiled site, checked against its format."""
    if site.format is None:
        raise InputError(f"site {site.name!r} is not compiled: it has no format")
    stored = {name: program.tensor(site.name, name) for name in site.format.tensors()}
    return PackedWeight.from_tensors(site.format, stored)


def absorbed_order(program: Program, site: Site) -> torch.Tensor | None:
    """int64[rows], if the site's output features come out permuted: feature i is original feature order[i]."""
    order = program.find(site.name, "row_order")
    return None if site.format is None or site.format.scatter else order


def write_back(program: Program, model: nn.Module) -> None:
    """Put a ``MixedLinear`` in the place of every module that holds the weight of a compiled site, and a new parameter in
    that of every norm that was learned.  All or none.

    Every path of a shared weight gets the same new module, every path of a shared norm the same parameter.  The
    originals are not written to, and freed as soon as nobody else holds them.

    Raises:
        InputError: the model is not the one the program was captured from.
    """
    swaps = [swap for site in program.sites if site.format is not None for swap in _prepare(program, site, model)]
    swaps += [swap for path, value in program.norms().items() for swap in _prepare_norm(path, value, model)]
    done: list[_Swap] = []
    try:
        for swap in swaps:
            done.append(swap)
            setattr(swap.parent, swap.name, swap.new)
    except BaseException:
        for swap in done:
            held = swap.parent._modules if isinstance(swap.old, nn.Module) else swap.parent._parameters
            held[swap.name] = swap.old  # type: ignore[assignment]
        raise


@dataclass(frozen=True)
class _Swap:
    parent: nn.Module
    name: str
    old: nn.Module | nn.Parameter
    new: MixedLinear | nn.Parameter


def _prepare(program: Program, site: Site, model: nn.Module) -> list[_Swap]:
    """Everything that can fail for one site, before anything is changed."""
    paths = [key.rpartition(".")[0] for key in (site.weight.key, *site.weight.aliases)]
    owners = [_owner(site, model, path) for path in paths]
    old = owners[0]
    weight = packed_weight(program, site).to(old.get_parameter("weight").device)
    bias = None if site.bias is None else model.get_parameter(site.bias).detach()
    order = absorbed_order(program, site)
    if bias is not None and order is not None:
        bias = bias[order.to(bias.device)]
    new = MixedLinear(weight, bias, site.weight.dtype, site.activations).train(old.training)
    swaps = []
    for path, owner in zip(paths, owners, strict=True):
        parent, _, name = path.rpartition(".")
        swaps.append(_Swap(model.get_submodule(parent), name, owner, new))
    return swaps


def _prepare_norm(path: str, value: torch.Tensor, model: nn.Module) -> list[_Swap]:
    """The same for one norm, at every path in the model."""
    try:
        old = model.get_parameter(path)
    except AttributeError as error:
        raise InputError(f"norm {path!r}: {error}; write back into the model that was captured") from error
    if (old.shape, old.dtype) != (value.shape, value.dtype):
        wanted, got = ((tuple(t.shape), t.dtype) for t in (value, old))
        raise InputError(f"norm {path!r}: the parameter is {got}, the captured one was {wanted}")
    new = nn.Parameter(value.to(old.device, copy=True), requires_grad=old.requires_grad)
    held = ((module, name, own) for module in model.modules() for name, own in module._parameters.items())
    return [_Swap(module, name, old, new) for module, name, own in held if own is old]


def _owner(site: Site, model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``, which must still hold the site's weight."""
    if not path:
        raise InputError(f"site {site.name!r}: the model itself is the linear layer; put it into a module first")
    try:
        module = model.get_submodule(path)
        shape = tuple(module.get_parameter("weight").shape)
    except AttributeError as error:
        raise InputError(f"site {site.name!r}: {error}; write back into the model that was captured") from error
    wanted = site.weight.shape[::-1] if site.weight.transposed else site.weight.shape
    if shape != wanted:
        raise InputError(f"site {site.name!r}: the weight at {path} is {shape}, the captured one was {wanted}")
    return module
