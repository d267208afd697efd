"""tune-blocks: rounding and scales of one decoder layer at a time, by gradients of the error of its output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from mixcomp.passes.stages import Stage, Stages, Values, split
from mixcomp.passes.tunable import Tunable
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context, Pass, Semantics


@dataclass(frozen=True)
class TuneBlocks(Pass):
    """Layer by layer: rounding, group scales and row factors that bring its output closest to the original's.

    Inputs come from the quantized layers before it, targets from the original model.
    """

    name: ClassVar[str] = "tune-blocks"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})
    semantics: ClassVar[Semantics] = Semantics.LOSSY

    steps: int = 200
    windows: int = 8
    shift_rate: float = 5e-3
    ratio_rate: float = 1e-3
    group_rate: float = 2e-2
    beta2: float = 0.95
    weighted: bool = True
    held: int = 8
    margin: float = 0.25

    def run(self, program: Program, context: Context) -> Program:
        stages = split(program)
        tokens = torch.cat([b for b in context.batches if b.shape[1] == context.batches[0].shape[1]]).to(context.device)
        exact = self._start(stages, program, tokens)
        given = {name: value.clone() for name, value in exact.items()}
        tensors: dict[str, torch.Tensor] = {}
        for done, k in enumerate(stages.layers):
            context.progress("tune blocks", done, len(stages.layers))
            part = stages.parts[k]
            sites = {name: program.site(name) for name in part.sites}
            original = {name: program.weight(site).detach() for name, site in sites.items()}
            wanted = self._through(stages, k, part, original, exact, tokens)
            tuned = {name: Tunable.of(program, site, context.device, self.margin) for name, site in sites.items()}
            weigh = self._importance(program, part, wanted)
            self._learn(stages, k, part, tuned, given, wanted, weigh, tokens, original, context)
            weights = {name: one.weight(original[name].dtype).detach() for name, one in tuned.items()}
            given = self._through(stages, k, part, weights, given, tokens)
            exact = wanted
            for name, one in tuned.items():
                tensors.update({f"{name}/{key}": value for key, value in one.stored().items()})
        return program.with_tensors(tensors)

    def _importance(self, program: Program, part: Stage, wanted: Values) -> torch.Tensor | None:
        if not self.weighted or not part.sites:
            return None
        gamma = program.tensor(part.sites[-1], "gamma")
        if any(v.shape[-1] != len(gamma) for v in wanted.values()):
            return None
        return gamma / gamma.mean()

    @torch.no_grad()
    def _start(self, stages: Stages, program: Program, tokens: torch.Tensor) -> Values:
        return {}

    @torch.no_grad()
    def _through(self, stages, k, part, weights, given, tokens) -> Values:
        out: dict[str, list[torch.Tensor]] = {}
        names = stages.live(k + 1)
        for i in range(0, len(tokens), self.windows):
            made = _layer(stages, part, weights, {n: v[i : i + self.windows] for n, v in given.items()}, tokens[i : i + self.windows])
            for n in names:
                out.setdefault(n, []).append(made[n])
        return {n: torch.cat(v) for n, v in out.items()}

    def _learn(self, stages, k, part, tuned, given, wanted, weigh, tokens, original, context) -> None:
        params = [(p, r) for one in tuned.values() for p, r in ((one.shift, self.shift_rate), (one.ratio, self.ratio_rate), (one.group, self.group_rate))]
        for p, _ in params:
            p.requires_grad_()
        optimizer = torch.optim.Adam([{"params": [p], "lr": r, "full": r} for p, r in params], betas=(0.9, self.beta2), eps=1e-20, fused=context.device.type == "cuda")
        draw = context.generator(self.name, str(k))
        scale = None
        first = last = None
        for step in range(self.steps):
            pick = torch.randperm(len(tokens), generator=draw)[: self.windows].to(context.device)
            share = min(1.0, (step + 1) / 10) * (1 - step / self.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * share
            with torch.enable_grad():
                weights = {name: one.weight(original[name].dtype) for name, one in tuned.items()}
                made = _layer(stages, part, weights, {n: v[pick] for n, v in given.items()}, tokens[pick])
                loss = 0.0
                for n in stages.live(k + 1):
                    error = (made[n].float() - wanted[n][pick].float()).square()
                    loss = loss + (error if weigh is None else error * weigh).mean()
                loss.backward()
            if step == 0:
                first = loss.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for p, _ in params:
            p.requires_grad_(False)
        context.progress(f"held layer {k}: {float(first):.4g} -> {float(loss.detach()):.4g}", 1, 1)


def _layer(stages: Stages, part: Stage, weights: Values, given: Values, tokens: torch.Tensor) -> Values:
    """A layer's outputs, its inputs from before the first layer computed anew."""
    values = {stages.tokens: tokens}
    with torch.no_grad():
        values.update(stages.parts[0].run(values, {}))
    values.update(given)
    return part.run(values, weights) | {n: v for n, v in values.items() if n in given}
