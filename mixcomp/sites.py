"""Which weights of a model can be compiled, which are left alone, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import fx, nn

from mixcomp.canonical import activation, is_view, owner, weight_products
from mixcomp.errors import CaptureError, InputError, WeightError
from mixcomp.ops import LINEAR
from mixcomp.patterns import select
from mixcomp.program import META, Site, WeightRef
from mixcomp.weights import Weight, overlaps, weights_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: with fewer rows or columns a weight costs more in scales and launches than it saves (gates, routers of few experts)
SMALLEST_SIDE = 16
#: how many groups of refused weights an error names
SHOWN = 8


def find_sites(
    module: fx.GraphModule, model: nn.Module, include: Iterable[str], exclude: Iterable[str], min_coverage: float
) -> tuple[Site, ...]:
    """Sites of a canonical graph in graph order; those left alone carry a reason.  Marks their calls in ``node.meta``.

    The calls of a site left alone may be any nodes that multiply by its weight.

    Raises:
        InputError: the graph multiplies by no weight at all.
        ConfigError: a pattern matches no site.
        WeightError: a weight to be compiled holds NaN or infinity.
        CaptureError: less than ``min_coverage`` of the weights in scope can be compiled.
    """
    weights = weights_of(module, model)
    found = [*_linears(weights, model), *_others(module, weights)]
    if not found:
        raise InputError(f"{type(model).__name__} multiplies by no weight: there is no linear layer to compile")
    names = [s.name for s in found]
    wanted, unwanted = select("include", include, names), select("exclude", exclude, names)
    sites = _scoped(found, weights, model, wanted, unwanted)
    for site in sites:
        _require_finite(site, model)
    _require_coverage(sites, min_coverage)
    nodes = {node.name: node for node in module.graph.nodes}
    for site in sites:
        for call in site.calls:
            nodes[call].meta[META] = site.name
    place = {name: i for i, name in enumerate(nodes)}
    return tuple(sorted(sites, key=lambda s: place[s.calls[0]]))


def coverage(sites: Iterable[Site]) -> tuple[int, int]:
    """(weights to be compiled, weights in scope)."""
    scope = [s for s in sites if s.in_scope]
    return sum(prod(s.weight.shape) for s in scope if s.open), sum(prod(s.weight.shape) for s in scope)


def _linears(weights: Mapping[str, Weight], model: nn.Module) -> list[Site]:
    """One site for every weight that canonical linears read."""
    parameters = list(model.parameters())
    sites = []
    for weight in {id(w): w for w in weights.values()}.values():
        if not weight.calls:
            continue
        x, _, _, transposed = weight.calls[0].args
        biases = {_bias_path(call.args[2], weights) for call in weight.calls}
        reason = _memory_reason(weight.tensor, parameters) or _use_reason(weight, biases, model)
        rows, columns = weight.tensor.shape[::-1] if transposed else weight.tensor.shape
        key = _key(weight, model)
        aliases = tuple(p for p in weight.paths if p != key)
        reference = WeightRef(key, aliases, (rows, columns), weight.tensor.dtype, bool(transposed))
        calls = tuple(call.name for call in weight.calls)
        bias = next(iter(biases)) if len(biases) == 1 else None
        sites.append(Site(_name(key), calls, reference, bias or None, activation(x).name, True, reason))  # type: ignore[arg-type]
    return sites


def _others(module: fx.GraphModule, weights: Mapping[str, Weight]) -> list[Site]:
    """One site, left alone, for every weight that is multiplied in some other way."""
    calls: dict[int, list[fx.Node]] = {}
    known = {id(w): w for w in weights.values() if not w.calls}
    for node, parameter in weight_products(module.graph):
        weight = weights.get(str(parameter.target))
        if weight is not None and id(weight) in known and not any(node in taken for taken in calls.values()):
            calls.setdefault(id(weight), []).append(node)
    sites = []
    for index, nodes in calls.items():
        tensor, (key, *aliases) = known[index].tensor, known[index].paths
        reference = WeightRef(key, tuple(aliases), (prod(tensor.shape[:-1]), tensor.shape[-1]), tensor.dtype)
        x = next((n for n in nodes[0].all_input_nodes if n.op != "get_attr"), nodes[0])
        names = tuple(n.name for n in nodes)
        reason = _product_reason(tensor, nodes[0])
        sites.append(Site(_name(key), names, reference, None, activation(x).name, True, reason))
    return sites


def _product_reason(tensor: torch.Tensor, node: fx.Node) -> str:
    if tensor.dim() > 2:
        return f"a stacked weight {list(tensor.shape)} read by {_operation(node)}; only matrices can be compiled"
    return f"a computed weight or an unusual product: {_operation(node)} does not read the parameter as it is"


def _memory_reason(tensor: torch.Tensor, parameters: Sequence[torch.Tensor]) -> str | None:
    """Why a matrix as it lies in memory cannot be compiled."""
    if type(tensor) is not nn.Parameter:
        return f"the weight is a {type(tensor).__name__}, not a plain parameter"
    if tensor.dtype not in DTYPES:
        return f"the weight is {tensor.dtype}, none of float32, float16 and bfloat16"
    if min(tensor.shape) < SMALLEST_SIDE:
        return f"a weight of {tensor.shape[0]} x {tensor.shape[1]} is too small: a side is below {SMALLEST_SIDE}"
    (small, count), (large, _) = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    if small < 1 or large < small * count:
        return "an expanded weight: several of its elements share one place in memory"
    if overlaps(tensor, parameters):
        return "the weight shares part of its memory with another parameter"
    return None


def _use_reason(weight: Weight, biases: set[str | None], model: nn.Module) -> str | None:
    """Why the modules that hold a weight cannot be replaced by compiled ones."""
    if weight.others:
        return f"the weight is also read by {_operation(weight.others[0])}"
    if len({call.args[3] for call in weight.calls}) > 1:
        return "the weight is used both as it is and transposed"
    if biases == {""}:
        return "the bias is not a parameter of the model"
    if len(biases) > 1:
        return f"modules with different biases share the weight: {', '.join(sorted(map(str, biases)))}"
    owners = {path.rpartition(".")[0] for path in weight.paths}
    for call in weight.calls:
        if owner(call) not in owners:
            return f"the weight is multiplied in {owner(call) or 'the model itself'}, not in the module that holds it"
    reasons = (_module_reason(model.get_submodule(path), path, weight) for path in sorted(owners))
    return next(filter(None, reasons), None)


def _module_reason(module: nn.Module, path: str, weight: Weight) -> str | None:
    """Why a module is not just ``x W^T + b``."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{path} has hooks, which a replacement would lose"
    if "forward" in vars(module):
        return f"the forward of {path} is overridden on the instance"
    if type(module) is nn.Linear:
        return None
    kind = type(module).__name__
    if any(name not in ("weight", "bias") for name, _ in module.named_parameters()) or next(module.children(), None):
        return f"{path or 'the model itself'} is a {kind}, which holds more than a weight and a bias"
    nodes = (n for n in weight.calls[0].graph.nodes if owner(n) == path and n not in weight.calls)
    more = [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor) and not is_view(n)]
    if more:
        return f"the forward of {path}, a {kind}, is not x W^T + b: it also calls {_operation(more[0])}"
    if not _multiplies(module, weight):
        return f"the forward of {path}, a {kind}, is not x W^T + b"
    return None


