"""The front door end to end on a tiny model: options, failure leaves the model alone, determinism, the Dynamo backend."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import families
import mixcomp
from mixcomp import api
from mixcomp.errors import ArtifactError, BudgetError, CalibrationError, ConfigError, InputError, MismatchError
from mixcomp.lowering.module import MixedLinear
from mixcomp.passes import CollectStatistics, TuneBlocks, TuneClipping, TuneModel
from mixcomp.program import Program
from mixcomp.protocol import Context


def tiny() -> Any:
    return families.FAMILIES["llama"]()


def text(samples: int = 8, length: int = 32) -> list[torch.Tensor]:
    return [torch.randint(0, 100, (samples, length), generator=torch.Generator().manual_seed(0))]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture(scope="module")
def compiled() -> tuple[Any, Any]:
    """(original, the same model compiled to 6 bits)."""
    original = tiny()
    return original, mixcomp.compile(original, 6.0, calibration=text(), copy=True)


def test_the_model_keeps_generating_within_the_budget(compiled: tuple[Any, Any]) -> None:
    original, model = compiled
    assert type(model) is type(original)
    ids = torch.randint(0, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, got = original(ids).logits, model(ids).logits
    assert float((got - wanted).norm() / wanted.norm()) < 0.05
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 11)
    plan = model.mixcomp.plan
    held = sum(m.packed().stored_bits() for m in model.modules() if isinstance(m, MixedLinear))
    assert held == plan.totals["stored_bits"] <= 6.0 * plan.totals["weights"]


@pytest.mark.parametrize(
    ("effort", "learned"),
    [("fast", []), (None, []), ("balanced", ["tune-blocks"]), ("best", ["tune-blocks", "tune-model"])],
)
def test_efforts_add_passes_that_learn(effort: str | None, learned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"balanced": (TuneBlocks(steps=2),), "best": (TuneBlocks(steps=2), TuneModel(steps=2))}
    for name, passes in quick.items():
        assert [type(p) for p in api.TUNING[name]] == [type(p) for p in passes]
        monkeypatch.setitem(api.TUNING, name, passes)
    model: Any = mixcomp.compile(tiny(), 4.4, calibration=text(), effort=effort)
    stages = [s["stage"] for s in model.mixcomp.report["stages"]]
    assert [s for s in stages if s.startswith("tune")] == learned
    assert model.mixcomp.plan.options["effort"] == effort
    found = model.mixcomp.report["calibration"]
    assert found["written_tokens"] == (3 * (found["tokens"] - found["held_tokens"]) if learned else 0)
    assert ("writing" in stages) == bool(learned)


def test_what_learns_reads_text_of_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times as much, from tokens of the windows; nothing is measured on it."""
    seen: dict[str, torch.Tensor] = {}

    class Reader(TuneBlocks):
        def run(self, program: Program, context: Context) -> Program:
            seen["learned"], seen["own"] = torch.cat(context.batches), torch.cat(context.written)
            return program

    class Counter(CollectStatistics):
        def run(self, program: Program, context: Context) -> Program:
            seen["measured"] = torch.cat(context.batches)
            return super().run(program, context)

    monkeypatch.setitem(api.TUNING, "balanced", (Reader(),))
    monkeypatch.setattr(api, "CollectStatistics", Counter)
    mixcomp.compile(tiny(), 4.4, calibration=text(), effort="balanced", strategy="uniform")
    given, own = seen["learned"], seen["own"]
    assert torch.equal(given, seen["measured"])
    assert own.shape == (3 * len(given), given.shape[1])
    assert torch.equal(own[::3, 0], given[:, 0])
    assert not torch.equal(own[::3], given)


