"""Planning from a measurement: the pass's decisions, the same bytes each time, and a curve that tells the truth."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from measured import DOWN, PROJ, UP, measurement, priced
from mixcomp import manager
from mixcomp.config import Budget, MeasureConfig
from mixcomp.errors import BudgetError, ConfigError, InputError, MixCompError
from mixcomp.fingerprint import Identity
from mixcomp.measurement import Measurement, Moments
from mixcomp.passes import AssignPrecision, InsertSideBranch, QuantizeWeights, ReorderFeatures
from mixcomp.passes.coupling import Couplings
from mixcomp.planning import plan
from mixcomp.plans import Plan
from mixcomp.program import Site, WeightRef
from mixcomp.protocol import Context


@pytest.mark.parametrize("strategy", ["joint", "uniform"])
@pytest.mark.parametrize("budget", [3.1, 4.4, "2300B", Budget(4.0, count="payload")])
def test_a_plan_is_what_the_passes_do(budget: float | str | Budget, strategy: str) -> None:
    budget = Budget(2300.0 * 4, "bytes") if isinstance(budget, str) else budget
    made = plan(measurement(), budget, strategy=strategy)
    step = AssignPrecision(Budget.parse(budget), strategy=strategy)  # type: ignore[arg-type]
    done = manager.run(priced(), (step, ReorderFeatures(), QuantizeWeights(), InsertSideBranch()), Context(seed=3))
    stored = 0
    for site in done.open_sites():
        decided = made.sites[site.name]
        assert decided["widths"] == "".join(map(str, done.tensor(site.name, "widths").tolist()))
        assert decided["rank"] == int(done.tensor(site.name, "planned_rank")) >= site.layout.rank
        moved = done.find(site.name, "row_order") is not None
        assert decided["reorder"] == ("scatter" if site.layout.scatter else "absorbed" if moved else "none")
        stored += replace(site.layout, rank=decided["rank"]).stored_bits()
    assert made.totals["stored_bits"] == stored
    assert made.predicted_loss == float(done.tensor("budget", "loss"))
    if Budget.parse(budget).count == "stored":
        assert stored <= Budget.parse(budget).bits(made.totals["weights"])


def test_the_same_arguments_give_the_same_bytes() -> None:
    one, other = plan(measurement(), 4.4), plan(measurement(), "4.4bpw")
    assert one.to_bytes() == other.to_bytes()
    assert one == other
    assert one.to_bytes() != plan(measurement(), 4.5).to_bytes()
    assert b"measurement" not in one.to_bytes()


def test_overrides_pin_widths() -> None:
    made = plan(measurement(), 5.5, overrides={"layers.*": 3, DOWN: 8})
    assert set(made.sites[DOWN]["widths"]) == {"8"}
    assert set(made.sites[UP]["widths"]) == set(made.sites[PROJ]["widths"]) == {"3"}


def test_the_curve_falls_is_convex_and_meets_the_plans() -> None:
    held = measurement()
    found = plan(held, 4.4)
    points = found.curve()
    assert points == held.curve()
    bits, loss = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    assert bool((bits.diff() >= 0).all())
    assert bool((loss.diff() <= 0).all())
    least, most = points[0], points[-1]
    weights = found.totals["weights"]
    low = plan(held, (least[0] * weights + 1) / weights, overrides=None)
    assert low.predicted_loss == pytest.approx(least[1], rel=0.3)
    assert most[1] < 1e-3 * least[1]
    for budget in (3.0, 4.4, 6.0):
        near = max((p for p in points if p[0] <= budget), key=lambda p: p[0])
        assert 0.5 * near[1] <= plan(held, budget).predicted_loss <= near[1] + 1e-12


def test_a_plan_from_a_file_has_no_curve() -> None:
    with pytest.raises(InputError, match="read from a file"):
        Plan.from_json(plan(measurement(), 4.4).to_json()).curve()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"budget": 1.0}, BudgetError, "below the floor"),
        ({"budget": 16.0}, BudgetError, "above the ceiling"),
        ({"budget": "lots"}, ConfigError, "lots"),
        ({"budget": 4.4, "strategy": "joynt"}, ConfigError, "joint"),
        ({"budget": 4.4, "overrides": {"nothing": 4}}, ConfigError, "nothing"),
        ({"budget": 4.4, "overrides": {DOWN: 16}}, ConfigError, "exclude="),
        ({"budget": 4.4, "overrides": {DOWN: 7}}, ConfigError, "7"),
        ({"budget": 4.4, "measurement": 3}, InputError, "int"),
        ({"budget": 4.4, "measurement": "no/such/folder"}, MixCompError, "no measurement"),
    ],
)
def test_bad_arguments_name_themselves(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plan(**({"measurement": measurement()} | options))  # type: ignore[arg-type]


def synthetic(layers: int, size: int) -> Measurement:
    """Random prices for square linears that all stand alone."""
    draw = torch.Generator().manual_seed(0)
    names = [f"layers.{i}" for i in range(layers)]
    sites = tuple(Site(n, (), WeightRef(n, (), (size, size), torch.bfloat16), None, n) for n in names)
    tensors = {}
    for name in names:
        spread = torch.randn(size, 1, generator=draw).exp() * (1 + 0.1 * torch.rand(size, 6, generator=draw))
        tensors[f"{name}/salience"] = spread * 4.0 ** -torch.tensor([2.0, 3, 4, 5, 6, 8])
    identity = Identity.given(sites, dict.fromkeys(names, "0" * 64))
    return Measurement(sites, Couplings((), {}), identity, MeasureConfig(), "none", tensors, Moments())


def test_a_hundred_thousand_rows_take_seconds() -> None:
    """An 8 B model has 14 times as many, and 20 seconds."""
    given, threads = synthetic(24, 4096), torch.get_num_threads()
    start = time.process_time()
    made = plan(given, 4.4)
    assert time.process_time() - start < 5
    assert torch.get_num_threads() == threads
    assert 4.39 < made.totals["stored_bits"] / made.totals["weights"] <= 4.4
