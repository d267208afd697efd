"""Invariants of the graph and its parameters, I01-I08.  Each check yields what is wrong; see ``verify``."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils import _pytree as pytree

from mixcomp.printer import dtype_text, target_text
from mixcomp.program import META, Fact, Site
from mixcomp.snapshot import Case, Findings, arguments, is_dead, is_linear, is_mixed, signature

KINDS = frozenset({"placeholder", "get_attr", "call_function", "output"})


def well_formed(case: Case) -> Findings:
    """I01: the graph passes torch's own lint, and its code was generated from it."""
    module = case.program.graph_module
    try:
        module.graph.lint()
        source = module.graph.python_code("self").src
    except Exception as error:  # lint raises bare exceptions of several types
        yield f"the graph is malformed: {error}", None
        return
    if source != module.code:
        yield "the graph was edited and not recompiled; call graph_module.recompile()", None


def dialect(case: Case) -> Findings:
    """I02: functional calls only, and each site in the form of its stage."""
    lowered = Fact.LOWERED in case.program.facts
    compiled = {s.name for s in case.program.sites if s.format is not None}
    for node in case.nodes.values():
        schema = getattr(node.target, "_schema", None)
        if node.op not in KINDS:
            yield f"node {node.name} is a {node.op}; only {', '.join(sorted(KINDS))} are allowed", node
        elif schema is not None and schema.is_mutable:
            yield f"node {node.name} calls {target_text(node.target)}, which writes to its arguments", node
        elif is_mixed(node) and not lowered:
            yield f"node {node.name} is lowered before lower-linears has run", node
        elif is_linear(node) and lowered and node.meta.get(META) in compiled:
            yield f"site {node.meta[META]} is compiled, and {node.name} is still a canonical linear", node


def weights_private(case: Case) -> Findings:
    """I02: the weight of an open site is read by canonical linears alone: replacing it changes nothing else."""
    open_sites = {s.name for s in case.program.open_sites()}
    for node in case.nodes.values():
        weight = node.args[1] if is_linear(node) else None
        if not isinstance(weight, fx.Node) or node.meta.get(META) not in open_sites:
            continue
        for user in weight.users:
            if not is_linear(user) or weight in (user.args[0], user.args[2]):
                yield f"site {node.meta[META]}: its weight {weight.target} is also read by {user.name}", user


def typed(case: Case) -> Findings:
    """I03: every value has a fake example; a linear's has the shape and dtype that follow from its input."""
    rows = {s.name: s.rows for s in case.program.sites}
    for node in case.nodes.values():
        unused_check = node.is_impure() and not node.users
        if node.op in ("placeholder", "call_function") and "val" not in node.meta and not unused_check:
            yield f"node {node.name} has no meta['val']", node
    for node in case.linears():
        x, y = node.args[0].meta.get("val"), node.meta["val"]  # type: ignore[union-attr]
        size = rows.get(node.meta.get(META, ""))
        if x is None or size is None:
            continue
        wanted = (*x.shape[:-1], size)
        if x.dtype != y.dtype or len(wanted) != y.dim() or not all(map(_same_size, wanted, y.shape)):
            yield f"node {node.name} claims {_describe(y)}, from {_describe(x)} and {size} rows", node


def recomputed(case: Case) -> Findings:
    """I03, level 2: running every call on fake tensors gives the recorded shape, dtype and device."""
    values = (n.meta.get("val") for n in case.nodes.values())
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is None:
        yield "no node carries a fake tensor", None
        return

    def example(node: fx.Node) -> Any:
        if "val" in node.meta or node.op != "get_attr":
            return node.meta.get("val")
        return mode.from_tensor(case.held[str(node.target)], static_shapes=True)

    for node in case.nodes.values():
        if node.op != "call_function" or "val" not in node.meta:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), example)
        try:
            with mode, _quiet(mode):
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # whatever the op raises, its arguments' types do not fit
            yield f"node {node.name} cannot be computed from its arguments' types: {error}", node
            continue
        if not _same_value(value, node.meta["val"]):
            claim = _describe(node.meta["val"])
            yield f"node {node.name} claims {claim} and computes {_describe(value)}", node


def same_signature(case: Case) -> Findings:
    """I04: inputs and outputs are what they were."""
    old, now = case.before_pass().signature, signature(case.program)
    if now != old:
        wanted, got = "\n  ".join(old), "\n  ".join(now)
        yield f"inputs or outputs changed from\n  {wanted}\nto\n  {got}", None


def nothing_dead(case: Case) -> Findings:
    """I05: every node is used, every parameter and buffer is read."""
    for node in case.nodes.values():
        if is_dead(node):
            yield f"node {node.name} is dead", node
    read = tuple(str(n.target) for n in case.nodes.values() if n.op == "get_attr")
    folders = tuple(f"{path}." for path in read)
    for path in case.held:
        if path not in read and not path.startswith(folders):
            yield f"{path} is in the module and no node reads it", None


def sites_match(case: Case) -> Findings:
    """I06: linears and sites describe each other completely."""
    names = Counter(s.name for s in case.program.sites)
    for name in (name for name, count in names.items() if count > 1):
        yield f"site {name}: {names[name]} sites have this name", None
    claimed = Counter(call for s in case.program.sites for call in s.calls)
    for site in case.program.sites:
        yield from _site_calls(case, site)
    for node in case.linears():
        owner = node.meta.get(META)
        if owner not in names:
            yield f"node {node.name} belongs to {owner!r}, which is no site", node
        elif claimed[node.name] != 1:
            yield f"site {owner}: node {node.name} is listed {claimed[node.name]} times instead of once", node


