"""The original model as a teacher: its hidden states, and how far a quantized model's predictions are from its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from mixcomp.errors import CalibrationError
from mixcomp.passes.stages import Stage, Stages, Values, split
from mixcomp.passes.tunable import Quantized, Settled, Tunable
from mixcomp.passes.watch import sampled_residual
from mixcomp.program import Program
from mixcomp.protocol import Context

#: tokens of one step of descent
STEP_TOKENS = 16384
#: windows that no gradient sees: they decide whether the result is kept
HELD = 8


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Calibration windows int64[n, length] on the device: those to learn from, and those kept back."""

    learn: torch.Tensor
    held: torch.Tensor

    @classmethod
    def of(cls, context: Context) -> Texts:
        """Windows of the commonest length; every eighth, eight at most, is kept back."""
        lengths = [b.shape[1] for b in context.batches for _ in b]
        common = max(set(lengths), key=lambda n: (lengths.count(n) * n, n), default=0)
        windows = [b for b in context.batches if b.shape[1] == common]
        count = sum(map(len, windows))
        if count < 2:
            raise CalibrationError(
                f"tuning by gradients got {count} calibration window(s) of one length; give at least 2, "
                f'or effort="fast"'
            )
        tokens = torch.cat(windows).to(context.device)
        every = max(2, count // HELD)
        held = torch.arange(len(tokens), device=tokens.device) % every == every - 1
        return cls(tokens[~held], tokens[held])

    @property
    def batch(self) -> int:
        """Windows of one step."""
        return max(1, min(len(self.learn), STEP_TOKENS // self.learn.shape[1]))


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """The original: ``weights`` of its open sites, and per window what its last part reads (``ends``)."""

    stages: Stages
    weights: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, program: Program) -> Teacher:
        return cls(split(program), {s.name: program.weight(s).detach() for s in program.open_sites()})

    @torch.no_grad()
    def ends(self, tokens: torch.Tensor) -> list[Values]:
        """What the last part reads, one window after another."""
        names = self.stages.live(len(self.stages.parts) - 1)
        found = []
        for window in tokens.split(1):
            values = self.stages.forward(self.weights, window)
            found.append({name: values[name] for name in names})
        return found

    def strengths(self, texts: Texts, draw: torch.Generator) -> Values:
        """How strongly the loss reacts to the hidden states that layers make: |dL/dh| relative to its mean over all
        tokens, fp32[windows, length] by name, from labels sampled from the original."""
        found: dict[str, list[torch.Tensor]] = {}
        for window in texts.learn.split(texts.batch):
            values: Values = {self.stages.tokens: window}
            for k, part in enumerate(self.stages.parts):
                values.update(rerun(part, values, lambda: self.weights))
                for name in part.outputs:
                    value = values[name]
                    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                        continue  # a size or a mask
                    if k == 0:
                        value.requires_grad_()
                    elif k in self.stages.layers:
                        value.register_hook(partial(_note, found.setdefault(name, [])))
            logits = values[self.stages.logits]
            logits.backward(sampled_residual(logits.detach(), draw))
        return {name: _relative(torch.cat(parts)) for name, parts in found.items()}

    def divergence(self, values: Values, weights: Mapping[str, torch.Tensor], end: Values) -> torch.Tensor:
        """KL(original || quantized) in nats a token, fp32[]: ``values`` and the original's ``end`` of one window."""
        last, name = self.stages.parts[-1], self.stages.logits
        with torch.no_grad():
            wanted = last.run({**values, **end}, self.weights)[name].float().log_softmax(-1)
        found = last.run(values, weights)[name].float().log_softmax(-1)
        return kl_div(found, wanted, reduction="sum", log_target=True) / (found.numel() // found.shape[-1])

    @torch.no_grad()
    def distance(self, tuned: Mapping[str, Quantized], tokens: torch.Tensor, ends: Sequence[Values]) -> float:
        """Mean divergence over windows."""
        weights = {name: one.weight() for name, one in tuned.items()}
        total = 0.0
        for window, end in zip(tokens.split(1), ends, strict=True):
            total += float(self.divergence(self.stages.forward(weights, window), weights, end))
        return total / len(tokens)


def rerun(part: Stage, values: Values, weights: Callable[[], Mapping[str, torch.Tensor]]) -> Values:
    """``part.run``, run again on the way back so that nothing inside it stays alive, the making of weights included."""

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.run(dict(zip(part.inputs, given, strict=True)), weights()).values())

    # nothing here draws random numbers, and asking for the generator's state would wait for the GPU
    made = checkpoint(run, *(values[name] for name in part.inputs), use_reentrant=False, preserve_rng_state=False)
    return dict(zip(part.outputs, made, strict=True))


def _note(found: list[torch.Tensor], gradient: torch.Tensor) -> None:
    found.append(gradient.float().norm(dim=-1))


def _relative(norms: torch.Tensor) -> torch.Tensor:
    return norms / norms.mean().clamp_min(torch.finfo(torch.float32).tiny)


def tunables(
    program: Program, device: torch.device, part: Stage | None = None, *, rounding: bool
) -> dict[str, Quantized]:
    """The quantized sites of one part, or of all."""
    sites = program.open_sites() if part is None else tuple(program.site(name) for name in part.sites)
    return {
        site.name: Tunable.of(program, site, device, rounding=rounding)
        if site.layout.departure is None
        else Settled.of(program, site, device)
        for site in sites
    }
