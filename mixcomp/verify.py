"""The laws every program obeys between passes, as one table.  Each row ships with mutants that break it.

A row says which law it is, from which fact on it holds, and which function looks for violations.  ``check`` runs
the rows that apply, in this order, so that a row may rely on the ones above it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from mixcomp import graph_laws as graph
from mixcomp import table_laws as table
from mixcomp.errors import InvariantError, MixCompError
from mixcomp.printer import window
from mixcomp.program import Fact, Program
from mixcomp.snapshot import Case, Findings, Snapshot


@dataclass(frozen=True, slots=True)
class Invariant:
    """One row: ``holds`` yields what is wrong.

    ``fact``: the row applies where this fact is established (None: always); ``level``: from which level on it
    runs; ``compares``: it needs to know the program before the pass.
    """

    id: str
    law: str
    holds: Callable[[Case], Findings]
    fact: Fact | None = None
    level: int = 1
    compares: bool = False

    def applies(self, case: Case) -> bool:
        known = self.fact is None or self.fact in case.program.facts
        return known and case.level >= self.level and (case.before is not None or not self.compares)


TABLE: tuple[Invariant, ...] = (
    Invariant("I01", "the graph passes lint and its code is current", graph.well_formed),
    Invariant("I02", "functional calls of this stage only", graph.dialect),
    Invariant("I05", "no dead node, no unread parameter or buffer", graph.nothing_dead),
    Invariant("I06", "linears and sites describe each other completely", graph.sites_match),
    Invariant("I02", "weights of open sites are read by canonical linears alone", graph.weights_private),
    Invariant("I03", "every value has a fake example of the right type", graph.typed),
    Invariant("I03", "fake tensors run again give the recorded types", graph.recomputed, level=2),
    Invariant("I04", "inputs and outputs are unchanged", graph.same_signature, compares=True),
    Invariant("I07", "aliases share one storage", graph.aliases_shared),
    Invariant("I08", "parameters are untouched or consumed once", graph.parameters_kept, compares=True),
    Invariant("I09", "tensors are owned, finite, contiguous, immutable", table.table_sound),
    Invariant("I10", "sigma and gamma of every open site", table.statistics, Fact.STATISTICS),
    Invariant("I10", "scales of channels are positive", table.scales),
    Invariant("I10", "salience of every row at every width", table.salience, Fact.SALIENCE),
    Invariant("I11", "one allowed width per row", table.widths_allowed, Fact.ASSIGNED),
    Invariant("I12", "bits in scope within the budget", table.within_budget, Fact.ASSIGNED),
    Invariant("I13", "orders are bijections, absorptions agree", table.orders_are_bijections, Fact.REORDERED),
    Invariant("I14", "stored tensors share one row order", table.formats_match, Fact.QUANTIZED),
    Invariant("I15", "side branches are thin and pay", table.branches_pay, Fact.BRANCHED),
    Invariant("I16", "lowered calls carry what is stored", table.lowered_whole, Fact.LOWERED),
)


def checks_of(fact: Fact) -> tuple[Invariant, ...]:
    """The rows that make a fact executable; every fact has at least one."""
    return tuple(row for row in TABLE if row.fact is fact)


def check(program: Program, level: int = 1, before: Program | Snapshot | None = None) -> None:
    """Run every row that applies and stop at the first violation.

    Args:
        program: what to check.
        level: 0 nothing, 1 everything but long computations, 2 everything.
        before: the program a pass was given; a ``Snapshot`` taken before the pass also shows writes in place.

    Raises:
        InvariantError: ``I07: site layers.0.q_proj: ...``, followed by three printed lines around the node, if
            there is one.
    """
    if isinstance(before, Program):
        before = Snapshot.of(before, level)
    case = Case(program, before, level)
    for row in TABLE if level > 0 else ():
        if not row.applies(case):
            continue
        try:
            found = next(row.holds(case), None)
        except InvariantError:
            raise
        except MixCompError as error:  # something the row looks up is missing
            found = str(error), None
        if found is not None:
            raise _violation(row, case, *found)


def _violation(row: Invariant, case: Case, message: str, node: fx.Node | None) -> InvariantError:
    lines = "" if node is None else "\n" + window(case.program, node)
    return InvariantError(f"{row.id}: {message}; the law: {row.law}{lines}")
