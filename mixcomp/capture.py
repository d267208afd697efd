"""From a model to a program: trace, make linears canonical, find the sites, and prove that the graph is the model."""

from __future__ import annotations

import contextlib
import inspect
import traceback
import warnings
from collections.abc import Iterable, Iterator
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from mixcomp.canonical import aten, canonicalize
from mixcomp.config import patterns
from mixcomp.dynamo import capture_dynamo
from mixcomp.errors import CaptureError, InputError
from mixcomp.program import Program
from mixcomp.sites import find_sites

__all__ = ["capture", "capture_dynamo"]

#: batch and length of the example; both stay dynamic, and neither is 1, which tracing would take for a constant
EXAMPLE = (2, 16)
#: lengths on which graph and model are compared: one beyond the example and the usual chunk of 64, or else a short one
PROBES = (80, 5)
#: attention that can be traced; others are exchanged for "sdpa" while tracing
TRACEABLE = (None, "eager", "sdpa")
#: relative difference of graph and model that arithmetic explains: attention may run another kernel in the graph, and
#: a deep model of random 16-bit weights turns that into a few percent; a branch taken differently shows as tens
MOST_DIFFERENT = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.15, torch.float16: 0.05}
_BRANCHES = "its forward branches on sizes or data, or draws random numbers in eval mode, and cannot be compiled"
#: attribute of ``_Tokens`` that holds the user's model
_INNER = "model"


def capture(
    model: nn.Module, *, include: Iterable[str] = (), exclude: Iterable[str] = (), min_coverage: float = 0.9
) -> Program:
    """Trace a language model to a graph whose linears are all one op, and say of every weight what can be done with it.

    Before, GPT-2's modules (a Conv1D and a Linear)::

        x2d = x.view(-1, x.size(-1))                              transformer.h.0.attn.c_attn
        y = torch.addmm(self.bias, x2d, self.weight)
        logits = nn.functional.linear(h, self.weight)             lm_head

    After, nodes of ``program.graph_module`` and its sites::

        %9 = linear(%8, @transformer.h.0.attn.c_attn.weight, @transformer.h.0.attn.c_attn.bias, transposed)
        %80 = linear(%79, @lm_head.weight)
        transformer.h.0.attn.c_attn    192 x 64, calls %9, input %7
        lm_head                        128 x 64, left alone: tied to the embedding transformer.wte.weight

    Args:
        model: takes token ids int64[batch, length] as its first argument; a transformers model is run without a cache.
            It is left as it was: same mode, hooks, parameters and random state, also after an error.
        include: patterns of sites to add to the scope, which is every linear but the output head.
        exclude: patterns of sites to take out of it.  See ``patterns.matches``.
        min_coverage: least share (0..1) of the weights in scope that must be compilable.

    Returns:
        A program whose graph is called as ``graph_module(input_ids)`` with any batch and length, returns what the model
        returns, and shares the model's parameters.

    Raises:
        InputError: not a model, compiled before, without values (meta), on several devices, or without any linear.
        CaptureError: tracing failed, the graph computes something else, or too few weights can be compiled.
        ConfigError: a pattern matches nothing.
        WeightError: a weight holds NaN or infinity.
    """
    include, exclude = patterns("include", include), patterns("exclude", exclude)
    _require_model(model)
    device = _require_one_device(model)
    with _evaluating(model, device), _plain_attention(model), torch.no_grad():
        tokens = _Tokens(model)
        module = canonicalize(_adopt(_export(tokens, _example(model, device))))
        sites = find_sites(module, model, include, exclude, min_coverage)
        _require_same(module, tokens, device)
    return Program(module, sites)


class _Tokens(nn.Module):
    """The model as a function of its token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = False
        self.add_module(_INNER, model)
        parameters = inspect.signature(model.forward).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        cached = "use_cache" in parameters or (anything and hasattr(getattr(model, "config", None), "use_cache"))
        self.constants = {"use_cache": False} if cached else {}

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.get_submodule(_INNER)(input_ids, **self.constants)


def _require_model(model: object) -> None:
    if isinstance(model, type):
        raise InputError(f"model is the class {model.__name__}; pass an instance, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module; pass the model itself")
    for path, part in model.named_modules():
        where = path or "the model"
        if type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None:
            raise InputError(f"{where} has been through torch.compile; compile with mixcomp first, torch.compile after")
        if type(part).__name__ == "MixedLinear":
            raise InputError(f"{where} is a MixedLinear: the model is compiled already; start from the original model")
        if isinstance(part, torch.jit.ScriptModule):
            raise InputError(f"{where} is a TorchScript module, which cannot be traced; pass the Python model")


def _require_one_device(model: nn.Module) -> torch.device:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    meta = [path for path, tensor in tensors if tensor.is_meta]
    if meta:
        raise InputError(
            f"{len(meta)} tensors are on the meta device and hold no values: {', '.join(meta[:5])}"
            f"{' ...' if len(meta) > 5 else ''}; load the weights first"
        )
    devices = {tensor.device: path for path, tensor in reversed(tensors)}
    if len(devices) > 1:
        places = ", ".join(f"{path} on {device}" for device, path in sorted(devices.items(), key=lambda d: str(d[0])))
        raise InputError(f"the model is on {len(devices)} devices ({places}); move it to one with model.to(device)")
    return next(iter(devices), torch.device("cpu"))


@contextlib.contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Every module in eval mode, and the mode of each, and the random state, put back afterwards.

    Flags are set directly, because a module's own ``train()`` may do more, such as merging adapters.
    """
    modes = [(part, part.training) for part in model.modules()]
    devices = [device] if device.type == "cuda" else []
    try:
        for part, _ in modes:
            part.training = False
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """PyTorch's own attention meanwhile, where the model uses a kernel that cannot be traced."""
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", None)
    choose = getattr(model, "set_attn_implementation", None)
    if chosen in TRACEABLE or not callable(choose):
        yield
        return
    choose("sdpa")
    try:
        yield
    finally:
        choose(chosen)


