"""The gate keeps what is nearest to the original on text that nothing else has seen."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch

import families
import mixcomp
from mixcomp import api, manager
from mixcomp.calibration import Calibration
from mixcomp.capture import capture
from mixcomp.config import STRATEGIES, Budget
from mixcomp.errors import CalibrationError, ConfigError
from mixcomp.gate import RIVALS, Gate, stored_bits
from mixcomp.lowering.module import MixedLinear
from mixcomp.passes import CollectStatistics, distill
from mixcomp.passes.distill import Teacher, tunables
from mixcomp.passes.keep_samples import KeepSamples
from mixcomp.passes.salience import AnnotateSalience
from mixcomp.passes.score_features import ScoreFeatures
from mixcomp.passes.strategies import passes_of, quantizing_of
from mixcomp.passes.watch import Watch
from mixcomp.program import Program
from mixcomp.protocol import Context
from mixcomp.report import gate_lines

CPU = torch.device("cpu")
TEXT = torch.randint(0, 128, (12, 48), generator=torch.Generator().manual_seed(0))
LEARN, (HELD,) = Calibration((TEXT,), "").split()
CONTEXT = Context(CPU, LEARN, held=(HELD,))


def sharp(family: str = "llama", layers: int = 1) -> Any:
    """A tiny model whose predictions are far from even."""
    model = families.build(family, num_hidden_layers=layers)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    a, b = state(one), state(two)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def compiled(budget: float = 5.0, text: torch.Tensor = TEXT, **options: Any) -> Any:
    return mixcomp.compile(sharp(), budget, calibration=text, **options)


@torch.no_grad()
def kl(model: Any, windows: torch.Tensor) -> float:
    """KL(original || model) in nats a token, whole forward passes, sums in fp64."""
    wanted, got = (m(windows).logits.double().log_softmax(-1) for m in (sharp(), model))
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rivals, and nothing learned by gradients."""
    monkeypatch.setitem(api.TUNING, "balanced", ())