@pytest.mark.parametrize("strategy", ["slim", "amlq"])
@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_the_papers_formats_have_their_own_learning(
    strategy: str, effort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert api.CLIPPING[strategy] == (TuneClipping(),)
    monkeypatch.setitem(api.CLIPPING, strategy, (TuneClipping(steps=2),))
    model: Any = mixcomp.compile(tiny(), 4.4, calibration=text(), strategy=strategy, effort=effort)
    stages = [s["stage"] for s in model.mixcomp.report["stages"]]
    assert [s for s in stages if s.startswith("tune")] == ([] if effort == "fast" else ["tune-clipping"])
    held = sum(m.packed().stored_bits() for m in model.modules() if isinstance(m, MixedLinear))
    assert held == model.mixcomp.plan.totals["stored_bits"] <= 4.4 * model.mixcomp.plan.totals["weights"]


def test_a_measurement_holds_no_text_to_learn_from() -> None:
    measured = mixcomp.measure(tiny(), text())
    plan = mixcomp.plan(measured, 4.4)
    asked = replace(plan, options={**plan.options, "effort": "best"})
    model = tiny()
    with pytest.raises(ConfigError, match=r"effort 'best'.*a measurement holds none; leave the measurement out"):
        mixcomp.apply(model, asked)
    assert same(state(model), state(tiny()))


def test_copy_leaves_the_original_alone(compiled: tuple[Any, Any]) -> None:
    original, _ = compiled
    assert same(state(original), state(tiny()))
    assert not any(isinstance(m, MixedLinear) for m in original.modules())


def test_every_linear_is_compiled_or_has_a_reason(compiled: tuple[Any, Any]) -> None:
    original, model = compiled
    plan = model.mixcomp.plan
    linears = {n for n, m in original.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears == set(plan.sites) | set(plan.left_alone)
    assert all(plan.left_alone.values())


def test_the_same_command_gives_the_same_plan_and_bytes(compiled: tuple[Any, Any]) -> None:
    again = mixcomp.compile(tiny(), 6.0, calibration=text())
    assert json.dumps(again.mixcomp.plan.to_json()) == json.dumps(compiled[1].mixcomp.plan.to_json())
    assert same(state(again), state(compiled[1]))


def test_dynamo_runs_a_compiled_model_through_the_backend(compiled: tuple[Any, Any]) -> None:
    model = compiled[1]
    run = torch.compile(model, backend="mixcomp", dynamic=True)
    for shape in ((1, 5), (3, 9), (2, 1)):
        ids = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            torch.testing.assert_close(run(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"budget": 1.0}, BudgetError, "below the floor"),
        ({"budget": 15.0}, BudgetError, "above the ceiling"),
        ({"budget": float("nan")}, BudgetError, "budget"),
        ({"budget": "lots"}, ConfigError, "budget"),
        ({"budget": True}, ConfigError, "budget"),
        ({"budget": 6.0, "strategy": "joynt"}, ConfigError, "joint"),
        ({"budget": 6.0, "exclude": ["no.such.layer"]}, ConfigError, r"no\.such\.layer"),
        ({"budget": 6.0, "overrides": {"re:nothing": 4}}, ConfigError, "re:nothing"),
        ({"budget": 6.0, "overrides": {"model.layers.0": 7}}, ConfigError, "7"),
        ({"budget": 6.0, "calibration": []}, CalibrationError, "calibration"),
        ({"budget": 6.0, "calibration": [torch.full((4, 32), 10**6)]}, CalibrationError, "1000000"),
    ],
)
def test_bad_options_name_themselves_and_change_nothing(
    options: dict[str, Any], error: type[Exception], names: str
) -> None:
    model = tiny()
    before, random = state(model), torch.random.get_rng_state()
    with pytest.raises(error, match=names):
        mixcomp.compile(model, **({"calibration": text()} | options))
    assert same(state(model), before)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_failure_late_in_the_work_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixcomp.passes.side_branch import InsertSideBranch

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    model = tiny()
    before = state(model)
    monkeypatch.setattr(InsertSideBranch, "run", fail)
    with pytest.raises(mixcomp.MixCompError, match="insert-side-branch failed with RuntimeError: out of luck"):
        mixcomp.compile(model, 6.0, calibration=text())
    assert same(state(model), before)
    assert not any(p.grad is not None or m._forward_hooks for m in model.modules() for p in m.parameters())


def test_compiling_twice_is_refused(compiled: tuple[Any, Any]) -> None:
    with pytest.raises(InputError):
        mixcomp.compile(copy.deepcopy(compiled[1]), 6.0, calibration=text())


