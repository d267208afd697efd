"""Running a captured graph on calibration tokens while every linear is watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import fx

from mixcomp.ops import LINEAR
from mixcomp.program import META

#: tokens of one forward pass without gradients
FORWARD_TOKENS = {"cpu": 1024, "cuda": 16384}


#: what sees a linear's name, input and output (or the output's gradient)
Tap = Callable[[str, torch.Tensor, torch.Tensor], None]


class Watch(fx.Interpreter):
    """Runs the graph and shows every canonical linear's input and output to ``tap(site, x, y)``.

    Parameters are detached, so a backward pass reaches activations only.  On a CPU, where 16-bit arithmetic is slow and
    coarse, a 16-bit model runs in fp32: weights are widened at their use, so no second copy of the model exists.
    """

    def __init__(self, module: fx.GraphModule, tap: Tap, device: torch.device) -> None:
        super().__init__(module)
        self.tap = tap
        self.widen = device.type != "cuda"

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            value = self.fetch_attr(str(n.target))
            at_use = all(user.target in (LINEAR, _EMBEDDING) for user in n.users)
            return self.wide(value.detach(), not at_use) if isinstance(value, torch.Tensor) else value
        if n.op != "call_function" or n.target is _ASSERT_METADATA:
            return None if n.target is _ASSERT_METADATA else super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is LINEAR:
            x, weight, bias, transposed = args
            y = LINEAR(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), transposed)
            self.tap(n.meta.get(META, ""), x.detach(), y)
            return y
        if self.widen:
            args, kwargs = fx.node.map_aggregate((args, kwargs), _wide_dtype)
        return fx.node.map_aggregate(n.target(*args, **kwargs), self.wide)  # type: ignore[operator]

    def wide(self, value: Any, wanted: bool = True) -> Any:
        """A 16-bit tensor in fp32 where this graph runs in it, if ``wanted``; anything else as it is."""
        narrow = isinstance(value, torch.Tensor) and value.dtype in _NARROW
        return value.float() if self.widen and wanted and narrow else value


_NARROW = (torch.float16, torch.bfloat16)
_EMBEDDING = torch.ops.aten.embedding.default
_ASSERT_METADATA = torch.ops.aten._assert_tensor_metadata.default


def _wide_dtype(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in _NARROW else value


def sampled_residual(logits: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Gradient of the summed loss at the logits, ``p - onehot(label)``, with labels drawn from p itself."""
    out = torch.empty_like(logits).view(-1, logits.shape[-1])
    every = torch.arange(logits.shape[-1], device=logits.device)
    own = torch.Generator(logits.device).manual_seed(draw.initial_seed())
    for given, made in zip(logits.reshape(out.shape).split(512), out.split(512), strict=True):  # fp32 of 512 tokens
        p = torch.softmax(given.float(), -1)
        # the first of racing exponential clocks with rates p rings with probability p
        label = (p / torch.empty_like(p).exponential_(generator=own)).argmax(-1, keepdim=True)
        made.copy_(p.sub_((every == label).float()))
    return out.view(logits.shape)


def regroup(windows: Sequence[torch.Tensor], tokens: int) -> list[torch.Tensor]:
    """Windows int64[1, length] as batches of neighbours of one length, none of more than ``tokens`` if it can be."""
    return [
        batch
        for length, run in groupby(windows, lambda w: w.shape[1])
        for batch in torch.cat(list(run)).split(max(1, tokens // max(length, 1)))
    ]
