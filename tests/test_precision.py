"""assign-precision: bits recounted from what is stored, ceilings, overrides, the uniform baseline."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixcomp import manager
from mixcomp.budget import limits, row_bits
from mixcomp.config import Budget
from mixcomp.errors import BudgetError, ConfigError
from mixcomp.format import GROUPS, WIDTHS, Scales, SiteFormat, runs
from mixcomp.packed import PackedWeight
from mixcomp.passes import (
    AnnotateSalience,
    AssignPrecision,
    CollectStatistics,
    InsertSideBranch,
    QuantizeWeights,
    ReorderFeatures,
)
from mixcomp.program import Program
from programs import Blueprint, Kind, Layer, build, context

MODEL = Blueprint(
    (Layer(Kind.GATED, 100), Layer(Kind.PLAIN, 66, bias=True), Layer(Kind.REUSED, 80)), width=160, vocab=13
)


@pytest.fixture(scope="module")
def priced() -> Program:
    program = build(MODEL)
    return manager.run(program, (CollectStatistics(), AnnotateSalience()), context(MODEL), level=2)


def assigned(program: Program, budget: float | Budget, **options: object) -> Program:
    given_budget = budget if isinstance(budget, Budget) else Budget(budget)
    return manager.run(program, (AssignPrecision(given_budget, **options),), context(MODEL), level=2)  # type: ignore[arg-type]


def stored(program: Program) -> tuple[int, int]:
    """(bits counted from packed tensors, weights) after the whole quantization."""
    done = manager.run(program, (ReorderFeatures(), QuantizeWeights(), InsertSideBranch()), context(MODEL), level=2)
    bits = weights = 0
    for site in done.open_sites():
        assert site.format is not None
        packed = PackedWeight.from_tensors(site.format, {k: done.tensor(site.name, k) for k in site.format.tensors()})
        bits += sum(8 * t.nbytes for t in packed.tensors().values())
        weights += site.rows * site.columns
        assert packed.stored_bits() == int(done.tensor(site.name, "planned_bits"))
    return bits, weights


@pytest.mark.parametrize("strategy", ["joint", "uniform"])
@pytest.mark.parametrize("budget", [3.2, 4.4, 6.0])
def test_the_budget_is_a_ceiling_on_stored_bytes(priced: Program, budget: float, strategy: str) -> None:
    bits, weights = stored(assigned(priced, budget, strategy=strategy))
    assert bits <= budget * weights
    assert bits >= 0.985 * budget * weights


def test_joint_is_predicted_and_measured_no_worse_than_uniform(priced: Program) -> None:
    for budget in (3.2, 4.4):
        joint, uniform = assigned(priced, budget), assigned(priced, budget, strategy="uniform")
        assert float(joint.tensor("budget", "loss")) <= float(uniform.tensor("budget", "loss"))


def test_more_salient_rows_never_get_fewer_bits(priced: Program) -> None:
    """A4: among rows of one site whose cost is a multiple of another's at every width."""
    site = priced.site("layers.0.down")
    base = priced.tensor(site.name, "salience")[:1]
    scale = torch.logspace(-2, 2, site.rows)[:, None]
    widths = assigned(priced.with_tensors({f"{site.name}/salience": base * scale}), 4.0).tensor(site.name, "widths")
    assert torch.equal(widths, widths.sort().values)


def test_overrides_pin_widths(priced: Program) -> None:
    found = assigned(priced, 5.5, fixed=(("layers.0.down", 8), ("layers.1.proj", 2)))
    assert set(found.tensor("layers.0.down", "widths").tolist()) == {8}
    assert set(found.tensor("layers.1.proj", "widths").tolist()) == {2}
    with pytest.raises(ConfigError, match=r"'layers\.9'"):
        assigned(priced, 5.0, fixed=(("layers.9", 8),))


def test_payload_budgets_count_codes_only(priced: Program) -> None:
    found = assigned(priced, Budget(4.0, count="payload"))
    sites = found.open_sites()
    payload = sum(
        SiteFormat(s.rows, s.columns, runs(found.tensor(s.name, "widths").tolist())).payload_bits() for s in sites
    )
    weights = sum(s.rows * s.columns for s in sites)
    assert 3.9 * weights < payload <= 4.0 * weights


def test_out_of_range_budgets_name_floor_and_ceiling(priced: Program) -> None:
    for budget, side in ((2.0, "below the floor"), (12.0, "above the ceiling")):
        with pytest.raises(BudgetError, match=side):
            assigned(priced, budget)


def test_the_floor_is_reached_and_stored(priced: Program) -> None:
    bounds = limits(priced.sites, {}, {}, "stored")
    bits, weights = stored(assigned(priced, Budget(bounds.floor / bounds.weights + 1e-9)))
    assert bits == bounds.floor
    assert weights == bounds.weights


@given(
    st.integers(1, 300), st.sampled_from(WIDTHS), st.booleans(), st.sampled_from(GROUPS), st.sampled_from([*Scales])
)  # fmt: skip
def test_row_bits_add_up_to_the_format(columns: int, width: int, index: bool, group: int, scales: Scales) -> None:
    rows = 7
    fmt = SiteFormat(rows, columns, runs([width] * rows), scatter=index, group=group, scales=scales)
    assert rows * row_bits(rows, columns, width, index, "stored", group, scales) == fmt.stored_bits()
    assert rows * row_bits(rows, columns, width, index, "payload", group, scales) == fmt.payload_bits()