def test_overrides_and_exclusions_are_kept() -> None:
    model = mixcomp.compile(
        tiny(), 7.5, calibration=text(), overrides={"re:.*down_proj": 8}, exclude=["model.layers.0.self_attn.q_proj"]
    )
    sites = model.mixcomp.plan.sites  # type: ignore[union-attr]
    assert all(set(s["widths"]) == {"8"} for name, s in sites.items() if name.endswith("down_proj"))
    assert "model.layers.0.self_attn.q_proj" not in sites
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), torch.nn.Linear)


@pytest.fixture(scope="module")
def measured() -> mixcomp.Measurement:
    return mixcomp.measure(tiny(), text())


def test_measure_leaves_the_model_alone() -> None:
    model = tiny()
    before = state(model)
    found = mixcomp.measure(model, text(), exclude=["model.layers.0"], seed=5)
    assert same(state(model), before)
    assert not hasattr(model, "mixcomp")
    assert found.options.seed == 5
    assert not any(s.open for s in found.sites if s.name.startswith("model.layers.0."))


def test_three_steps_are_one(compiled: tuple[Any, Any], measured: mixcomp.Measurement, tmp_path: Path) -> None:
    plan = mixcomp.plan(measured, 6.0)
    assert plan.to_bytes() == compiled[1].mixcomp.plan.to_bytes()
    measured.save(tmp_path / "measured")
    plan.save(tmp_path / "plan.json")
    ways: list[dict[str, Any]] = [
        {"plan": plan},
        {"plan": tmp_path / "plan.json", "measurement": tmp_path / "measured"},
        {"plan": tmp_path / "plan.json", "calibration": text()},
    ]
    for way in ways:
        applied: Any = mixcomp.apply(tiny(), **way)
        assert same(state(applied), state(compiled[1]))
        assert applied.mixcomp.plan.to_bytes() == plan.to_bytes()
        assert applied.mixcomp.plan.measurement is None, "a model does not hold on to gigabytes of moments"
        source = applied.mixcomp.report["calibration"]["source"]
        assert source.startswith("again, for quantization" if "calibration" in way else "measured: ")


def test_another_model_is_refused_with_differences(measured: mixcomp.Measurement) -> None:
    plan = mixcomp.plan(measured, 6.0)
    other = tiny()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 3] += 1
    before = state(other)
    with pytest.raises(MismatchError, match=r"model\.layers\.1\.mlp\.up_proj has other weights"):
        mixcomp.apply(other, plan)
    read = mixcomp.Plan.from_json(plan.to_json())
    with pytest.raises(MismatchError, match="their weights differ"):
        mixcomp.apply(other, read, calibration=text())
    larger = families.build("llama", num_hidden_layers=3)
    with pytest.raises(MismatchError, match=r"model\.layers\.2\.mlp\.down_proj is only in the model"):
        mixcomp.apply(larger, read, calibration=text())
    assert same(state(other), before)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"plan": 3}, InputError, "plan is a int"),
        ({"plan": "absent.json"}, ArtifactError, r"absent\.json"),
        ({"measurement": 3}, InputError, "measurement is a int"),
        ({"measurement": "absent"}, ArtifactError, "absent"),
        ({"calibration": text()}, ConfigError, "leave one out"),
    ],
)
def test_bad_arguments_of_apply(
    measured: mixcomp.Measurement, options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        mixcomp.apply(tiny(), **({"plan": mixcomp.plan(measured, 6.0)} | options))


@pytest.mark.parametrize(
    ("option", "value"), [("seed", -1), ("min_coverage", 2), ("exclude", "lm_head"), ("length", 1)]
)
def test_bad_options_of_measure(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        mixcomp.measure(tiny(), text(), **{option: value})


def test_draws_of_calibration_text_make_plans_that_overlap(measured: mixcomp.Measurement) -> None:
    draw = [torch.randint(0, 100, (8, 32), generator=torch.Generator().manual_seed(9))]
    plans = [mixcomp.plan(m, 6.0) for m in (measured, mixcomp.measure(tiny(), draw))]
    assert plans[0].model == plans[1].model
    assert 0.0 < mixcomp.overlap(*plans) < 1.0
