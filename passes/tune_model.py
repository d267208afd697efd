"""tune-model: the scales of all sites together, by gradients of the distance to the original's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from mixcomp.passes.descent import Descent
from mixcomp.passes.distill import Teacher, Texts, tunables
from mixcomp.passes.stages import Values
from mixcomp.passes.tunable import Quantized, stored_tensors
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context, Pass, Semantics


@dataclass(frozen=True)
class TuneModel(Pass):
    """Distil the original into the scales of the quantized model: KL(original || quantized), end to end.

    Codes stay: an early trial that learned them too made 4.4 bits worse.
    Activations and dequantized weights of one layer at a time are
    alive (each layer is run again on the way back), and logits of one window.  The result is kept only if the
    divergence on calibration windows that took no part is smaller with it.

    Before: stored tensors.  After, the same layouts with other numbers::

        layers.0.q_proj/{scales, factors}   learned

    Options:
        steps: of Adam; rates fall linearly to 0.
        ratio_rate, group_rate: first step of the row factor's logarithm, and in units of the group scale.
    """

    name: ClassVar[str] = "tune-model"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.BRANCHED})
    semantics: ClassVar[Semantics] = Semantics.LOSSY

    steps: int = 150
    ratio_rate: float = 5e-4
    group_rate: float = 5e-3

    def run(self, program: Program, context: Context) -> Program:
        teacher, texts = Teacher.of(program), Texts.of(context)
        tuned = tunables(program, context.device, rounding=False)
        if not any(one.learned() for one in tuned.values()):
            return program
        ends, held = teacher.ends(texts.learn), teacher.ends(texts.held)
        before = teacher.distance(tuned, texts.held, held)
        draw, order = context.generator(self.name), torch.empty(0, dtype=torch.int64)
        with Descent(tuned.values(), {"ratio": self.ratio_rate, "group": self.group_rate}, self.steps) as descent:
            for _ in context.track("tune model", range(self.steps)):
                if len(order) < texts.batch:
                    order = torch.randperm(len(texts.learn), generator=draw)
                pick, order = order[: texts.batch], order[texts.batch :]
                descent.step(partial(_differentiate, teacher, tuned, texts.learn[pick], [ends[i] for i in pick]))
        changed = program.with_tensors(stored_tensors(tuned))
        after = teacher.distance(changed, texts.held, held)
        return changed if after < before else program


def _differentiate(
    teacher: Teacher, tuned: Mapping[str, Quantized], tokens: torch.Tensor, ends: list[Values]
) -> torch.Tensor:
    """Gradients of the mean divergence over some windows; returns it."""
    stages = teacher.stages
    values: Values = {stages.tokens: tokens}
    for part in stages.parts[:-1]:

        def run(*given: torch.Tensor, part=part) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
            weights = {name: tuned[name].weight() for name in part.sites}
            return tuple(part.run(dict(zip(part.inputs, given, strict=True)), weights).values())

        made = checkpoint(run, *(values[name] for name in part.inputs), use_reentrant=False)
        values.update(zip(part.outputs, made, strict=True))
    names = stages.live(len(stages.parts) - 1)
    cut = {name: values[name].detach().requires_grad_() for name in names}
    last = {name: tuned[name].weight() for name in stages.parts[-1].sites}
    leaves = {name: weight.detach().requires_grad_() for name, weight in last.items()}
    total = torch.zeros((), device=tokens.device)
    for i, end in enumerate(ends):
        window = {**values, **{name: value[i : i + 1] for name, value in cut.items()}}
        loss = teacher.divergence(window, leaves, end) / len(ends)
        loss.backward()
        total += loss.detach()
    roots = [*(values[name] for name in names), *last.values()]
    torch.autograd.backward(roots, [*(cut[name].grad for name in names), *(leaf.grad for leaf in leaves.values())])
    return total
