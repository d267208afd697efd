"""The gate: rivals' plans at the same budget are quantized beside joint's, and text that none has seen chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mixcomp import manager
from mixcomp.budget import original_bits
from mixcomp.config import STRATEGIES
from mixcomp.errors import MixCompError
from mixcomp.passes.decision import Assignment
from mixcomp.passes.distill import Teacher
from mixcomp.passes.strategies import quantizing_of
from mixcomp.program import Program
from mixcomp.protocol import Context, Pass

#: effort -> strategies that ``joint`` has to beat; one more costs a CPU its own measuring, a quantization and a forward pass
RIVALS = {"fast": ("uniform",), "balanced": STRATEGIES[1:], "best": STRATEGIES[1:]}


@dataclass(slots=True, eq=False)
class Gate:
    """``kept`` is the best quantized program so far and ``strategy`` whose it is: joint's, until a rival is better.

    ``rows`` is the table of the report: {"strategy", "stored_bits_per_weight", "kl", "reason", "kept"}.  ``kl`` is
    KL(original || quantized) in nats a token on the windows kept back; None where ``reason`` says why there is no score.
    """

    kept: Program
    strategy: str = "joint"
    rows: list[dict[str, Any]] = field(default_factory=list)
    _best: float = math.inf

    def run(
        self,
        plain: Program,
        measured: Program,
        rivals: Mapping[str, tuple[tuple[Pass, ...], Assignment]],
        context: Context,
    ) -> None:
        """Score what is kept, then every rival: its passes run from ``plain``, which holds statistics alone, or from
        ``measured`` if those are the ones that have made it of that.

        The least divergence wins, the earlier of equal ones.  A rival that cannot spend the budget, or fails at anything
        else, is a row that says so: it must not take joint's plan from the user.
        """
        if not context.held:
            self._enter(self.strategy, self.kept, reason="not scored: calibration is too little to keep a window back")
            return
        held = torch.cat(context.held).to(context.device)
        teacher = Teacher.of(plain, held.shape[1])
        ends, done = teacher.ends(held), [step.spec for step in measured.history[len(plain.history) :]]
        for name in context.track("gate", (self.strategy, *rivals)):
            try:
                if name in rivals:
                    measuring, deciding = rivals[name]
                    ready = done == [one.spec() for one in measuring]
                    passes = (*(() if ready else measuring), deciding, *quantizing_of(name))
                    program = _quantized(measured if ready else plain, deciding, passes, context)
                else:
                    program = self.kept
            except MixCompError as error:
                self._enter(name, None, reason=str(error))
                continue
            self._enter(name, program, teacher.distance(program, held, ends))
            del program  # a loser is gone before the next one is made

    def _enter(
        self, strategy: str, program: Program | None, kl: float = math.nan, reason: str = "predicts NaN or infinity"
    ) -> None:
        score = {"kl": kl, "reason": None} if math.isfinite(kl) else {"kl": None, "reason": reason}
        bits = program and stored_bits(program)
        self.rows.append({"strategy": strategy, "stored_bits_per_weight": bits, **score})
        if program is not None and kl < self._best:
            self.kept, self.strategy, self._best = program, strategy, kl
        for row in self.rows:
            row["kept"] = row["strategy"] == self.strategy


def _quantized(program: Program, deciding: Assignment, passes: tuple[Pass, ...], context: Context) -> Program:
    limits = deciding.limits(program)
    limits.require(deciding.budget.bits(limits.weights), str(deciding.budget))  # before anything is measured
    return manager.run(program, passes, context)


def stored_bits(program: Program) -> float:
    """Stored bits per weight of a quantized program: everything in scope, weights left alone at their own size."""
    scope = [s for s in program.sites if s.in_scope]
    bits = sum(s.layout.stored_bits() if s.open else original_bits(s) for s in scope)
    return bits / sum(s.rows * s.columns for s in scope)