def _multiplies(module: nn.Module, weight: Weight) -> bool:
    """Whether the module maps two random rows to ``x W^T + b``."""
    transposed, tensor = bool(weight.calls[0].args[3]), weight.tensor
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, tensor.shape[0 if transposed else 1], generator=draw).to(tensor.device, tensor.dtype)
    with torch.no_grad():
        want = LINEAR(x, tensor, getattr(module, "bias", None), transposed)
        try:
            got = module(x)
        except Exception:  # whatever a foreign forward raises, it does not take rows
            return False
    if not isinstance(got, torch.Tensor) or got.shape != want.shape:
        return False
    tolerance = 4 * torch.finfo(tensor.dtype).eps + 1e-5
    return bool((got - want).float().norm() <= tolerance * want.float().norm())


def _scoped(
    sites: list[Site],
    weights: Mapping[str, Weight],
    model: nn.Module,
    wanted: Mapping[str, str],
    unwanted: Mapping[str, str],
) -> list[Site]:
    """Out of scope are: what is tied to an embedding, the head unless asked for, and what the caller excludes."""
    tied = {path for w in weights.values() if w.embedded for path in w.paths}
    head = _head_paths(model)
    scoped = []
    for site in sites:
        if site.name in unwanted:
            out = f"excluded by the pattern {unwanted[site.name]!r}"
        elif site.weight.key in tied:
            out = f"tied to the embedding {', '.join(site.weight.aliases) or site.weight.key}"
        elif site.weight.key in head and site.name not in wanted:
            out = f"the output head, which is compiled only when asked for: include=[{site.name!r}]"
        else:
            scoped.append(site)
            continue
        scoped.append(replace(site, in_scope=False, reason=out))
    return scoped


