"""Adam on the learned tensors of tunable weights, with a warm-up and rates that fall to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch

from mixcomp.passes.tunable import Quantized

WARM_UP = 10
BETAS = (0.9, 0.95)
#: steps before a step is recorded: libraries set themselves up in the first ones
_BEFORE_RECORDING = 3


def descend(
    tuned: Iterable[Quantized],
    rates: Mapping[str, float],
    picks: Sequence[torch.Tensor],
    differentiate: Callable[[torch.Tensor], None],
) -> None:
    """Change the learned tensors of ``tuned`` by one step of Adam for each of ``picks``, int64[windows] of one size.

    ``rates`` maps the names of ``Quantized.learned`` to the rate of the first full step, and what it does not name stays;
    ``differentiate(pick)`` leaves the gradients of the loss of some windows in the tensors.  A step is a thousand small
    kernels: on a GPU it is recorded once and played back, so nothing in it may wait for the GPU.

    Equal calls give equal bits on a CPU, and on a GPU where ``torch.use_deterministic_algorithms`` asks for it: the
    attention kernel that adds in a fixed order takes eight times as long, a step of a small model twice.
    """
    found = [(tensor, rates[name]) for one in tuned for name, tensor in one.learned().items() if name in rates]
    tensors, device = [tensor for tensor, _ in found], found[0][0].device
    on_gpu = device.type == "cuda"
    groups = [
        {"params": [t for t, own in found if own == rate], "lr": torch.zeros((), device=device), "full": rate}
        for rate in sorted({rate for _, rate in found})
    ]
    # gradients of a mean over many tokens are tiny: the usual epsilon would stop small ones
    adam = torch.optim.Adam(groups, betas=BETAS, eps=1e-20, fused=True, capturable=on_gpu)
    pick, graph = picks[0].to(device, copy=True), None

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        differentiate(pick)
        adam.step()

    with ExitStack() as stack:
        stack.enter_context(_recording_gradients(tensors))
        if on_gpu:
            stack.enter_context(_own_stream(device))
        for done, chosen in enumerate(picks):
            share = min(1.0, (done + 1) / WARM_UP) * (1 - done / len(picks))
            for group in adam.param_groups:
                group["lr"].fill_(group["full"] * share)
            pick.copy_(chosen)
            if on_gpu and done == _BEFORE_RECORDING:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                    step()
            if graph is None:
                step()
            else:
                graph.replay()


@contextmanager
def _recording_gradients(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    for tensor in tensors:
        tensor.requires_grad_()
    try:
        with torch.enable_grad():
            yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)
            tensor.grad = None


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A stream that can be recorded, ordered after what came before and before what comes after."""
    outer, inner = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    inner.wait_stream(outer)
    with torch.cuda.stream(inner):
        yield
    outer.wait_stream(inner)
