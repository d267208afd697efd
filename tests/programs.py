"""Small programs built by hand: no tracing, about a millisecond each, runnable as ``program.graph_module(input_ids)``.

A ``Blueprint`` (structure and a seed) fully determines the program, so examples shrink well and repeat exactly.
Every program is ``embedding -> layers -> lm_head``; the head is out of scope, as it is by default in real models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from mixcomp.ops import LINEAR
from mixcomp.printer import module_tensors
from mixcomp.program import META, Program, Site, WeightRef
from mixcomp.protocol import Context

aten = torch.ops.aten


class Kind(Enum):
    """What a layer is made of."""

    PLAIN = "plain"  #: x -> relu(W x), any output size
    TRANSPOSED = "transposed"  #: the same with the weight stored as (columns, rows), like GPT-2's Conv1D
    RESIDUAL = "residual"  #: x -> x + down(relu(up(x)))
    GATED = "gated"  #: x -> x + down(silu(gate(x)) * up(x))
    REUSED = "reused"  #: x -> W relu(W x): one site, two calls


class Values(Enum):
    """What numbers the weights hold."""

    NORMAL = "normal"
    DYADIC = "dyadic"  #: small integers times a power of two: sums are exact in any order
    NASTY = "nasty"  #: each weight is one of ``NASTY``


@dataclass(frozen=True)
class Layer:
    """``size`` output features (inner ones for residual and gated layers)."""

    kind: Kind
    size: int
    bias: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Blueprint:
    """Everything about a small program."""

    layers: tuple[Layer, ...]
    width: int = 32
    vocab: int = 13
    tied: bool = False
    values: Values = Values.NORMAL
    seed: int = 0
    folder: str = "layers"


def _outlier(w: torch.Tensor) -> torch.Tensor:
    w.view(-1)[-1] = 100.0
    return w


#: what happens to the weights nobody has in mind
NASTY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zero": torch.zeros_like,
    "negative zero": lambda w: -torch.zeros_like(w),
    "zero row": lambda w: w.index_fill(0, torch.tensor(0), 0.0),
    "constant": lambda w: torch.full_like(w, 0.37),
    "equal rows": lambda w: w[:1].expand_as(w).clone(),
    "subnormal": lambda w: w * 2.0**-130,
    "powers of two": lambda w: torch.sign(w) * torch.exp2(torch.floor(torch.log2(w.abs()))),
    "one outlier": _outlier,
    "alternating signs": lambda w: w.abs() * (1 - 2 * (torch.arange(w.shape[-1]) % 2)),
}


def put(root: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Hang a parameter or buffer under ``path``, making the modules on the way."""
    *folders, name = path.split(".")
    for part in folders:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)


