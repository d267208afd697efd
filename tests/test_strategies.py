"""Every strategy end to end on a tiny model: planned bits are stored bits, files come back, plans can be followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import families
import mixcomp
from measured import measurement
from mixcomp import manager
from mixcomp.config import STRATEGIES, Budget
from mixcomp.errors import ConfigError, FormatError, MismatchError
from mixcomp.format import Scales
from mixcomp.lowering.lower import LowerLinears
from mixcomp.lowering.module import MixedLinear
from mixcomp.passes import CollectStatistics, InsertSideBranch, QuantizeWeights, ReorderFeatures
from mixcomp.passes.assign_blocks import AssignBlocks
from mixcomp.passes.assign_mixes import AssignMixes
from mixcomp.passes.decision import Assignment
from mixcomp.passes.follow import _decision
from mixcomp.passes.keep_samples import KeepSamples
from mixcomp.plans import Plan, parse_widths
from mixcomp.program import Site, WeightRef
from programs import Blueprint, Kind, Layer, build, context

WIDE = Blueprint((Layer(Kind.GATED, 200), Layer(Kind.PLAIN, 40)), width=200, vocab=13, seed=5)
OTHERS = [name for name in STRATEGIES if name not in ("joint", "uniform")]
TEXT = torch.randint(0, 60, (4, 24), generator=torch.Generator().manual_seed(0))


def tiny() -> Any:
    return families.build("llama")


def held(model: torch.nn.Module) -> int:
    return sum(m.packed().stored_bits() for m in model.modules() if isinstance(m, MixedLinear))


@pytest.mark.parametrize(
    ("strategy", "budget"),
    [(name, 5.0) for name in STRATEGIES] + [("slim", 3.3), ("slim", Budget(2, count="payload")), ("amlq", 3.1)],
)
def test_a_strategy_is_planned_stored_and_loaded(
    strategy: str, budget: float | Budget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXCOMP_CHECK", "2")
    original, model = tiny(), mixcomp.compile(tiny(), budget, strategy=strategy, calibration=TEXT)
    plan: Plan = model.mixcomp.plan  # type: ignore[assignment]
    assert held(model) == plan.totals["stored_bits"]
    kind = "stored" if isinstance(budget, float) else "payload"
    ceiling = Budget.parse(budget).bits(plan.totals["weights"])
    assert 0.9 * ceiling < plan.totals[f"{kind}_bits"] <= ceiling
    mixcomp.save(model, tmp_path / "out")
    loaded = mixcomp.load(tmp_path / "out")
    with torch.no_grad():
        wanted, got = original(TEXT).logits, model(TEXT).logits
        assert torch.equal(loaded(TEXT).logits, got)
    assert float((got - wanted).norm() / wanted.norm()) < 0.5
    assert Plan.from_json(plan.to_json()).to_bytes() == plan.to_bytes()
    assert sum(plan.summary()["rows_by_width"].values()) == sum(
        m.fmt.rows for m in model.modules() if isinstance(m, MixedLinear)
    )


@pytest.mark.parametrize(
    ("deciding", "held_widths"),
    [
        (AssignBlocks(Budget(2, count="payload"), group=32), {1, 2, 3}),
        (AssignBlocks(Budget(4.4), group=32, scale_kind=0), {2, 3, 4}),
        (AssignMixes(Budget(4.4), groups=(32, 64)), {4, 5}),
    ],
)
def test_rows_that_mix_widths_are_stored_as_planned(deciding: Assignment, held_widths: set[int]) -> None:
    """Many groups, the last one short; 1-bit groups among them."""
    program = build(WIDE)
    with torch.no_grad():
        program.graph_module.get_parameter("embed.weight")[:, 64:160].mul_(30)
    steps = (
        CollectStatistics(), KeepSamples(), deciding,
        ReorderFeatures(), QuantizeWeights(), InsertSideBranch(), LowerLinears(),
    )  # fmt: skip
    done = manager.run(program, steps, context(WIDE), level=2)
    assert any(s.profile for site in done.open_sites() for s in site.layout.segments)
    found = {int(w) for site in done.open_sites() for w in done.tensor(site.name, "widths").unique()}
    assert held_widths <= found
    for site in done.open_sites():
        assert site.layout.stored_bits() == int(done.tensor(site.name, "planned_bits"))


@pytest.mark.parametrize("strategy", OTHERS)
def test_plans_of_all_strategies_can_be_applied(strategy: str, tmp_path: Path) -> None:
    wanted = mixcomp.compile(tiny(), 5.0, strategy=strategy, calibration=TEXT)
    wanted.mixcomp.plan.save(tmp_path / "plan.json")  # type: ignore[union-attr]
    got = mixcomp.apply(tiny(), tmp_path / "plan.json", calibration=TEXT)
    one, two = wanted.state_dict(), got.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("strategy", OTHERS)
def test_what_a_measurement_does_not_hold_is_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match=rf"{strategy}.*mixcomp\.compile\(model, budget, strategy='{strategy}'\)"):
        mixcomp.plan(measurement(), 5.0, strategy=strategy)


def test_texts_of_widths() -> None:
    assert parse_widths("4458") == [(2, "4"), (1, "5"), (1, "8")]
    assert parse_widths("64x2244 8x4444") == [(64, "2244"), (8, "4444")]
    assert [parse_widths(text) for text in ("", "x", "0x22", "4x", "4x22 ", "4x22  4x33")] == [[]] * 6


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"widths": "8x22"}, MismatchError, "3 groups a row"),
        ({"widths": "8x222 1x333"}, MismatchError, "8 rows, the plan 9"),
        ({"widths": "8x272"}, FormatError, "one of 1, 2, 3, 4, 5, 6, 8"),
        ({"widths": "8x2222", "group": 48}, FormatError, "groups of 48"),
        ({"scales": "triple"}, FormatError, "triple"),
        ({"scales": ["two-level"]}, FormatError, "two-level, float-group"),
    ],
)
def test_edited_profiles_are_checked(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    site = Site("a", (), WeightRef("a", (), (8, 96), torch.float32), None, "x")
    good = {"widths": "4x123 4x321", "rank": 1, "scales": "float-group"}
    made = _decision(site, good)
    assert (made.widths.tolist(), made.scales) == ([[1, 2, 3]] * 4 + [[3, 2, 1]] * 4, Scales.FLOAT_GROUP)
    with pytest.raises(error, match=words):
        _decision(site, good | changes)
