"""follow-plan: what assign-precision would write, and nothing of an edited plan believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from measured import DOWN, PROJ, UP, measurement, priced
from mixcomp import manager
from mixcomp.config import Budget
from mixcomp.errors import BudgetError, FormatError, MismatchError
from mixcomp.passes import AssignPrecision, FollowPlan
from mixcomp.planning import plan
from mixcomp.plans import Plan, widths_text
from mixcomp.program import Program
from mixcomp.protocol import Context


def follow(made: Plan) -> Program:
    return manager.run(priced(), (FollowPlan(made),), Context(), level=2)


@pytest.mark.parametrize("budget", [Budget(4.4), Budget(4.0, count="payload")])
@pytest.mark.parametrize("strategy", ["joint", "uniform"])
def test_it_writes_what_assign_precision_writes(budget: Budget, strategy: str) -> None:
    wanted = manager.run(priced(), (AssignPrecision(budget, strategy=strategy),), Context(), level=2)  # type: ignore[arg-type]
    found = follow(plan(measurement(), budget, strategy=strategy))
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[key], wanted.tensors[key]) for key in wanted.tensors)


def edited(site: str, **changes: Any) -> Plan:
    made = plan(measurement(), 4.4)
    return replace(made, sites={**made.sites, site: {**made.sites[site], **changes}})


def test_an_edited_plan_is_followed_within_its_budget() -> None:
    narrow = edited(UP, widths="2" * 96)
    assert set(follow(narrow).tensor(UP, "widths").tolist()) == {2}
    with pytest.raises(BudgetError, match=r"4\.4 bits per weight"):
        follow(edited(UP, widths="8" * 96))


def test_rows_that_mix_widths_are_followed() -> None:
    site = priced().site(UP)
    rows, groups = site.rows, -(-site.columns // 32)
    draw = torch.Generator().manual_seed(0)
    widths = torch.tensor([2, 3], dtype=torch.uint8)[torch.randint(0, 2, (rows, groups), generator=draw)]
    widths[1] = widths[0]  # a run of two
    assert groups > 1
    made = plan(measurement(), 6.0)
    mixed = {**made.sites[UP], "widths": widths_text(widths), "scales": "float-group"}
    found = follow(replace(made, sites={**made.sites, DOWN: edited(DOWN, widths="2" * 64).sites[DOWN], UP: mixed}))
    assert torch.equal(found.tensor(UP, "widths"), widths)


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (lambda: edited(DOWN, widths="7" * 64), FormatError, "layers.0.down.*2, 3, 4, 5, 6, 8"),
        (lambda: edited(DOWN, widths=None), FormatError, "layers.0.down"),
        (lambda: edited(DOWN, widths="4" * 63), MismatchError, "64 rows, the plan 63"),
        (lambda: edited(DOWN, rank=-1), FormatError, "rank of 'layers.0.down' is -1"),
        (lambda: edited(DOWN, rank=100), FormatError, "0..8"),
        (lambda: edited(DOWN, rank="1"), FormatError, "rank"),
        (lambda: replace(edited(DOWN), sites={}), MismatchError, "says nothing of 'layers.0.down'"),
        (
            lambda: replace(edited(DOWN), sites={**edited(DOWN).sites, "x": edited(PROJ).sites[PROJ]}),
            MismatchError,
            "decisions for 'x'",
        ),
    ],
)
def test_what_cannot_be_followed_is_named(made: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        follow(made())