def _head_paths(model: nn.Module) -> set[str]:
    """Paths of the parameters of the output head, as transformers tells it."""
    finder = getattr(model, "get_output_embeddings", None)
    head = finder() if callable(finder) else None
    own = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    return {path for path, p in model.named_parameters(remove_duplicate=False) if id(p) in own}


def _require_finite(site: Site, model: nn.Module) -> None:
    for path in (site.weight.key, site.bias) if site.open else ():
        bad = ~torch.isfinite(model.get_parameter(path).detach()) if path else torch.zeros(0)
        count = int(bad.sum())
        if count:
            first = tuple(torch.nonzero(bad)[0].tolist())
            raise WeightError(
                f"{path} holds {count} values that are NaN or infinite, the first at {first}; "
                f"repair the checkpoint, or leave the layer alone with exclude=[{site.name!r}]"
            )


def _require_coverage(sites: list[Site], wanted: float) -> None:
    able, total = coverage(sites)
    if able >= wanted * total:
        return
    groups: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        if site.in_scope and site.reason:
            layer = re.sub(r"\.\d+(?=\.|$)", ".*", site.name)
            reason = site.reason.replace(site.name, layer)
            groups.setdefault((layer, reason), []).append(prod(site.weight.shape))
    largest = sorted(groups.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    lines = [f"  {name} ({len(n)} parameters, {sum(n):,} weights): {reason}" for (name, reason), n in largest]
    raise CaptureError(
        f"only {able / total:.1%} of the {total:,} weights in scope can be compiled, min_coverage is {wanted:.1%}.  "
        "Left alone:\n" + "\n".join(lines) + f"\nPass min_coverage={able * 100 // total / 100} to compile the rest, "
        "or take layers out of scope with exclude=[...]"
    )


def _key(weight: Weight, model: nn.Module) -> str:
    """The first path of a weight; an embedding's own only if there is no other."""
    outside = (p for p in weight.paths if not isinstance(model.get_submodule(p.rpartition(".")[0]), nn.Embedding))
    return next(outside, weight.paths[0])


def _name(key: str) -> str:
    """The owner's path for a ``weight`` (also a parametrized one), else the parameter's own path."""
    return re.sub(r"(\.parametrizations)?\.weight(\.original\d*)?$", "", key)


def _bias_path(node: object, weights: Mapping[str, Weight]) -> str | None:
    """Path of a bias in the user's model; "" where it is none of its parameters."""
    if not isinstance(node, fx.Node):
        return None
    weight = weights.get(str(node.target))
    return weight.paths[0] if weight is not None and isinstance(weight.tensor, nn.Parameter) else ""


def _operation(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")
