"""tune-model: rounding and scales of all sites together, by gradients of the distance to the original's predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from mixcomp.passes.stages import Stages, Values, split
from mixcomp.passes.tunable import Tunable
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context, Pass, Semantics

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TuneModel(Pass):
    """Distil the original into the quantized model: KL(original || quantized) by Adam, straight through the rounding."""

    name: ClassVar[str] = "tune-model"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})
    semantics: ClassVar[Semantics] = Semantics.LOSSY

    steps: int = 400
    windows: int = 8
    shift_rate: float = 2e-3
    ratio_rate: float = 3e-4
    group_rate: float = 5e-3
    beta2: float = 0.95
    held: int = 8
    margin: float = 0.25

    def run(self, program: Program, context: Context) -> Program:
        stages = split(program)
        sites = {s.name: s for s in program.open_sites()}
        tuned = {name: Tunable.of(program, site, context.device, self.margin) for name, site in sites.items()}
        original = {name: program.weight(site).detach() for name, site in sites.items()}
        tokens = torch.cat([b for b in context.batches if b.shape[1] == context.batches[0].shape[1]])
        learn, held = tokens[: -self.held], tokens[-self.held :]
        teacher = _hidden(stages, original, tokens.to(context.device))
        dtypes = {name: site.weight.dtype for name, site in sites.items()}
        before = self.distance(stages, tuned, dtypes, held, teacher[-self.held :], original, context)
        self._learn(stages, tuned, dtypes, original, learn, teacher, context)
        after = self.distance(stages, tuned, dtypes, held, teacher[-self.held :], original, context)
        context.progress(f"held-out KL {before:.5f} -> {after:.5f}", 1, 1)
        tensors = {f"{name}/{key}": value for name, one in tuned.items() for key, value in one.stored().items()}
        return program.with_tensors(tensors)

    def _learn(self, stages, tuned, dtypes, original, tokens, teacher, context) -> None:
        for one in tuned.values():
            if not self.shift_rate:
                one.freeze()
            for p in (one.shift, one.ratio, one.group):
                p.requires_grad_()
        rates = {"shift": self.shift_rate, "ratio": self.ratio_rate, "group": self.group_rate}
        groups = [
            {"params": [getattr(one, what) for one in tuned.values()], "lr": rate, "full": rate}
            for what, rate in rates.items() if rate
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, self.beta2), eps=1e-10, fused=context.device.type == "cuda")
        draw = context.generator(self.name)
        order = torch.empty(0, dtype=torch.int64)
        for step in range(self.steps):
            context.progress("tune", step, self.steps)
            share = min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * share
            if len(order) < self.windows:
                order = torch.randperm(len(tokens), generator=draw)
            pick, order = order[: self.windows], order[self.windows :]
            with torch.enable_grad():
                weights = {name: one.weight(dtypes[name]) for name, one in tuned.items()}
                values = _forward(stages, weights, tokens[pick].to(context.device))
                _backward(stages, values, weights, original, [teacher[i] for i in pick.tolist()])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for one in tuned.values():
            for p in (one.shift, one.ratio, one.group):
                p.requires_grad_(False)

    @torch.no_grad()
    def distance(self, stages, tuned, dtypes, tokens, teacher, original, context) -> float:
        weights = {name: one.weight(dtypes[name]) for name, one in tuned.items()}
        total = 0.0
        for row, known in zip(tokens, teacher, strict=True):
            values = _forward(stages, weights, row[None].to(context.device))
            total += float(_loss(stages, values, weights, original, known))
        return total / len(tokens)


def _forward(stages: Stages, weights: Weights, tokens: torch.Tensor) -> Values:
    values = {stages.tokens: tokens}
    for part in stages.parts[:-1]:
        values.update(part.run(values, weights))
    return values


@torch.no_grad()
def _hidden(stages: Stages, original: Weights, tokens: torch.Tensor) -> list[Values]:
    """What the last part reads, per window, in the original."""
    last = len(stages.parts) - 1
    out = []
    for row in tokens.split(1):
        values = _forward(stages, original, row)
        out.append({name: values[name] for name in stages.live(last)})
    return out


def _loss(stages: Stages, values: Values, weights: Weights, original: Weights, known: Values) -> torch.Tensor:
    """KL(original || quantized) in nats a token, of one window."""
    last = stages.parts[-1]
    logits = last.run(values, weights)[stages.logits].float().log_softmax(-1)
    with torch.no_grad():
        wanted = last.run({**values, **known}, original)[stages.logits].float().log_softmax(-1)
    return torch.nn.functional.kl_div(logits, wanted, reduction="sum", log_target=True) / logits[..., 0].numel()


def _backward(stages: Stages, values: Values, weights: Weights, original: Weights, known: list[Values]) -> None:
    """Gradients of the mean loss; logits exist for one window at a time."""
    names = stages.live(len(stages.parts) - 1)
    ends = {name: values[name].detach().requires_grad_() for name in names}
    for i, one in enumerate(known):
        window = {**values, **{name: end[i : i + 1] for name, end in ends.items()}}
        (_loss(stages, window, weights, original, one) / len(known)).backward(retain_graph=False)
    torch.autograd.backward([values[name] for name in names], [ends[name].grad for name in names])
