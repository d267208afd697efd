"""tune-model: the scales of all sites together, by gradients of the distance to the original's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from mixcomp.passes.descent import descend
from mixcomp.passes.distill import Teacher, Texts, rerun, tunables
from mixcomp.passes.stages import Stage, Values
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
        held = teacher.ends(texts.held)
        before = teacher.distance(tuned, texts.held, held)
        rates = {"ratio": self.ratio_rate, "group": self.group_rate}
        picks = self._picks(texts, context.generator(self.name))
        ends = _stacked(teacher.ends(texts.learn))
        descend(
            tuned.values(), rates, picks,
            lambda pick: _differentiate(teacher, tuned, texts.learn[pick], {n: v[pick] for n, v in ends.items()}),
        )  # fmt: skip
        changed = program.with_tensors(stored_tensors(tuned))
        after = teacher.distance(changed, texts.held, held)
        return changed if after < before else program

    def _picks(self, texts: Texts, draw: torch.Generator) -> list[torch.Tensor]:
        """Windows of every step: all of them once, in random order, before any of them again."""
        picks, order = [], torch.empty(0, dtype=torch.int64)
        for _ in range(self.steps):
            if len(order) < texts.batch:
                order = torch.randperm(len(texts.learn), generator=draw)
            picks.append(order[: texts.batch])
            order = order[texts.batch :]
        return picks


def _weights(tuned: Mapping[str, Quantized], part: Stage) -> dict[str, torch.Tensor]:
    return {name: tuned[name].weight() for name in part.sites}


def _stacked(windows: list[Values]) -> Values:
    return {name: torch.cat([one[name] for one in windows]) for name in windows[0]}


def _differentiate(teacher: Teacher, tuned: Mapping[str, Quantized], tokens: torch.Tensor, ends: Values) -> None:
    """Gradients of the mean divergence over some windows."""
    stages = teacher.stages
    values: Values = {stages.tokens: tokens}
    for part in stages.parts[:-1]:
        values.update(rerun(part, values, partial(_weights, tuned, part)))
    names = stages.live(len(stages.parts) - 1)
    cut = {name: values[name].detach().requires_grad_() for name in names}
    last = _weights(tuned, stages.parts[-1])
    leaves = {name: weight.detach().requires_grad_() for name, weight in last.items()}
    for i in range(len(tokens)):
        one = slice(i, i + 1)
        window = {**values, **{name: value[one] for name, value in cut.items()}}
        loss = teacher.divergence(window, leaves, {name: value[one] for name, value in ends.items()})
        (loss / len(tokens)).backward()
    roots = [*(values[name] for name in names), *last.values()]
    torch.autograd.backward(roots, [*(cut[name].grad for name in names), *(leaf.grad for leaf in leaves.values())])
