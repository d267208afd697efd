"""tune-model: scales, side branches and norms together, by gradients of the distance to the original's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from mixcomp.passes.descent import descend
from mixcomp.passes.distill import Teacher, Texts, rerun, tunables, weights_of
from mixcomp.passes.stages import Values
from mixcomp.passes.tunable import Norm, Quantized, stored_tensors
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context, Pass, Semantics


@dataclass(frozen=True)
class TuneModel(Pass):
    """Distil the original into what is small of the quantized model: KL(original || quantized), end to end.

    Codes stay: learned too, from the edges of their cells, they made 4.4 and 2.6 bits a fifth to a half worse, and from
    further inside nothing was gained.  Activations and dequantized weights of one layer at a time are alive (each layer
    is run again on the way back), and logits of one window.  Everything is tried as it would be stored, and
    kept only if the divergence on calibration windows that took no part is smaller with all of it.  The original's norms
    stay in the graph until it is lowered: they are the teacher's.

    Before: stored tensors.  After, the same layouts with other numbers::

        layers.0.q_proj/{scales, factors, branch_a, branch_b, branch_scale}   learned
        layers.0.norm.weight/norm                                             learned, in the parameter's dtype

    Options:
        steps: of Adam; rates fall linearly to 0.
        ratio_rate, group_rate: first step of the logarithm of a row's or branch's factor, and in units of the group scale.
        branch_rate: in steps of a side branch's int8.
        norm_rate: in units of the root mean square of a norm's weight.
    """

    name: ClassVar[str] = "tune-model"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.BRANCHED})
    semantics: ClassVar[Semantics] = Semantics.LOSSY

    steps: int = 300
    ratio_rate: float = 5e-4
    group_rate: float = 2e-2
    branch_rate: float = 1e-2
    norm_rate: float = 1e-3

    def run(self, program: Program, context: Context) -> Program:
        texts = Texts.of(context)
        teacher = Teacher.of(program, texts.learn.shape[1])
        tuned = tunables(program, context.device, rounding=False)
        if not any(one.learned() for one in tuned.values()):
            return program
        norms = {path: Norm.of(own) for part in teacher.stages.parts for path, own in part.norms.items()}
        tuned |= norms | {path: Norm.of(own) for path, own in program.norms().items()}
        held = teacher.ends(texts.held)
        before = teacher.distance(tuned, texts.held, held)
        branch = {"branch_a": self.branch_rate, "branch_b": self.branch_rate, "branch_ratio": self.ratio_rate}
        rates = {"ratio": self.ratio_rate, "group": self.group_rate, "norm": self.norm_rate, **branch}
        picks = texts.picks(self.steps, context.generator(self.name))
        ends = _stacked(teacher.ends(texts.learn))
        descend(
            tuned.values(), rates, picks,
            lambda pick: _differentiate(teacher, tuned, texts.learn[pick], {n: v[pick] for n, v in ends.items()}),
        )  # fmt: skip
        changed = program.with_tensors(stored_tensors(tuned))
        after = teacher.distance(changed, texts.held, held)
        return changed if after < before else program


def _stacked(windows: list[Values]) -> Values:
    return {name: torch.cat([one[name] for one in windows]) for name in windows[0]}


def _differentiate(teacher: Teacher, tuned: Mapping[str, Quantized], tokens: torch.Tensor, ends: Values) -> None:
    """Gradients of the mean divergence over some windows."""
    stages = teacher.stages
    values: Values = {stages.tokens: tokens}
    for part in stages.parts[:-1]:
        values.update(rerun(part, values, partial(weights_of, tuned, part)))
    names = stages.live(len(stages.parts) - 1)
    cut = {name: values[name].detach().requires_grad_() for name in names}
    last = weights_of(tuned, stages.parts[-1])
    leaves = {name: weight.detach().requires_grad_() for name, weight in last.items()}
    for i in range(len(tokens)):
        one = slice(i, i + 1)
        window = {**values, **{name: value[one] for name, value in cut.items()}}
        loss = teacher.divergence(window, leaves, {name: value[one] for name, value in ends.items()})
        (loss / len(tokens)).backward()
    roots = [*(values[name] for name in names), *last.values()]
    torch.autograd.backward(roots, [*(cut[name].grad for name in names), *(leaf.grad for leaf in leaves.values())])
