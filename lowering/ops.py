"""``mixcomp::mixed_linear``: the operator every compiled linear calls, whoever computes it in the end.

A plain ``torch.library`` registration: on the way to the kernel it costs half of what ``custom_op`` does, and a decoder
makes hundreds of calls per token.  Gradients stop here with a clear error, also in a graph that AOTAutograd traced.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch

from mixcomp.config import ACTIVATIONS, one_of
from mixcomp.errors import ConfigError, MixCompError
from mixcomp.format import GROUP, SiteFormat, from_constants
from mixcomp.lowering import cpu, gpu, int8, reference
from mixcomp.lowering.select import Path, choose_path
from mixcomp.packed import PackedWeight

_TAGS = (torch.Tag.pt2_compliant_tag,)
_library = torch.library.Library("mixcomp", "FRAGMENT")
_library.define(
    "mixed_linear(Tensor x, Tensor codes, Tensor? scales, Tensor factors, Tensor? row_index, Tensor? branch_a, "
    "Tensor? branch_b, Tensor? branch_scale, Tensor? bias, int[] segments, int columns, "
    "Tensor? zeros=None, Tensor? offsets=None, Tensor? group_index=None, int group=32, int scale_kind=0, "
    "str activations='native') -> Tensor",
    tags=_TAGS,
)
_library.define("no_gradient(Tensor grad, SymInt[] shape) -> Tensor", tags=_TAGS)

#: x[..., columns] -> [..., rows] of x's dtype; tensors as in ``mixcomp.format``, or codes and scales as fragments (which
#: alone have kernels on a GPU), bias in output order,
#: segments flattened to [rows, width, rows, width, ...], see ``SiteFormat.constants``; what comes after columns is
#: given where a site is not in the default format, or its activations are not (``int8``)
MIXED_LINEAR = torch.ops.mixcomp.mixed_linear.default
#: paths that read fragments, and what launches them; stored bytes on a GPU, as a graph may hold them, take a plain one
_KERNELS = {
    Path.TRITON: "mixed_linear",
    Path.TRITON_GEMM: "expanded_linear",
    Path.TRITON_INT8: "int8_linear",
}
#: place of ``columns`` after ``factors``
_COLUMNS = 6
_NO_GRADIENT = torch.ops.mixcomp.no_gradient.default


def mixed_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    factors: torch.Tensor,
    row_index: torch.Tensor | None,
    branch_a: torch.Tensor | None,
    branch_b: torch.Tensor | None,
    branch_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    segments: list[int],
    columns: int,
    zeros: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    group: int = GROUP,
    scale_kind: int = 0,
    activations: str = "native",
) -> torch.Tensor:
    """``MIXED_LINEAR`` as torch's dispatcher calls it: the format in numbers."""
    one_of("activations", activations, ACTIVATIONS)
    rank = 0 if branch_a is None else branch_a.shape[1]
    fmt = _format(tuple(segments), columns, row_index is not None, rank, group, scale_kind)
    held = codes, scales, factors, row_index, branch_a, branch_b, branch_scale
    return compute(x, fmt, held, bias, (zeros, offsets, group_index), activations)


def compute(
    x: torch.Tensor, fmt: SiteFormat, held: tuple[Any, ...], bias: torch.Tensor | None, more: tuple[Any, ...] = (),
    activations: str = "native",
) -> torch.Tensor:  # fmt: skip
    """``MIXED_LINEAR`` without torch's dispatcher in between; for callers that ``may_skip_dispatcher``.

    ``held``: tensors of the format from codes to branch_scale; ``more``: zeros, offsets and group index of a site that is
    not in the default one.
    """
    _check(x, held[0], fmt.columns)
    flat = x.reshape(-1, fmt.columns)
    if not flat.shape[0]:
        return x.new_empty((*x.shape[:-1], fmt.rows))
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            out = _run(flat, bias, fmt, held, more, activations)
    else:
        out = _run(flat, bias, fmt, held, more, activations)
    return out.view(*x.shape[:-1], fmt.rows)