def _site_calls(case: Case, site: Site) -> Findings:
    if not site.calls:
        yield f"site {site.name}: has no call", None
    if site.format is not None and not site.open:
        yield f"site {site.name}: is left alone and has a format", None
    if site.input not in case.nodes:
        yield f"site {site.name}: its input {site.input!r} is not in the graph", None
    for call in site.calls:
        node = case.nodes.get(call)
        linear = node is not None and (is_linear(node) or is_mixed(node))
        compiled = site.open or site.format is not None  # what is left alone may be anything: experts, a convolution
        if node is None or (compiled and not linear):
            yield f"site {site.name}: call {call!r} is not a linear of the graph", node
        elif node.meta.get(META) != site.name:
            yield f"site {site.name}: call {call} is marked as {node.meta.get(META)!r}", node
        elif compiled:
            yield from _operands(case, site, node)


def _operands(case: Case, site: Site, node: fx.Node) -> Findings:
    given = arguments(node)
    if (given.get("bias") is None) != (site.bias is None):
        yield f"site {site.name}: bias is {site.bias!r}, node {node.name} says otherwise", node
    if not is_linear(node):
        return
    source = given["weight"]
    lifted = isinstance(source, fx.Node) and source.op == "placeholder"  # Dynamo hands parameters in as inputs
    weight = source.meta["val"] if lifted else case.parameter_of(source)
    if weight is None:
        yield f"site {site.name}: node {node.name} does not take its weight from the module", node
        return
    shape = tuple(reversed(weight.shape)) if given["transposed"] else tuple(weight.shape)
    said = site.weight.shape, site.weight.dtype, site.weight.transposed
    if (shape, weight.dtype, given["transposed"]) != said:
        what = f"{dtype_text(weight.dtype)}{list(shape)}, transposed={given['transposed']}"
        yield f"site {site.name}: {source.target} is {what}; the site says otherwise", node
    first = case.nodes[site.calls[0]]
    if is_linear(first) and isinstance(first.args[1], fx.Node) and first.args[1].target != source.target:
        yield f"site {site.name}: node {node.name} reads another weight than {first.name}", node


def aliases_shared(case: Case) -> Findings:
    """I07: what shared storage still shares it: aliases recorded at capture, and pairs before the pass."""
    norms = _exchanged(case)
    place = {path: t.untyped_storage().data_ptr() for path, t in case.held.items() if path not in norms}
    groups = [(s.name, (s.weight.key, *s.weight.aliases)) for s in case.program.sites if s.weight.aliases]
    if case.before is not None:
        shared = defaultdict(list)
        for path, identity in case.before.parameters.items():
            shared[identity.storage].append(path)
        groups += [(paths[0], tuple(paths)) for paths in shared.values() if len(paths) > 1]
    for name, paths in groups:
        present = [p for p in paths if p in place]
        if len({place[p] for p in present}) > 1:
            yield f"site {name}: {', '.join(present)} were one storage and are not any more", None


def parameters_kept(case: Case) -> Findings:
    """I08: each parameter is untouched, or consumed by exactly one site that is lowered; learned norms move in then."""
    before = case.before_pass()
    norms = _exchanged(case)
    lowered = {n.meta.get(META) for n in case.linears() if is_mixed(n)}
    for path, old in before.parameters.items():
        tensor = case.held.get(path)
        takers = [r for r in before.readers.get(path, ()) if r in lowered]
        if len(takers) == 1 and (tensor is None or tensor.data_ptr() != old.address):
            continue
        if tensor is None:
            yield f"parameter {path} is gone; {len(takers)} lowered sites took it instead of one", None
            continue
        now = type(old).of(tensor, whole=old.digest is not None)
        if now != old and (path not in norms or now.address == old.address):
            changed = [f for f in old.__slots__ if getattr(old, f) != getattr(now, f)]
            yield f"parameter {path} was changed: {', '.join(changed)} differ from before the pass", None


def _exchanged(case: Case) -> frozenset[str]:
    """Paths of learned norms, which move into a graph as it is lowered; I16 looks at their values."""
    return frozenset(case.program.norms()) if Fact.LOWERED in case.program.facts else frozenset()


def _quiet(mode: FakeTensorMode) -> ExitStack:
    """Neither guards nor symbols of the recomputation may stay behind in the captured graph's environment."""
    stack = ExitStack()
    if mode.shape_env is not None:
        stack.enter_context(mode.shape_env.suppress_guards())
        stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
    return stack


def _same_value(got: Any, wanted: Any) -> bool:
    left, right = pytree.tree_leaves(got), pytree.tree_leaves(wanted)
    return len(left) == len(right) and all(map(_same_leaf, left, right))


def _same_leaf(got: Any, wanted: Any) -> bool:
    if isinstance(got, torch.Tensor) and isinstance(wanted, torch.Tensor):
        same = (got.dtype, got.device, got.dim()) == (wanted.dtype, wanted.device, wanted.dim())
        return same and all(map(_same_size, got.shape, wanted.shape))
    return isinstance(got, torch.Tensor) == isinstance(wanted, torch.Tensor)


def _same_size(got: int | torch.SymInt, wanted: int | torch.SymInt) -> bool:
    if free_unbacked_symbols(got) or free_unbacked_symbols(wanted):
        return True  # sizes that depend on data get a new name each time
    return bool(statically_known_true(got == wanted))


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{dtype_text(value.dtype)}{list(value.shape)} on {value.device}"
    return str(value)