@dataclass
class Builder:
    """Writes a graph node by node with fake values, and registers parameters under their paths."""

    blueprint: Blueprint
    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    sites: dict[str, Site] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.draw = torch.Generator().manual_seed(self.blueprint.seed)
        self.weights: dict[str, fx.Node] = {}
        self.tied = False
        self.values: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def input(self, name: str) -> fx.Node:
        """A token input int64[s0, s1]."""
        node = self.graph.placeholder(name)
        dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
        example = torch.zeros(2, 3, dtype=torch.int64)
        node.meta["val"] = self.mode.from_tensor(example, symbolic_context=dynamic, source=ConstantSource(name))
        self.leading = node.meta["val"].shape
        return node

    def parameter(self, path: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A new parameter, or the node of the one already there."""
        if path in self.weights:
            return self.weights[path]
        return self.register(path, nn.Parameter(self.numbers(shape).to(dtype)))

    def register(self, path: str, parameter: nn.Parameter) -> fx.Node:
        put(self.root, path, parameter)
        self.weights[path] = node = self.graph.create_node("get_attr", path)
        node.meta["val"] = self.mode.from_tensor(parameter, static_shapes=True)
        return node

    def numbers(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self.blueprint.values is Values.DYADIC:
            return torch.randint(-4, 5, shape, generator=self.draw) * 2.0**-2
        numbers = torch.randn(shape, generator=self.draw) / prod(shape[1:]) ** 0.5
        if self.blueprint.values is Values.NASTY:
            kind = int(torch.randint(len(NASTY), (), generator=self.draw))
            numbers = [*NASTY.values()][kind](numbers)
        return numbers

    def call(self, target: Callable[..., Any], *args: Any, size: int = 0, like: fx.Node | None = None) -> fx.Node:
        """A node whose value looks like ``like`` (the first argument), with ``size`` features if given.

        Writing the fake value down is 20 times faster than computing it; invariant I03 computes it and compares.
        """
        node = self.graph.call_function(target, args)
        example = (like or args[0]).meta["val"]
        dtype = args[1] if target is aten.to.dtype else example.dtype
        key = (size or example.shape[-1], dtype)
        if key not in self.values:
            with self.mode:
                self.values[key] = torch.empty(*self.leading, *key[:1], dtype=dtype)
        node.meta["val"] = self.values[key]
        return node

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if x.meta["val"].dtype == dtype else self.call(aten.to.dtype, x, dtype)

    def linear(self, x: fx.Node, name: str, rows: int, layer: Layer | None = None, *, in_scope: bool = True) -> fx.Node:
        """One call of the site ``name``; the first call makes its parameters."""
        layer = layer or Layer(Kind.PLAIN, rows)
        transposed = layer.kind is Kind.TRANSPOSED
        x = self.cast(x, layer.dtype)
        columns = x.meta["val"].shape[-1]
        shape = (columns, rows) if transposed else (rows, columns)
        weight = self.parameter(f"{name}.weight", *shape, dtype=layer.dtype)
        bias = self.parameter(f"{name}.bias", rows, dtype=layer.dtype) if layer.bias else None
        node = self.call(LINEAR, x, weight, bias, transposed, size=rows)
        node.meta[META] = name
        self.note(node, x, name, layer, (rows, columns), in_scope)
        return node

    def note(self, node: fx.Node, x: fx.Node, name: str, layer: Layer, shape: tuple[int, int], in_scope: bool) -> None:
        known = self.sites.get(name)
        calls = (*known.calls, node.name) if known else (node.name,)
        aliases = ("embed.weight",) if name == "lm_head" and self.tied else ()
        weight = WeightRef(f"{name}.weight", aliases, shape, layer.dtype, layer.kind is Kind.TRANSPOSED)
        bias = f"{name}.bias" if layer.bias else None
        self.sites[name] = Site(name, calls, weight, bias, known.input if known else x.name, in_scope)

    def layer(self, x: fx.Node, name: str, layer: Layer) -> fx.Node:
        width = x.meta["val"].shape[-1]
        if layer.kind in (Kind.PLAIN, Kind.TRANSPOSED):
            return self.call(aten.relu.default, self.linear(x, f"{name}.proj", layer.size, layer))
        if layer.kind is Kind.REUSED:
            inner = self.call(aten.relu.default, self.linear(x, f"{name}.proj", width, layer))
            return self.linear(inner, f"{name}.proj", width, layer)
        cast = self.cast(x, layer.dtype)
        up = self.linear(cast, f"{name}.up", layer.size, layer)
        if layer.kind is Kind.GATED:
            gate = self.linear(cast, f"{name}.gate", layer.size, layer)
            inner = self.call(aten.mul.Tensor, self.call(aten.silu.default, gate), up)
        else:
            inner = self.call(aten.relu.default, up)
        down = self.linear(inner, f"{name}.down", width, layer)
        return self.call(aten.add.Tensor, x, self.cast(down, x.meta["val"].dtype))


def build(blueprint: Blueprint) -> Program:
    """The program a blueprint describes."""
    builder = Builder(blueprint)
    ids = builder.input("input_ids")
    embed = builder.parameter("embed.weight", blueprint.vocab, blueprint.width)
    x = builder.call(aten.embedding.default, embed, ids, like=embed)
    for i, layer in enumerate(blueprint.layers):
        x = builder.layer(x, f"{blueprint.folder}.{i}", layer)
    if blueprint.tied and x.meta["val"].shape[-1] == blueprint.width:
        builder.register("lm_head.weight", builder.root.embed.weight)
        builder.tied = True
    logits = builder.linear(x, "lm_head", blueprint.vocab, in_scope=False)
    builder.graph.output(logits)
    module = fx.GraphModule(builder.root, builder.graph, "Small")
    return Program(module, tuple(builder.sites.values()))


def own(program: Program) -> Program:
    """A copy that shares no memory, so that writes to it show nowhere else; ties stay ties."""
    copies: dict[int, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            fresh = tensor.detach().clone()
            grad = tensor.requires_grad
            copies[id(tensor)] = nn.Parameter(fresh, grad) if isinstance(tensor, nn.Parameter) else fresh
        return copies[id(tensor)]

    module = program.clone().graph_module
    owned = nn.Module()
    for path, tensor in module_tensors(module).items():
        put(owned, path, copy(tensor))
    tensors = {key: copy(tensor) for key, tensor in program.tensors.items()}
    return replace(program, graph_module=fx.GraphModule(owned, module.graph, "Small"), tensors=tensors)


def tokens(blueprint: Blueprint, samples: int = 2, length: int = 5) -> torch.Tensor:
    """Token ids int64[samples, length] that the program accepts."""
    draw = torch.Generator().manual_seed(blueprint.seed + 1)
    return torch.randint(0, blueprint.vocab, (samples, length), generator=draw)


def context(blueprint: Blueprint, batches: int = 2) -> Context:
    """A context with a little calibration text."""
    return Context(batches=tuple(tokens(blueprint, length=6) for _ in range(batches)), seed=blueprint.seed)


GATED = Blueprint((Layer(Kind.GATED, 64), Layer(Kind.PLAIN, 33, bias=True)))
PLAIN = Blueprint((Layer(Kind.PLAIN, 16),))
#: its rows are many enough for ``down`` to absorb the order of ``up``
ABSORBING = Blueprint((Layer(Kind.RESIDUAL, 96, bias=True), Layer(Kind.PLAIN, 40)), seed=3)
#: its smaller side leaves no room for a side branch
THIN = Blueprint((Layer(Kind.RESIDUAL, 32),), width=1, vocab=3, seed=1)
EVERYTHING = Blueprint(
    (
        Layer(Kind.RESIDUAL, 48, bias=True),
        Layer(Kind.REUSED, 32),
        Layer(Kind.GATED, 17, dtype=torch.bfloat16),
        Layer(Kind.TRANSPOSED, 32, bias=True),
    ),
    tied=True,
)
