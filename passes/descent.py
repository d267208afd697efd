"""Adam on the learned tensors of tunable weights, with a warm-up and rates that fall to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self

import torch

from mixcomp.passes.tunable import Quantized

WARM_UP = 10
BETAS = (0.9, 0.95)


class Descent:
    """``with Descent(tunables, rates, steps) as d: d.step(loss)``; tensors record gradients inside the block only.

    ``rates`` maps the names of ``Tunable.learned`` to the rate of the first full step.
    """

    def __init__(self, tuned: Iterable[Quantized], rates: Mapping[str, float], steps: int) -> None:
        found = [(tensor, rates[name]) for one in tuned for name, tensor in one.learned().items()]
        self._tensors = [tensor for tensor, _ in found]
        same = {rate: [t for t, own in found if own == rate] for rate in sorted({rate for _, rate in found})}
        groups = [{"params": tensors, "lr": rate, "full": rate} for rate, tensors in same.items()]
        # gradients of a mean over many tokens are tiny: the usual epsilon would stop small ones
        fused = self._tensors[0].is_cuda
        self._adam = torch.optim.Adam(groups, betas=BETAS, eps=1e-20, fused=fused)
        self._done, self._steps = 0, steps

    def step(self, loss: Callable[[], torch.Tensor]) -> None:
        """One step down ``loss()``, which may run its own backward pass and return a tensor without a gradient."""
        share = min(1.0, (self._done + 1) / WARM_UP) * (1 - self._done / self._steps)
        for group in self._adam.param_groups:
            group["lr"] = group["full"] * share
        with torch.enable_grad():
            value = loss()
            if value.requires_grad:
                value.backward()
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._done += 1

    def __enter__(self) -> Self:
        for tensor in self._tensors:
            tensor.requires_grad_()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tensor in self._tensors:
            tensor.requires_grad_(False)
            tensor.grad = None