@pytest.fixture
def upside_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide rows are priced as narrow ones are, so that joint buys what harms most."""
    price = AnnotateSalience.run

    def run(self: AnnotateSalience, program: Program, context: Context) -> Program:
        made = price(self, program, context)
        return made.with_tensors({k: t.flip(1) for k, t in made.tensors.items() if k.endswith("/salience")})

    monkeypatch.setattr(AnnotateSalience, "run", run)


def test_the_best_by_whole_forward_passes_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(api.TUNING, "balanced", ())
    budget, seen, run = 5.0, list[torch.Tensor](), Watch.run

    def watch(self: Watch, *args: Any, **options: Any) -> Any:
        seen.append(args[0])
        return run(self, *args, **options)

    monkeypatch.setattr(Watch, "run", watch)
    model = compiled(budget, effort="balanced")
    monkeypatch.undo()
    windows = {tuple(row) for batch in seen for row in batch.tolist()}
    assert windows == {tuple(row) for batch in LEARN for row in batch.tolist()}, "whatever measures sees these only"
    rows = model.mixcomp.report["gate"]
    assert [row["strategy"] for row in rows] == list(STRATEGIES)
    alone = {name: compiled(budget, strategy=name) for name in STRATEGIES[1:]}
    scores = {name: kl(other, HELD) for name, other in alone.items()}
    for row in rows[1:]:
        assert row["kl"] == pytest.approx(scores[row["strategy"]], rel=1e-3)
        held = [m.packed().stored_bits() for m in alone[row["strategy"]].modules() if isinstance(m, MixedLinear)]
        assert row["stored_bits_per_weight"] == sum(held) / model.mixcomp.plan.totals["weights"] <= budget
    (kept,) = (row for row in rows if row["kept"])
    assert kept["kl"] == min(row["kl"] for row in rows) == pytest.approx(kl(model, HELD), rel=1e-3)
    assert kept["strategy"] == model.mixcomp.plan.options["strategy"]
    assert all(other.mixcomp.report["gate"] == [] for other in alone.values())


@pytest.mark.usefixtures("upside_down", "untuned")
@pytest.mark.parametrize(("budget", "effort"), [(4.4, "fast"), (5.0, "balanced")])
def test_a_rival_that_is_better_is_what_the_user_gets(budget: float, effort: str) -> None:
    model = compiled(budget, effort=effort)
    rows, plan = model.mixcomp.report["gate"], model.mixcomp.plan
    winner = min((row for row in rows if row["kl"] is not None), key=lambda row: row["kl"])
    assert winner["strategy"] != "joint"
    assert [row["strategy"] for row in rows if row["kept"]] == [winner["strategy"]]
    assert kl(model, HELD) == pytest.approx(winner["kl"], rel=1e-3)
    assert (model.mixcomp.report["strategy"], plan.options["strategy"]) == ("joint", winner["strategy"])
    asked = compiled(budget, strategy=winner["strategy"], effort=effort)
    assert same(model, asked)
    assert plan.to_bytes() == asked.mixcomp.plan.to_bytes()
    followed: Any = mixcomp.apply(sharp(), plan, calibration=TEXT)
    assert same(followed, model)
    assert followed.mixcomp.report["gate"] == []


@pytest.mark.usefixtures("untuned")
def test_a_rival_that_cannot_spend_the_budget_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScoreFeatures, "run", None)  # it would be work for nothing
    model = compiled(2.6, effort="balanced")
    row = next(row for row in model.mixcomp.report["gate"] if row["strategy"] == "mixllm")
    assert row["kl"] is row["stored_bits_per_weight"] is None
    assert row["reason"].startswith("budget 2.6 bits per weight (stored) is below the floor: these 36,864 weights take")
    assert not row["kept"]
    (line,) = (line for line in gate_lines(model.mixcomp.report) if "mixllm" in line)
    assert line.endswith("weights take 4.347 to 8.569 bits each")


@pytest.mark.usefixtures("untuned")
def test_a_rival_that_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConfigError("samples are out")

    monkeypatch.setattr(KeepSamples, "run", fail)
    model = mixcomp.compile(sharp(), 4.4, calibration=TEXT, effort="balanced")
    rows = {row["strategy"]: row for row in model.mixcomp.report["gate"]}  # type: ignore[union-attr]
    assert rows.keys() == set(STRATEGIES)
    assert "samples are out" in rows["slim"]["reason"]
    assert rows["slim"]["kl"] is None
    assert not rows["slim"]["kept"]


@pytest.mark.usefixtures("untuned")
def test_rivals_keep_the_widths_that_the_user_set() -> None:
    model = compiled(5.0, effort="balanced", overrides={"re:.*down_proj": 5})
    assert [row["reason"] for row in model.mixcomp.report["gate"]] == [None] * len(STRATEGIES)
    all_set = compiled(5.4, effort="balanced", overrides={"re:.*": 5})
    rows = all_set.mixcomp.report["gate"]
    kl = {row["strategy"]: row["kl"] for row in rows}
    assert len({kl[name] for name in STRATEGIES[2:]}) == 1, "nothing is left to decide but how channels are scaled"
    assert [row["strategy"] for row in rows if row["kept"]] == [min(kl, key=kl.__getitem__)], "of equal ones the first"
    codes = mixcomp.compile(sharp(), Budget(4, count="payload"), calibration=TEXT, effort="balanced")
    totals: Any = codes.mixcomp.plan.totals  # type: ignore[union-attr]
    assert totals["payload_bits"] <= 4 * totals["weights"] < totals["stored_bits"]


def test_windows_kept_back_shape_nothing_but_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RIVALS, "fast", ())  # nothing to choose from
    other = TEXT.clone()
    other[(TEXT[:, None] == HELD).all(-1).any(-1)] = torch.arange(48)
    assert int((other != TEXT).any(-1).sum()) == len(HELD) == 3
    one, again, two = (compiled(3.0, text) for text in (TEXT, TEXT, other))
    assert one.mixcomp.plan.to_bytes() == two.mixcomp.plan.to_bytes()
    assert same(one, two)
    assert same(one, again)
    assert one.mixcomp.report["gate"] == again.mixcomp.report["gate"] != two.mixcomp.report["gate"]
    calibration = one.mixcomp.report["calibration"]
    assert (calibration["tokens"], calibration["held_windows"], calibration["held_tokens"]) == (576, 3, 144)
    assert one.mixcomp.plan.options["strategy"] == "joint"
    plan = mixcomp.plan(mixcomp.measure(sharp(), TEXT), 3.0)
    assert plan.to_bytes() == one.mixcomp.plan.to_bytes()
    assert same(mixcomp.apply(sharp(), plan), one)


def test_a_single_window_is_too_little_to_judge_by() -> None:
    model = compiled(text=TEXT[:1])
    (row,) = model.mixcomp.report["gate"]
    assert (row["kl"], row["kept"]) == (None, True)
    assert "too little to keep a window back" in row["reason"]
    with pytest.raises(CalibrationError, match=r"1 calibration window.*at least 2.*effort"):
        compiled(text=TEXT[:1], effort="balanced")


def quantized(family: str = "llama", strategy: str = "joint") -> tuple[Program, Program, Program]:
    """(with statistics, measured, quantized) at 3.5 bits."""
    measuring, deciding = passes_of(strategy, Budget(3.5))
    plain = manager.run(capture(sharp(family, 2)), (CollectStatistics(),), CONTEXT)
    measured = manager.run(plain, measuring, CONTEXT)
    return plain, measured, manager.run(measured, (deciding, *quantizing_of(strategy)), CONTEXT)


@pytest.mark.parametrize(("family", "strategy"), [("llama", "joint"), ("gpt2", "joint"), ("gemma2", "slim")])
@torch.no_grad()
def test_part_by_part_is_the_whole(family: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, program = quantized(family, strategy)
    teacher = Teacher.of(program)
    tuned = tunables(program, CPU, rounding=False)
    weights = {name: one.weight() for name, one in tuned.items()}
    total = 0.0
    for window in HELD.split(1):
        values = [{teacher.stages.tokens: window} for _ in range(2)]
        for part in teacher.stages.parts:
            for own, used in zip(values, (teacher.weights, weights), strict=True):
                own.update(part.run(own, used))
        wanted, found = (own[teacher.stages.logits].float().log_softmax(-1) for own in values)
        total += float((wanted.exp() * (wanted - found)).sum()) / window.numel()
    ends = teacher.ends(HELD)
    assert teacher.distance(tuned, HELD, ends) == pytest.approx(total / len(HELD), rel=1e-4)

    alive: list[weakref.ref[torch.Tensor]] = []
    names = {site.name for site in program.open_sites()}  # a new norm is the table's own

    def one_part(*args: Any, **options: Any) -> Any:
        gc.collect()
        assert not any(ref() is not None for ref in alive), "weights of an earlier part are still there"
        made = tunables(*args, **options)
        own = (one for name, one in made.items() if name in names)
        alive.extend(weakref.ref(one.codes if strategy == "joint" else one.fixed) for one in own)
        return made

    monkeypatch.setattr(distill, "tunables", one_part)
    assert teacher.distance(program, HELD, ends) == teacher.distance(tuned, HELD, ends)


@pytest.mark.parametrize(
    ("scores", "kept"),
    [((2.0, 1.0, 3.0), 1), ((1.0, 1.0, 1.0), 0), ((2.0, 1.0, 1.0), 1), ((math.nan, 2.0, 1.0), 2),
     ((1.0, math.nan, 2.0), 0), ((math.inf, math.nan, math.nan), 0)],
)  # fmt: skip
def test_the_least_is_kept_and_losers_are_gone(
    scores: tuple[float, ...], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, measured, program = quantized()
    seen: list[weakref.ref[Program]] = []
    most = 0

    def distance(_: Teacher, candidate: Program, *_rest: object) -> float:
        nonlocal most
        seen.append(weakref.ref(candidate))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in seen))
        return scores[len(seen) - 1]

    monkeypatch.setattr(Teacher, "distance", distance)
    gate = Gate(program)
    del program
    rivals = {name: passes_of(name, Budget(3.5)) for name in ("uniform", "slim")}
    gate.run(plain, measured, rivals, CONTEXT)
    names = ["joint", *rivals]
    assert gate.strategy == names[kept]
    assert seen[kept]() is gate.kept
    assert [row["kept"] for row in gate.rows] == [i == kept for i in range(3)]
    assert [row["kl"] for row in gate.rows] == [score if math.isfinite(score) else None for score in scores]
    assert most <= 2, "the best and the one being scored"
    gc.collect()
    assert sum(ref() is not None for ref in seen) == 1


def test_what_joint_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, measured, program = quantized()
    monkeypatch.setattr(AnnotateSalience, "run", None)
    gate = Gate(program)
    said: list[tuple[str, int, int]] = []
    context = Context(CPU, LEARN, held=(HELD,), progress=lambda *step: said.append(step))
    gate.run(plain, measured, {"uniform": passes_of("uniform", Budget(3.5))}, context)
    assert [step[1:] for step in said if step[0] == "gate"] == [(0, 2), (1, 2), (2, 2)]
    assert gate.rows[1]["stored_bits_per_weight"] <= 3.5
    assert gate.rows[0]["stored_bits_per_weight"] == stored_bits(program)
