"""Passes small enough to see through, for testing what runs passes and what judges them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

import mutants
from mixcomp.format import WIDTHS
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context, Pass


@dataclass(frozen=True)
class Idle(Pass):
    """Does nothing."""

    name: ClassVar[str] = "idle"

    def run(self, program: Program, context: Context) -> Program:
        return program


@dataclass(frozen=True)
class Salience(Pass):
    """Prices every row at its width."""

    name: ClassVar[str] = "toy-salience"
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.SALIENCE})

    scale: float = 1.0

    def run(self, program: Program, context: Context) -> Program:
        price = self.scale / torch.tensor(WIDTHS)
        return program.with_tensors({f"{s.name}/salience": price.repeat(s.rows, 1) for s in program.open_sites()})


@dataclass(frozen=True)
class Widths(Pass):
    """Eight bits for everybody."""

    name: ClassVar[str] = "toy-widths"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.SALIENCE})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.ASSIGNED})

    def run(self, program: Program, context: Context) -> Program:
        tensors = {"budget/bits": torch.tensor(10**6)}
        for site in program.open_sites():
            tensors[f"{site.name}/widths"] = torch.full((site.rows,), 8, dtype=torch.uint8)
            tensors[f"{site.name}/planned_bits"] = torch.tensor(site.rows * site.columns * 8)
        return program.with_tensors(tensors)


@dataclass(frozen=True)
class Do(Pass):
    """Whatever the test says."""

    name: ClassVar[str] = "do"

    action: Callable[[Program], Any] = field(default=lambda program: program)

    def run(self, program: Program, context: Context) -> Program:
        return self.action(program)


@dataclass(frozen=True)
class Forget(Idle):
    """Takes the salience away and says so."""

    name: ClassVar[str] = "forget"
    clobbers: ClassVar[frozenset[Fact]] = frozenset({Fact.SALIENCE})


def relu_to_silu(program: Program) -> Program:
    mutants.node_of(program, torch.ops.aten.relu.default).target = torch.ops.aten.silu.default
    return mutants.recompiled(program)