def may_skip_dispatcher(x: torch.Tensor) -> bool:
    """Whether nobody would notice: no gradient, no tracing, no mode and no transform is at work on ``x``.

    The way through the dispatcher takes 20 to 40 us on a CPU, as long as a small linear.
    """
    return not (
        torch.compiler.is_compiling()
        or type(x) is not torch.Tensor
        or (x.requires_grad and torch.is_grad_enabled())
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@cache
def _launch() -> Any:
    """The kernels; on the way to a launch even the look for a loaded module takes a microsecond."""
    from mixcomp.kernels import launch

    return launch


def _run(
    x: torch.Tensor, bias: torch.Tensor | None, fmt: SiteFormat, held: tuple[Any, ...], more: tuple[Any, ...],
    activations: str,
) -> torch.Tensor:  # fmt: skip
    """x[tokens, columns], at least one token."""
    path = choose_path(x.device.type, x.dtype, fmt, x.shape[0], activations)
    codes, scales, *rest = held
    if scales is not None and gpu.are_fragments(codes):
        if path in _KERNELS:
            out: torch.Tensor = getattr(_launch(), _KERNELS[path])(x, *held, bias, fmt)
            return out
        codes, scales = gpu.to_stored(codes, scales, fmt)
    weight = PackedWeight(fmt, codes, scales, *rest, *more)
    if path is Path.CPU_BAGS:
        return cpu.by_bags(x, cpu.table_form(weight), bias)
    if path is Path.CPU_GEMM:
        return cpu.by_gemm(x, cpu.table_form(weight), bias)
    if path in (Path.INT8, Path.TRITON_INT8):
        return int8.mixed_linear(x, weight, bias)
    return reference.mixed_linear(x, weight, bias)


def _check(x: torch.Tensor, codes: torch.Tensor, columns: int) -> None:
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ConfigError(
            f"mixed_linear: x is {list(x.shape)}, its last dimension must be {columns}, the weight's columns"
        )
    if not x.dtype.is_floating_point:
        raise ConfigError(f"mixed_linear: x is {x.dtype}; give floating-point activations")
    if x.device != codes.device:
        raise ConfigError(f"mixed_linear: x is on {x.device}, the weight on {codes.device}; move one of them")


_format = lru_cache(maxsize=4096)(from_constants)


def _fake(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, factors: torch.Tensor, *rest: Any
) -> torch.Tensor:
    _check(x, codes, rest[_COLUMNS])
    return x.new_empty((*x.shape[:-1], factors.shape[0]))


class _Inference(torch.autograd.Function):
    """The op inside a graph that records gradients: it runs, and going back through it is an error."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        ctx.shape, ctx.inputs = x.shape, 1 + len(rest)
        with torch._C._AutoDispatchBelowAutograd():
            out: torch.Tensor = MIXED_LINEAR(x, *rest)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (_NO_GRADIENT(grad, ctx.shape), *[None] * (ctx.inputs - 1))


def _autograd(*args: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
        return _Inference.apply(*args)  # type: ignore[no-untyped-call, no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        out: torch.Tensor = MIXED_LINEAR(*args)
    return out


def _no_gradient(grad: torch.Tensor, shape: list[int]) -> torch.Tensor:
    raise MixCompError(
        "a compiled linear has no gradient: it is for inference only; run under torch.no_grad(), or train the "
        "original model and compile it afterwards"
    )


_library.impl("mixed_linear", mixed_linear, "CompositeExplicitAutograd")
_library.impl("mixed_linear", _autograd, "Autograd")
_library.impl("no_gradient", _no_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("mixcomp::mixed_linear", _fake, lib=_library)
torch.library.register_fake("mixcomp::no_gradient", lambda grad, shape: grad.new_empty(shape), lib=_library)