def _example(model: nn.Module, device: torch.device) -> torch.Tensor:
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = EXAMPLE[1] if not isinstance(positions, int) else max(2, min(EXAMPLE[1], positions // 2))
    return torch.zeros(EXAMPLE[0], length, dtype=torch.int64, device=device)


def _export(tokens: _Tokens, example: torch.Tensor) -> fx.GraphModule:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"input_ids": {0: dynamic, 1: dynamic}}
    try:
        with contextlib.redirect_stderr(StringIO()), warnings.catch_warnings():  # failing, torch prints the graph
            warnings.simplefilter("ignore")
            program = torch.export.export(tokens, (example,), dynamic_shapes=shapes, strict=False)
            if any(n.op == "call_function" and _writes(n) for n in program.graph.nodes):
                program = program.run_decompositions({})  # traces once more, with writes in place made functional
            return program.module()
    except Exception as error:  # tracing runs the user's code, which may raise anything
        name = type(tokens.get_submodule(_INNER)).__name__
        raise CaptureError(f"{name} cannot be traced: {_reason(error)}{_source_line(error.__traceback__)}") from error


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:500]}"


def _source_line(trace: TracebackType | None) -> str:
    """The innermost line of the traceback that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__)
    frames = [f for f in traceback.extract_tb(trace) if not f.filename.startswith(ours)]
    return f"\n  in {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _adopt(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with the paths of the user's model instead of those of ``_Tokens``."""
    prefix = f"{_INNER}."
    held: dict[str, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            module.graph.erase_node(node)
        elif node.op in ("get_attr", "call_module"):
            path, _, name = str(node.target).rpartition(".")
            target = str(node.target).removeprefix(prefix)
            held[target] = getattr(module.get_submodule(path), name)
            node.target = target
        stack = node.meta.get("nn_module_stack", {})
        paths = {key: (path.removeprefix(_INNER).removeprefix("."), kind) for key, (path, kind) in stack.items()}
        node.meta["nn_module_stack"] = paths
    return fx.GraphModule(held, module.graph, "Captured")


def _require_same(module: fx.GraphModule, tokens: _Tokens, device: torch.device) -> None:
    """Run graph and model on tokens of another shape than the example's: branches on data or sizes show here."""
    tables = [n.args[0].meta["val"].shape[0] for n in module.graph.nodes if n.target is aten.embedding.default]
    draw = torch.Generator().manual_seed(0)
    for length in PROBES:
        probe = torch.randint(0, min(tables, default=2), (1, length), generator=draw).to(device)
        try:
            wanted = tokens(probe)
        except Exception as error:  # the model's own: longer than its table of positions, most likely
            if length == PROBES[-1]:
                raise CaptureError(f"the model fails on {length} tokens: {_reason(error)}") from error
            continue
        try:
            difference = _difference(wanted, module(probe))
        except Exception as error:  # what the example's sizes allowed and these do not
            raise CaptureError(f"the graph fails on {length} tokens: {_reason(error)}; {_BRANCHES}") from error
        if not difference < MOST_DIFFERENT[_coarsest(module)]:
            raise CaptureError(f"on {length} tokens graph and model differ by {difference:.3g}; {_BRANCHES}")
        return


def _coarsest(module: fx.GraphModule) -> torch.dtype:
    """The least precise of the model's dtypes that arithmetic is done in."""
    held = {p.dtype for p in module.parameters()} & set(MOST_DIFFERENT)
    return max(held, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _difference(wanted: Any, got: Any) -> float:
    """Largest relative difference (Frobenius norm) of two outputs' tensors; a different structure is infinitely far."""
    left, right = ([t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)] for out in (wanted, got))
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    return max((_distance(a.double(), b.double()) for a, b in zip(left, right, strict=True)), default=0.0)


def _distance(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Infinite and undefined elements (masked logits) have to agree, and count as no difference then."""
    same = (wanted == got) | (wanted.isnan() & got.isnan())
    scale = wanted[wanted.isfinite()].norm().clamp_min(1e-30)
    return float(torch.where(same, 0.0, wanted - got).norm() / scale)
