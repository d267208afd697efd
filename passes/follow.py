"""follow-plan: the decisions of a plan that was made before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mixcomp.budget import limits
from mixcomp.config import CompileConfig
from mixcomp.errors import BudgetError, FormatError, MismatchError
from mixcomp.format import WIDTHS
from mixcomp.passes.coupling import analyse
from mixcomp.passes.directions import branch_bits, most_directions
from mixcomp.passes.planner import Assignment, Prices, table
from mixcomp.plans import Plan
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context, Pass


@dataclass(frozen=True)
class FollowPlan(Pass):
    """Take widths and ranks from a plan instead of choosing them: what ``assign-precision`` writes, from a file.

    A plan is a plain file that people may edit, so everything in it is checked against the program and the budget.

    Options:
        plan: the decisions, for exactly the open sites of the program.
    """

    name: ClassVar[str] = "follow-plan"
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.ASSIGNED})

    plan: Plan

    def run(self, program: Program, context: Context) -> Program:
        sites = {s.name: s for s in program.open_sites()}
        odd = sorted(sites.keys() ^ self.plan.sites.keys())
        if odd:
            side = "the plan says nothing of" if odd[0] in sites else "the plan holds decisions for"
            raise MismatchError(
                f"plan and model do not fit: {side} {odd[0]!r} ({len(odd)} such sites); plan this model"
            )
        budget = CompileConfig.from_json(self.plan.options).budget
        bounds = limits(program.sites, {}, {}, budget.count)
        ceiling = budget.bits(bounds.weights)
        widths = {name: _widths(site, self.plan.sites[name]) for name, site in sites.items()}
        ranks = {name: _rank(site, self.plan.sites[name]) for name, site in sites.items()}
        decided = Assignment(
            widths, ranks, ceiling, self.plan.predicted_loss, self.plan.price, self.plan.gap
        )  # fmt: skip
        made = table(Prices(program.sites, analyse(program), {}), decided, budget.count)
        if budget.count == "stored":
            used = sum(int(made[f"{s.name}/planned_bits"]) for s in sites.values())
            used += sum(ranks[s.name] * branch_bits(s.rows, s.columns) for s in sites.values())
        else:
            used = sum(s.columns * int(widths[s.name].sum(dtype=torch.int64)) for s in sites.values())
        if bounds.fixed + used > ceiling:
            raise BudgetError(
                f"the plan takes {bounds.fixed + used:,} bits, its budget of {budget} is {ceiling:,}; "
                "narrow some rows, or plan anew with a larger budget"
            )
        return program.with_tensors(made)


def _widths(site: Site, decision: Any) -> torch.Tensor:
    """uint8[rows] of the plan's digits."""
    digits = decision.get("widths") if isinstance(decision, dict) else None
    allowed = "".join(map(str, WIDTHS))
    if not isinstance(digits, str) or set(digits) - set(allowed):
        raise FormatError(
            f"plan: widths of {site.name!r} are {digits!r:.80}; they must be one of {', '.join(allowed)} a row: correct them"
        )
    if len(digits) != site.rows:
        raise MismatchError(
            f"plan and model do not fit: {site.name!r} has {site.rows} rows, the plan {len(digits)} widths; plan this model"
        )
    return torch.frombuffer(bytearray(digits.encode()), dtype=torch.uint8) - ord("0")


def _rank(site: Site, decision: Any) -> int:
    rank, most = decision.get("rank"), most_directions(site.rows, site.columns)
    if type(rank) is not int or not 0 <= rank <= max(most, 0):
        raise FormatError(
            f"plan: rank of {site.name!r} is {rank!r}; it must be a whole number in 0..{most}: correct it"
        )
    return rank
