"""follow-plan: the decisions of a plan that was made before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mixcomp.budget import limits
from mixcomp.config import CompileConfig
from mixcomp.errors import BudgetError, FormatError, MismatchError
from mixcomp.format import ALL_WIDTHS, GROUP, GROUPS, Scales
from mixcomp.passes.coupling import analyse, needs_index
from mixcomp.passes.decision import Decision, Decisions
from mixcomp.passes.directions import branch_bits, most_directions
from mixcomp.plans import Plan, parse_widths
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
        index = needs_index(program.sites, analyse(program))
        made = {name: _decision(site, self.plan.sites[name]) for name, site in sites.items()}
        used = sum(made[name].layout(site, index[name]).bits(budget.count) for name, site in sites.items())
        if budget.count == "stored":
            used += sum(made[s.name].rank * branch_bits(s.rows, s.columns) for s in sites.values())
        if bounds.fixed + used > ceiling:
            raise BudgetError(
                f"the plan takes {bounds.fixed + used:,} bits, its budget of {budget} is {ceiling:,}; "
                "narrow some rows, or plan anew with a larger budget"
            )
        decided = Decisions(made, self.plan.predicted_loss, self.plan.price, self.plan.gap, ceiling)
        return decided.write(program, index, budget.count)


def _decision(site: Site, decided: Any) -> Decision:
    decided = decided if isinstance(decided, dict) else {}
    group, text = decided.get("group", GROUP), decided.get("scales", Scales.TWO_LEVEL.text)
    scales = {kind.text: kind for kind in Scales}.get(text) if isinstance(text, str) else None
    if group not in GROUPS or scales is None:
        raise FormatError(
            f"plan: {site.name!r} has {text!r:.80} scales in groups of {group!r:.80}; scales are "
            f"{', '.join(kind.text for kind in Scales)}, groups {GROUPS}: correct them"
        )
    return Decision(_widths(site, decided.get("widths"), group), _rank(site, decided), group, scales)


def _widths(site: Site, text: Any, group: int) -> torch.Tensor:
    """uint8[rows] or [rows, groups] of the plan's text."""
    allowed = "".join(map(str, ALL_WIDTHS))
    rows = parse_widths(text) if isinstance(text, str) else []
    flat = "".join(digits for _, digits in rows)
    if not rows or set(flat) - set(allowed):
        raise FormatError(
            f"plan: widths of {site.name!r} are {text!r:.80}; they must be one of {', '.join(allowed)} a row, or "
            '"ROWSxWIDTHS ..." with one a group: correct them'
        )
    count, sizes = sum(n for n, _ in rows), {len(digits) for _, digits in rows}
    if count != site.rows:
        raise MismatchError(
            f"plan and model do not fit: {site.name!r} has {site.rows} rows, the plan {count} widths; plan this model"
        )
    by_group = "x" in text
    if by_group and sizes != {-(-site.columns // group)}:
        raise MismatchError(
            f"plan and model do not fit: {site.name!r} has {-(-site.columns // group)} groups a row, the plan "
            f"{sorted(sizes)}; plan this model"
        )
    digits = torch.frombuffer(bytearray(flat.encode()), dtype=torch.uint8) - ord("0")
    widths = digits.view(len(rows), -1).repeat_interleave(torch.tensor([n for n, _ in rows]), 0)
    return widths if by_group else widths[:, 0].contiguous()


def _rank(site: Site, decided: dict[str, Any]) -> int:
    rank, most = decided.get("rank"), most_directions(site.rows, site.columns)
    if type(rank) is not int or not 0 <= rank <= max(most, 0):
        raise FormatError(
            f"plan: rank of {site.name!r} is {rank!r}; it must be a whole number in 0..{most}: correct it"
        )
    return rank
