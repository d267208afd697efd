"""collect-statistics: what the calibration text says about every linear's inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from mixcomp.errors import CalibrationError
from mixcomp.passes.backward import Backward
from mixcomp.passes.watch import FORWARD_TOKENS, Watch, regroup, sampled_residual
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context, Pass

#: tokens of context that a window of the backward pass keeps at least
SHORTEST = 256
#: bytes of second moments that may stay on a GPU; more than that (33 GB for 8 B parameters) wait in main memory
MOMENT_BYTES = 4 << 30


@dataclass(frozen=True)
class CollectStatistics(Pass):
    """Second moments of the inputs, and how strongly the loss reacts to the outputs.

    For ``y = W x`` the loss changes by about ``1/2 sum_t (sum_c g_tc^2 (E x_t)_c^2)`` when W changes by E, g = dL/dy of
    token t.  K-FAC's form of it, ``1/2 tr(G E S E^T)`` with ``G = diag E[g^2]``, takes every token for equally
    important; here ``S = sum_t w_t x_t x_t^T / sum_t w_t`` with ``w_t = |g_t|`` (relative to its mean, averaged over the
    sites that read x).  |g_t|^2 would be the exact average over output features and measured the same; its square root
    rests on more tokens.  Gradients come from backward passes whose labels are sampled from the model itself.  Sites that
    read the same activation share one S.

    Before::

        %3 = linear(%2, @layers.0.q_proj)

    After, the same graph and in the table::

        rms/sigma               fp32[576, 576]   S
        layers.0.q_proj/gamma   fp32[576]        E[(dL/dy)^2], L the summed negative log-likelihood

    Options:
        gradient_tokens: tokens that take part in backward passes, the first of the calibration text; all others have
            weight 1.
    """

    name: ClassVar[str] = "collect-statistics"
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS})

    gradient_tokens: int = 65536

    def run(self, program: Program, context: Context) -> Program:
        if not context.batches:
            raise CalibrationError("collect-statistics has no calibration tokens; give at least one batch")
        sums = _Sums.of(program, context.device)
        backward = Backward.of(program, context.device)
        with_gradients, without = _split_batches(context, self.gradient_tokens, backward.tokens)
        self._backward(backward, context, with_gradients, sums)
        self._forward(program, context, without, sums)
        return program.with_tensors(sums.means())

    def _backward(self, backward: Backward, context: Context, batches: list[torch.Tensor], sums: _Sums) -> None:
        for number, batch in enumerate(context.track("sensitivities", batches)):
            draw = context.generator(self.name, f"labels {number}")
            backward.run(batch.to(context.device), partial(sampled_residual, draw=draw), sums.add)

    def _forward(self, program: Program, context: Context, batches: list[torch.Tensor], sums: _Sums) -> None:
        watch = Watch(program.graph_module, lambda name, x, _: sums.add(name, x, None), context.device)
        for batch in context.track("second moments", batches):
            with torch.no_grad():
                watch.run(batch.to(context.device))


@dataclass(slots=True, eq=False)
class _Sums:
    """Running sums: ``sigma`` of weighted outer products and their weights by input, ``gamma`` of squares and their
    number of tokens by site.  Those in main memory visit the device one at a time."""

    device: torch.device
    sites: dict[str, Site]
    sigma: dict[str, torch.Tensor]
    weight: dict[str, torch.Tensor]
    gamma: dict[str, torch.Tensor]
    tokens: dict[str, int]

    @classmethod
    def of(cls, program: Program, device: torch.device) -> _Sums:
        sites = {s.name: s for s in program.open_sites()}
        waiting = moments_device(program, device) != device
        sigma = {
            # pinned, so that copies run at the speed of the bus
            s.input: torch.zeros(s.columns, s.columns, device=None if waiting else device, pin_memory=waiting)
            for s in {s.input: s for s in sites.values()}.values()
        }
        weight = {name: torch.zeros((), device=device) for name in sigma}
        gamma = {name: torch.zeros(s.rows, device=device) for name, s in sites.items()}
        return cls(device, sites, sigma, weight, gamma, dict.fromkeys(sites, 0))

    def add(self, name: str, x: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """Inputs [..., columns] of a site and the gradient [..., rows] of its outputs."""
        site = self.sites.get(name)
        if site is None:
            return
        x, weight = x.reshape(-1, x.shape[-1]), None
        if gradient is not None:
            squares = gradient.reshape(-1, gradient.shape[-1]).float().square()
            self.gamma[name] += squares.sum(0)
            self.tokens[name] += len(x)
            strength = squares.sum(1).sqrt()
            weight = strength / strength.mean().clamp_min(torch.finfo(torch.float32).tiny)
        with self._visiting(site.input) as total:
            _add_outer(total, x, weight)
        self.weight[site.input] += len(x) if weight is None else weight.sum()

    def means(self) -> dict[str, torch.Tensor]:
        """What goes into the table."""
        out = {}
        for name, total in self.gamma.items():
            if not torch.isfinite(total).all():
                raise CalibrationError(
                    f"NaN or infinity in the gradient at {name!r}; use more finite calibration text or fp32"
                )
            out[f"{name}/gamma"] = total / max(1, self.tokens[name])
        for name, sigma in self.sigma.items():
            with self._visiting(name) as total:
                total.div_(self.weight[name])
                if not torch.isfinite(total).all():
                    raise CalibrationError(f"NaN or infinity in the input of {name!r}; no site saw finite data")
            out[f"{name}/sigma"] = sigma
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # copies to main memory are still under way
        return out

    @contextmanager
    def _visiting(self, name: str) -> Iterator[torch.Tensor]:
        """A sum of outer products on the device, to be changed in place.  Copies stand in line with the arithmetic."""
        held = self.sigma[name]
        total = held.to(self.device, non_blocking=True)
        yield total
        if total is not held:
            held.copy_(total, non_blocking=True)


def moments_device(program: Program, device: torch.device) -> torch.device:
    """Where the second moments of all inputs are kept: on ``device``, or in main memory if they are too large."""
    bytes_of = {s.input: 4 * s.columns**2 for s in program.open_sites()}
    return device if sum(bytes_of.values()) <= MOMENT_BYTES else torch.device("cpu")


def _add_outer(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None) -> None:
    """total += x^T diag(weight) x, summed in fp32."""
    scaled = x.float() if weight is None else x.float() * weight.sqrt()[:, None]
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        # half the digits, all of the range: products of bf16 numbers are exact in fp32
        scaled = scaled.bfloat16() if weight is not None else x
        total += torch.mm(scaled.T, scaled, out_dtype=torch.float32)
    else:
        total.addmm_(scaled.T, scaled)


def _split_batches(context: Context, gradient_tokens: int, limit: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Batches of at most ``limit`` tokens for backward passes, and the rest for forward passes; the same however the text
    came in batches."""
    windows = [window for batch in context.batches for window in batch.split(1)]
    count = max(1, gradient_tokens // windows[0].shape[1])
    shortest = max(limit, SHORTEST)  # windows of a model too large for whole ones are cut, and end pieces dropped
    pieces = [p for w in windows[:count] for p in w.split(shortest, 1) if p.shape[1] == min(shortest, w.shape[1])]
    return regroup(pieces, limit), regroup(windows[count:], FORWARD_TOKENS[context.device.type])
