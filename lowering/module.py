"""``MixedLinear``: the module that stands where a linear layer stood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mixcomp.config import ACTIVATIONS, one_of
from mixcomp.format import NAMES
from mixcomp.lowering import gpu
from mixcomp.lowering.ops import MIXED_LINEAR, compute, may_skip_dispatcher
from mixcomp.lowering.select import takes_fragments
from mixcomp.packed import PackedWeight

#: integers through which floating-point buffers of the format pass casts and moves unharmed
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class OriginalWeight:
    """What is left of the weight that was compiled.

    No tensor on purpose: torch computes with an empty one, even with one on the meta device (on a CPU, ``linear`` then
    returns whatever lies in memory), while any use of this is a ``TypeError``.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class MixedLinear(nn.Module):
    """``y = x W^T + b`` with W as stored bytes.  For inference: it has no parameters and no gradient.

    Buffers are named as in ``mixcomp.format``; those the format does not have are None.  Moving the module moves them;
    casting it (``.half()``, ``.to(dtype)``) casts the bias and nothing else, because stored numbers are not to be
    rounded again.  On a GPU whose kernels read fragments, the buffers ``codes`` and ``scales`` are fragments (``gpu``);
    the state dict and ``packed`` show the stored bytes everywhere.

    Args:
        weight: the stored weight; its tensors become the buffers.
        bias: floating[rows] in output order, or None.
        dtype: what ``weight.dtype`` is to say, by default that of the bias, else torch's default.  Activations of
            any floating dtype are taken; the result has theirs.
        activations: ``"int8"`` rounds them where they are many (``int8``).
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        activations: str = "native",
    ) -> None:
        super().__init__()
        one_of("activations", activations, ACTIVATIONS)
        self.fmt, self.activations = weight.fmt, activations
        self.in_features, self.out_features = weight.fmt.columns, weight.fmt.rows
        self.dtype = dtype or (torch.get_default_dtype() if bias is None else bias.dtype)
        self._segments = weight.fmt.constants()
        stored = weight.tensors()
        for name in NAMES:
            self.register_buffer(name, stored.get(name))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.settle()

    def settle(self) -> None:
        """Take the form that the device of the buffers wants, if somebody put stored bytes there buffer by buffer."""
        self._hold(takes_fragments(self.get_buffer("codes").device.type, self.fmt))

    def _hold(self, fragments: bool) -> None:
        codes, scales = self._buffers["codes"], self._buffers["scales"]
        if codes is None or scales is None or gpu.are_fragments(codes) == fragments:
            return
        change = gpu.to_fragments if fragments else gpu.to_stored
        self._buffers["codes"], self._buffers["scales"] = change(codes, scales, self.fmt)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x floating[..., in_features] -> [..., out_features] of x's dtype."""
        held = self._buffers  # ten times as fast as attributes, which a Module looks up in three dicts
        tensors = (
            held["codes"],
            held["scales"],
            held["factors"],
            held["row_index"],
            held["branch_a"],
            held["branch_b"],
            held["branch_scale"],
        )
        more = (held["zeros"], held["offsets"], held["group_index"]) if self.fmt.departure else ()
        if may_skip_dispatcher(x):
            return compute(x, self.fmt, tensors, held["bias"], more, self.activations)
        form = (*more, self.fmt.group, int(self.fmt.scales)) if more else ()
        kind = {} if self.activations == "native" else {"activations": self.activations}
        out: torch.Tensor = MIXED_LINEAR(x, *tensors, held["bias"], self._segments, self.in_features, *form, **kind)
        return out

    def packed(self) -> PackedWeight:
        """The stored weight; its tensors are the module's buffers, not copies, but for fragments, which are unpacked."""
        held = {name: self.get_buffer(name) for name in self.fmt.tensors()}
        if gpu.are_fragments(held["codes"]):
            held["codes"], held["scales"] = gpu.shown(held["codes"], held["scales"], self.fmt)
        return PackedWeight.from_tensors(self.fmt, held)

    @property
    def weight(self) -> OriginalWeight:
        """For code that asks a layer what it computes in, as Mamba does with ``lm_head.weight.dtype``.

        The numbers come from ``packed().dequantize()``.
        """
        return OriginalWeight(
            torch.Size((self.out_features, self.in_features)), self.dtype, self.get_buffer("codes").device
        )

    def extra_repr(self) -> str:
        widths: Counter[str] = Counter()
        for segment in self.fmt.segments:
            widths[segment.label] += segment.rows
        rows = " ".join(f"{width}x{widths[width]}" for width in sorted(widths))
        bits = self.fmt.stored_bits() / self.fmt.weights
        order = "scatter, " if self.fmt.scatter else ""
        kind = "" if self.activations == "native" else f", {self.activations} activations"
        return f"{self.in_features} -> {self.out_features}, {bits:.2f} bits ({rows}), {order}rank {self.fmt.rank}{kind}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MixedLinear:
        """Move and cast as torch does, with the format's floating-point buffers disguised as integers."""
        floats = {n: b for n, b in self._buffers.items() if n != "bias" and b is not None and b.is_floating_point()}
        for name, buffer in floats.items():
            self._buffers[name] = buffer.view(_BITS[buffer.itemsize])
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        finally:
            for name, buffer in floats.items():
                moved: Any = self._buffers[name]
                self._buffers[name] = moved.view(buffer.dtype)
        self.settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if gpu.are_fragments(self.get_buffer("codes")):
            stored = self.packed()
            destination |= {prefix + "codes": stored.codes, prefix + "scales": stored.scales}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._hold(False)
        try:
            super()._load_from_state_dict(*args)
        finally:
            self.settle()
