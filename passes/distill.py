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


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Windows int64[n, length] on the device: those to learn from, the first ``given`` of them calibration and the others
    the model's own, and the calibration windows kept back."""

    learn: torch.Tensor
    held: torch.Tensor
    given: int

    @classmethod
    def of(cls, context: Context) -> Texts:
        """Those of the length of the windows that calibration kept back."""
        if not context.held:
            count = sum(map(len, context.batches))
            raise CalibrationError(
                f"tuning by gradients got {count} calibration window(s), none of them kept back to judge by; give at "
                f'least 2 of one length, or effort="fast"'
            )
        held = torch.cat(context.held)
        given = [b for b in context.batches if b.shape[1] == held.shape[1]]
        learn = torch.cat((*given, *context.written))
        return cls(learn.to(context.device), held.to(context.device), sum(map(len, given)))

    @property
    def batch(self) -> int:
        """Windows of one step."""
        return max(1, min(len(self.learn), STEP_TOKENS // self.learn.shape[1]))

    def picks(self, steps: int, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Windows of every step, int64[batch]: given ones and the model's own by turns, however many there are of each;
        every kind in random order, all of them once before any of them again."""
        kinds = [n for n in (self.given, len(self.learn) - self.given) if n]
        each = -(-steps * self.batch // len(kinds))
        streams, first = [], 0
        for count in kinds:
            order = [torch.randperm(count, generator=draw) for _ in range(-(-each // count))]
            streams.append(first + torch.cat(order)[:each])
            first += count
        return torch.stack(streams, 1).flatten()[: steps * self.batch].view(steps, self.batch).unbind()


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """The original: ``weights`` of its open sites, and per window what its last part reads (``ends``)."""

    stages: Stages
    weights: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, program: Program, length: int | None = None) -> Teacher:
        """That of a program, for windows of one ``length`` if it is given."""
        return cls(split(program, length=length), {s.name: program.weight(s).detach() for s in program.open_sites()})

    @torch.no_grad()
    def ends(self, tokens: torch.Tensor) -> list[Values]:
        """What the last part reads, one window after another."""
        names = self.stages.live(len(self.stages.parts) - 1)
        found = (self.stages.forward(lambda _: self.weights, window)[0] for window in tokens.split(1))
        return [{name: values[name] for name in names} for values in found]

    def strengths(self, texts: Texts, draw: torch.Generator) -> Values:
        """How strongly the loss reacts to the hidden states that layers make: |dL/dh| relative to its mean over all
        tokens, fp32[windows, length] by name, from labels sampled from the original."""
        found: dict[str, list[torch.Tensor]] = {}
        with torch.enable_grad():
            for window in texts.learn.split(texts.batch):
                values: Values = {self.stages.tokens: window}
                for k, part in enumerate(self.stages.parts):
                    values.update(rerun(part, values, lambda: self.weights))
                    for name in part.outputs:
                        if k == 0 and _floats(values[name]):
                            values[name].requires_grad_()
                        elif k in self.stages.layers and _floats(values[name]):
                            values[name].register_hook(partial(_note, found.setdefault(name, [])))
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
    def distance(
        self, quantized: Program | Mapping[str, Quantized], tokens: torch.Tensor, ends: Sequence[Values]
    ) -> float:
        """Mean divergence over windows; weights exist for one part at a time, and so do a program's unpacked codes."""

        def weights(part: Stage) -> dict[str, torch.Tensor]:
            own = quantized
            if isinstance(own, Program):
                own = tunables(own, tokens.device, part, rounding=False)
            return weights_of(own, part)

        found = self.stages.forward(weights, tokens)
        last = weights(self.stages.parts[-1])
        return sum(float(self.divergence(v, last, end)) for v, end in zip(found, ends, strict=True)) / len(tokens)


def rerun(part: Stage, values: Values, weights: Callable[[], Mapping[str, torch.Tensor]]) -> Values:
    """``part.run``, run again on the way back so that nothing inside it stays alive, the making of weights included."""

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.run(dict(zip(part.inputs, given, strict=True)), weights()).values())

    # nothing here draws random numbers, and asking for the generator's state would wait for the GPU
    made = checkpoint(run, *(values[name] for name in part.inputs), use_reentrant=False, preserve_rng_state=False)
    return dict(zip(part.outputs, made, strict=True))


def weights_of(tuned: Mapping[str, Quantized], part: Stage) -> dict[str, torch.Tensor]:
    """What one part multiplies with; norms that are not among ``tuned`` are the original's."""
    norms = (path for path in part.norms if path in tuned)
    return {name: tuned[name].weight() for name in (*part.sites, *norms)}


def _floats(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()  # not a size, not a mask


def _note(found: list[torch.Tensor], gradient: torch.Tensor) -> None:
    found.append(gradient.float().norm(dim=-1))


def _relative(norms: torch.Tensor) -> torch.Tensor:
    return norms / norms.mean().clamp_min(torch.finfo(torch.float32).tiny)


def tunables(
    program: Program, device: torch.device, part: Stage | None = None, *, rounding: bool
) -> dict[str, Quantized]:
    """The quantized sites and learned norms of one part, or of all."""
    sites = program.open_sites() if part is None else tuple(program.site(name) for name in part.sites)
    norms = {path: Settled(value) for path, value in program.norms().items() if part is None or path in part.norms}
    return norms | {
        site.name: Tunable.of(program, site, device, rounding=rounding)
        if site.layout.departure is None
        else Settled.of(program, site, device)
        for site in sites
    }
