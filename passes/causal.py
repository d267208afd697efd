"""Attention masks that only say "nothing from the future", seen as such: kernels skip half the work and read no mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_SIZE = torch.ops.aten.sym_size.int


def causal_attention(module: fx.GraphModule, length: int) -> fx.Graph:
    """A copy of the module's graph, for windows of ``length`` tokens alone.

    A traced model spells its mask out, bool[batch, 1, length, length], where its own code would have chosen the causal
    kernel.  A mask that follows from sizes alone is worked out once, and where it is the causal one::

        mask = le(column, row)                                   (gone, if nothing else reads it)
        scaled_dot_product_attention(q, k, v, mask)      ->      scaled_dot_product_attention(q, k, v, is_causal=True)

    Anything else stays: windows that slide, biases, masks that depend on tokens.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    plain: dict[fx.Node, bool] = {}
    for node in [n for n in graph.nodes if n.target is ATTENTION]:
        args, kwargs = node.args[:3], dict(node.kwargs)
        names = ("attn_mask", "dropout_p", "is_causal")
        kwargs |= dict(zip(names, node.args[3:], strict=False))
        mask = kwargs.pop("attn_mask", None)
        if not isinstance(mask, fx.Node):
            continue
        if mask not in plain:
            plain[mask] = _is_causal(_value(module, mask, length), length)
        if plain[mask]:
            node.args, node.kwargs = args, kwargs | {"is_causal": True}
    graph.eliminate_dead_code()
    return graph


def _value(owner: fx.GraphModule, node: fx.Node, length: int) -> Any:
    """What the node holds for one window, None if that depends on more than sizes."""
    needed, waiting = {node}, [node]
    while waiting:
        one = waiting.pop()
        if one.op == "placeholder":
            return None
        if one.target is _SIZE and one.all_input_nodes[0].op == "placeholder":  # asks nothing of the tokens
            continue
        fresh = [n for n in one.all_input_nodes if n not in needed]
        needed.update(fresh)
        waiting += fresh
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    copies: dict[fx.Node, fx.Node] = {}
    for one in (n for n in node.graph.nodes if n in needed):
        copies[one] = graph.node_copy(one, lambda n: copies.get(n, tokens))
    graph.output(copies[node])
    with torch.no_grad():
        return fx.GraphModule(owner, graph)(torch.zeros(1, length, dtype=torch.int64))


def _is_causal(mask: Any, length: int) -> bool:
    """Whether it lets every token see itself and what came before: true there, or added as 0 beside the lowest number."""
    if not isinstance(mask, torch.Tensor) or mask.shape[-2:] != (length, length):
        return False
    past = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == past).all())
    return bool(torch.where(past, mask == 0, mask <= torch.finfo(mask.dtype).min).all())
