"""One canonical linear op: every product of an activation with a parameter, however it was spelled.

::

    aten.linear(x, W, b)                                     Linear
    aten.addmm(b, x, W)         x 2-D, W (columns, rows)     Conv1D of GPT-2             mixcomp.linear(x, W, b,
    aten.matmul(x, W.T) + b                                  the Linear of Falcon   ->                  transposed)
    aten.mm(x, W), aten.matmul(x, W)                         a raw parameter
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mixcomp.ops import LINEAR
from mixcomp.weights import held, identity

aten = torch.ops.aten

_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default}
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}
_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
}
_END = 2**63 - 1


@dataclass(frozen=True, slots=True)
class _Linear:
    """``x @ W^T + bias``, where ``weight`` holds W, or W^T if ``transposed``."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool


def canonicalize(module: fx.GraphModule) -> fx.GraphModule:
    """The graph of ``module`` with canonical linears; parameters are shared, what it computes stays the same.

    Besides, steps that hand their input on unchanged are left out, and linears with one weight read it under one name.
    """
    graph = module.graph
    for node in list(graph.nodes):
        same = _same_as(node)
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif same is not None:
            node.replace_all_uses_with(same)
    fixed = constants(graph)
    for node in list(graph.nodes):
        found = _matched(node, fixed) or _with_bias_added(node)
        if found is not None:
            _replace(graph, node, found)
    _read_once(module)
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(module, graph, type(module).__name__)


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value follows from parameters alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def activation(node: fx.Node) -> fx.Node:
    """The node that computes what ``node`` shows: seen through reshapes that leave the last axis as it is."""
    while node.target in _RESHAPES:
        source = node.all_input_nodes[0]
        if _value(source).shape[-1:] != _value(node).shape[-1:]:
            break
        node = source
    return node


def owner(node: fx.Node) -> str:
    """Path of the innermost module whose forward made the node; "" for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return re.sub(r"@\d+$", "", stack[-1][0]) if stack else ""


def weight_products(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(node, parameter) of every other product with a weight of two or more dimensions.

    Stacked experts, convolutions, products with a computed weight (``parameter`` is then the largest it is computed
    from), and control flow that is handed a weight.
    """
    fixed = constants(graph)
    for node in graph.nodes:
        if node.op != "call_function" or not _is_product(node) or node in fixed:
            continue
        for operand in node.all_input_nodes:
            if operand in fixed and not (node.target is LINEAR and operand.op == "get_attr"):
                roots = [r for r in _roots(operand) if _value(r).dim() >= 2]
                if roots:
                    yield node, max(roots, key=lambda r: _value(r).numel())


def is_view(node: fx.Node) -> bool:
    """Whether the node only looks at its input in another shape or order."""
    return node.target in _RESHAPES or node.target in _TRANSPOSES or node.target is aten.sym_size.int


def _value(node: fx.Node) -> torch.Tensor:
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else torch.empty(0, device="meta")


def _is_product(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    inside = isinstance(node.target, torch._ops.HigherOrderOperator)
    return inside or re.search(r"mm(_|\.|$)|linear|matmul|einsum|conv", name) is not None


def _roots(node: fx.Node) -> list[fx.Node]:
    if node.op == "get_attr":
        return [node]
    return [root for source in node.all_input_nodes for root in _roots(source)]


def _same_as(node: fx.Node) -> fx.Node | None:
    """The input that ``node`` hands on unchanged, if it does nothing else."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    old, new = _value(source), _value(node)
    if node.target in _CASTS:
        same = old.dtype == new.dtype and old.device == new.device and "memory_format" not in node.kwargs
        return source if same else None
    if node.target is aten.slice.Tensor:
        given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
        start, end, step = given[2:]
        whole = start in (None, 0) and (end is None or end == _END) and step == 1
        return source if whole else None
    if node.target is aten.dropout.default and node.args[2] is False:
        return source
    return source if node.target is aten.alias.default else None


def _matched(node: fx.Node, fixed: set[fx.Node]) -> _Linear | None:
    if node.kwargs or node.op != "call_function":
        return None
    args: tuple[Any, ...] = node.args
    if node.target is aten.linear.default:
        x, weight, bias, transposed = args[0], args[1], (args[2] if len(args) > 2 else None), False
    elif node.target is aten.addmm.default:
        x, weight, bias, transposed = args[1], args[2], args[0], True
    elif node.target in (aten.mm.default, aten.matmul.default):
        x, weight, bias, transposed = args[0], args[1], None, True
    else:
        return None
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or x in fixed:
        return None
    weight, turned = _through_transposes(weight)
    if weight.op != "get_attr" or _value(weight).dim() != 2:
        return None
    if bias is not None and (bias.op != "get_attr" or _value(bias).shape != _value(node).shape[-1:]):
        return None
    return _Linear(x, weight, bias, transposed != turned)


def _through_transposes(node: fx.Node) -> tuple[fx.Node, bool]:
    """(the matrix, whether ``node`` is its transpose)."""
    turned = False
    while node.target in _TRANSPOSES and _value(node).dim() == 2:
        source = node.all_input_nodes[0]
        old, new = _value(source), _value(node)
        if (new.shape, new.stride()) != (old.shape[::-1], old.stride()[::-1]):
            break
        node, turned = source, not turned
    return node, turned


def _with_bias_added(node: fx.Node) -> _Linear | None:
    """``linear(x, W) + b`` inside one module, where nobody else reads the product."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    product, bias = node.args
    if not isinstance(product, fx.Node) or not isinstance(bias, fx.Node):
        return None
    if product.target is not LINEAR or product.args[2] is not None or len(product.users) > 1 or bias.op != "get_attr":
        return None
    if _value(bias).shape != _value(product).shape[-1:] or owner(node) != owner(product):
        return None
    x, weight, _, transposed = product.args
    return _Linear(x, weight, bias, transposed)  # type: ignore[arg-type]


def _read_once(module: fx.GraphModule) -> None:
    first: dict[object, fx.Node] = {}
    for node in module.graph.nodes:
        if node.target is LINEAR:
            weight = node.args[1]
            tensor = held(module, weight)
            if tensor is not None:
                node.update_arg(1, first.setdefault(identity(tensor), weight))


def _replace(graph: fx.Graph, node: fx.Node, found: _Linear) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(LINEAR, (found.x, found.weight, found.bias, found.transposed))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
