"""collect-statistics: what the calibration text says about every linear's inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mixcomp.errors import CalibrationError
from mixcomp.passes.watch import FORWARD_TOKENS, Watch, logits_of, resize
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context, Pass

#: bytes of activations one backward pass may keep alive
BACKWARD_BYTES = 8 << 30
#: tokens of context that a window of the backward pass keeps at least
SHORTEST = 256


@dataclass(frozen=True)
class CollectStatistics(Pass):
    """Second moments of the inputs, and how strongly the loss reacts to the outputs.

    For ``y = W x`` the loss changes by about ``1/2 tr(G E S E^T)`` when W changes by E (K-FAC form of the Fisher
    information), with ``S = E[x x^T]`` from one forward pass and ``G = diag E[(dL/dy)^2]`` from one backward pass whose
    labels are sampled from the model itself.  Sites that read the same activation share one S.

    Before::

        %3 = linear(%2, @layers.0.q_proj)

    After, the same graph and in the table::

        rms/sigma               fp32[576, 576]   E[x x^T] over all tokens
        layers.0.q_proj/gamma   fp32[576]        E[(dL/dy)^2], L the summed negative log-likelihood

    Options:
        gradient_tokens: tokens that take part in the backward pass; the first of the calibration text.
    """

    name: ClassVar[str] = "collect-statistics"
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS})

    gradient_tokens: int = 65536

    def run(self, program: Program, context: Context) -> Program:
        if not context.batches:
            raise CalibrationError("collect-statistics has no calibration tokens; give at least one batch")
        sites = {s.name: s for s in program.open_sites()}
        # the backward pass comes first: its activations and the second moments never share the memory
        gamma = _output_sensitivity(program, sites, context, self.gradient_tokens)
        sigma = _second_moments(program, sites, context)
        return program.with_tensors({**sigma, **gamma})


def _second_moments(program: Program, sites: dict[str, Site], context: Context) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    owner: dict[str, str] = {}  # the first site that reads an input speaks for all of them
    for site in sites.values():
        owner.setdefault(site.input, site.name)
        sums.setdefault(f"{site.input}/sigma", torch.zeros(site.columns, site.columns, device=context.device))
    seen = dict.fromkeys(sums, 0)

    def tap(name: str, x: torch.Tensor, _y: torch.Tensor) -> None:
        site = sites.get(name)
        if site is not None and owner[site.input] == name:
            x = x.reshape(-1, x.shape[-1])
            _add_outer(sums[f"{site.input}/sigma"], x)
            seen[f"{site.input}/sigma"] += len(x)

    watch = Watch(program.graph_module, tap)
    batches = resize(context.batches, FORWARD_TOKENS[context.device.type])
    for batch in context.track("second moments", batches):
        with torch.no_grad():
            watch.run(batch.to(context.device))
    for key, total in sums.items():
        total.div_(seen[key])
        if not torch.isfinite(total).all():
            raise CalibrationError(
                f"NaN or infinity in the input of {key.removesuffix('/sigma')!r}; no site saw finite data"
            )
    return sums


def _add_outer(total: torch.Tensor, x: torch.Tensor) -> None:
    """total += x^T x, summed in fp32; products of 16-bit numbers are exact in it."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        total += torch.mm(x.T, x, out_dtype=torch.float32)
    else:
        x = x.float()
        total.addmm_(x.T, x)


def _output_sensitivity(
    program: Program, sites: dict[str, Site], context: Context, gradient_tokens: int
) -> dict[str, torch.Tensor]:
    sums = {name: torch.zeros(site.rows, device=context.device) for name, site in sites.items()}

    def tap(name: str, _x: torch.Tensor, y: torch.Tensor) -> None:
        if name not in sums:
            return
        if not y.requires_grad:
            y.requires_grad_()
        y.register_hook(lambda g: _add_squares(sums[name], g))

    batches = _gradient_batches(program, context, gradient_tokens)
    watch = Watch(program.graph_module, tap)
    tokens = 0
    for number, batch in enumerate(context.track("output sensitivity", batches)):
        draw = context.generator("collect-statistics", f"labels {number}")
        with torch.enable_grad():
            logits = logits_of(watch.run(batch.to(context.device)))
            logits.backward(_sampled_residual(logits.detach(), draw))
        tokens += batch.numel()
    out = {}
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise CalibrationError(
                f"NaN or infinity in the gradient at {name!r}; use more finite calibration text or fp32"
            )
        out[f"{name}/gamma"] = total / tokens
    return out


def _add_squares(total: torch.Tensor, gradient: torch.Tensor) -> None:
    total += gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)


def _sampled_residual(logits: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Gradient of the summed loss at the logits, ``p - onehot(label)``, with labels drawn from p itself."""
    shape = logits.shape
    out = torch.empty_like(logits).view(-1, shape[-1])
    uniform = torch.rand(out.shape[0], generator=draw, dtype=torch.float64).to(logits.device)
    flat = logits.reshape(-1, shape[-1])
    for start in range(0, out.shape[0], 512):  # fp32 probabilities of 512 tokens at a time
        p = torch.softmax(flat[start : start + 512].float(), -1)
        edge = uniform[start : start + 512, None].float() * p.sum(-1, keepdim=True)
        label = torch.searchsorted(p.cumsum(-1), edge).clamp_(max=shape[-1] - 1)
        out[start : start + 512] = p.scatter_add_(-1, label, torch.full_like(edge, -1.0)).to(out.dtype)
    return out.view(shape)


def _gradient_batches(program: Program, context: Context, gradient_tokens: int) -> list[torch.Tensor]:
    per_token = 3 * sum((s.rows + s.columns) * s.weight.dtype.itemsize for s in program.sites)
    limit = min(BACKWARD_BYTES // max(per_token, 1), FORWARD_TOKENS[context.device.type])
    length = context.batches[0].shape[1]
    batches = resize(context.batches, limit, max(1, gradient_tokens // length))
    shortest = max(limit, SHORTEST)  # windows of a model too large for whole ones are cut, and end pieces dropped
    return [piece for b in batches for piece in b.split(shortest, 1) if piece.shape[1] == min(shortest, length)]
