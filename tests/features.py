"""Permuting features for real, the oracle of the coupling analysis; and small graphs around any chain of operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mixcomp.passes.coupling import Absorption
from mixcomp.program import Program, Site
from programs import Blueprint, Builder

aten = torch.ops.aten
BATCH, LENGTH, VOCAB = 2, 5, 13


class Model:
    """The weights of a program in fp64 (or another dtype), to be permuted and run."""

    def __init__(self, program: Program, dtype: torch.dtype = torch.float64) -> None:
        self.program = program
        module = program.graph_module
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.weights = {k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in held.items()}

    def outputs(self) -> torch.Tensor:
        """All outputs for fixed tokens, one after another."""
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=draw)
            out = torch.func.functional_call(self.program.graph_module, self.weights, (ids,))
        outputs = (out,) if isinstance(out, torch.Tensor) else getattr(out, "to_tuple", lambda: out)()
        return torch.cat([output.flatten() for output in outputs])

    def absorb(self, absorption: Absorption, order: torch.Tensor) -> Model:
        """Permute producers' rows and consumers' columns."""
        for name in absorption.producers:
            self.permute_rows(self.program.site(name), order)
        for name in absorption.consumers:
            self.permute_columns(self.program.site(name), absorption.columns(order))
        return self

    def permute_rows(self, site: Site, order: torch.Tensor) -> Model:
        """Row i becomes the former row ``order[i]``, its bias with it."""
        self._permute(self.program.graph_key(site), int(site.weight.transposed), order)
        bias = self.program.node(site.calls[0]).args[2]
        if isinstance(bias, fx.Node):
            self._permute(str(bias.target), 0, order)
        return self

    def permute_columns(self, site: Site, order: torch.Tensor) -> Model:
        """Column j becomes the former column ``order[j]``."""
        self._permute(self.program.graph_key(site), 1 - int(site.weight.transposed), order)
        return self

    def _permute(self, key: str, axis: int, order: torch.Tensor) -> None:
        self.weights[key] = self.weights[key].index_select(axis, order)


def shuffle(rows: int, block: int, seed: int = 0) -> torch.Tensor:
    """A random permutation int64[rows] that stays inside blocks and is not the identity."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(rows // block, block, generator=draw).argsort(-1) + torch.arange(0, rows, block)[:, None]
    if torch.equal(order.flatten(), torch.arange(rows)):
        return order.flip(-1).flatten()
    return order.flatten()


@dataclass
class Chain:
    """Builds ``embedding -> linear a -> operations -> linear b -> linear head``; the head is out of scope."""

    rows: int = 12
    columns: int = 12

    def __post_init__(self) -> None:
        self.builder = Builder(Blueprint((), width=8, vocab=VOCAB))
        ids = self.builder.graph.placeholder("input_ids")
        ids.meta["val"] = self.builder.mode.from_tensor(
            torch.zeros(BATCH, LENGTH, dtype=torch.int64), static_shapes=True
        )
        self.builder.leading = ids.meta["val"].shape
        embed = self.builder.parameter("embed.weight", VOCAB, 8)
        self.x = self.builder.call(aten.embedding.default, embed, ids, like=embed)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Any operation; its fake value is computed, unlike in ``Builder.call``."""
        node = self.builder.graph.call_function(target, args, kwargs)
        with self.builder.mode:
            node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        return node

    def site(self, x: fx.Node, name: str, rows: int | None = None, *, in_scope: bool = True) -> fx.Node:
        return self.builder.linear(x, name, rows or self.rows, in_scope=in_scope)

    def vector(self, name: str, *shape: int) -> fx.Node:
        return self.builder.parameter(name, *shape)

    def finish(self, inner: fx.Node, *also: fx.Node) -> Program:
        """The program that ends in ``b`` and the head, and returns ``also`` too."""
        out = self.site(self.site(inner, "b"), "head", VOCAB, in_scope=False)
        self.builder.graph.output((out, *also) if also else out)
        module = fx.GraphModule(self.builder.root, self.builder.graph, "Chain")
        return Program(module, tuple(self.builder.sites.values()))


def heads(c: Chain, x: fx.Node, count: int = 3, size: int = 4) -> fx.Node:
    """[B, T, count * size] -> [B, count, T, size]"""
    return c.call(aten.transpose.int, c.call(aten.view.default, x, [BATCH, LENGTH, count, size]), 1, 2)


def merged(c: Chain, x: fx.Node) -> fx.Node:
    """[B, T, ...] -> [B, T, features]"""
    return c.call(aten.reshape.default, x, [BATCH, LENGTH, -1])


def attention(copies: int = 1, size: int = 4) -> Program:
    """Attention with three key and value heads of ``size`` features, each read by ``copies`` query heads."""
    chain = Chain(rows=3 * size)
    q = heads(chain, chain.site(chain.x, "q", 3 * size * copies), 3 * copies, size)
    k, v = (heads(chain, chain.site(chain.x, name), 3, size) for name in "kv")
    out = chain.call(aten.scaled_dot_product_attention.default, q, k, v, enable_gqa=copies > 1)
    return chain.finish(merged(chain, chain.call(aten.transpose.int, out, 1, 2)))
