"""MixLLM: salience against weight gradients and finite differences, its own count and ours, a model end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mixcomp
from families import build as family
from mixcomp import manager
from mixcomp.budget import row_bits
from mixcomp.config import Budget
from mixcomp.errors import BudgetError, CalibrationError, ConfigError, FormatError
from mixcomp.format import Scales
from mixcomp.passes import CollectStatistics, QuantizeWeights, ReorderFeatures, mixllm, score_features
from mixcomp.passes.assign_features import AssignFeatures
from mixcomp.passes.mixllm import losses_of, taylor_salience, widths_by_share
from mixcomp.passes.rounding import round_range
from mixcomp.passes.score_features import ScoreFeatures
from mixcomp.program import Program
from mixcomp.protocol import Context
from programs import Blueprint, Kind, Layer, build, context

MODEL = Blueprint((Layer(Kind.GATED, 96), Layer(Kind.REUSED, 64), Layer(Kind.TRANSPOSED, 40, bias=True)), width=64)
SCORE = ScoreFeatures((8, 4, 2))


def text(samples: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 13, (samples, length), generator=torch.Generator().manual_seed(7))


def sequence_loss(program: Program, ids: torch.Tensor) -> torch.Tensor:
    logits = program.graph_module(ids[None])[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:])


def expected(program: Program, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """S_c by gradients of the weights themselves, one sequence after another, fp64[rows, steps]."""
    sites = program.open_sites()
    parameters = [program.graph_module.get_parameter(program.graph_key(s)).requires_grad_() for s in sites]
    out = {s.name: torch.zeros(s.rows, 2, dtype=torch.float64) for s in sites}
    for row in ids:
        for site, gradient in zip(sites, torch.autograd.grad(sequence_loss(program, row), parameters), strict=True):
            gradient = gradient.t() if site.weight.transposed else gradient
            weight = program.weight(site).detach()
            for i, width in enumerate((4, 2)):
                dot = ((round_range(weight, width, 32) - weight) * gradient).sum(1).double()
                out[site.name][:, i] += (dot + dot**2 / 2).abs() / len(ids)
    return out


def salience_is_right() -> None:
    program = build(MODEL)
    found = SCORE.run(program, Context(batches=(text(),)))
    for name, wanted in expected(build(MODEL), text()).items():
        got = found.tensor(name, "mixllm").double()
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))


def test_salience_is_that_of_weight_gradients() -> None:
    salience_is_right()


def unshifted(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1) - torch.nn.functional.one_hot(ids, logits.shape[-1])


BUGS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "first order only": ("taylor_salience", lambda dots: dots.abs()),
    "no absolute value": ("taylor_salience", lambda dots: dots + dots.square() / 2),
    "labels not shifted": ("_residual", unshifted),
    "squares of gradients": ("feature_dots", lambda g, x, d: (g * (x @ d.T)).square().sum(0)),
    "one error for all widths": ("round_range", lambda w, width, group: round_range(w, 4, group)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_salience_oracle_bites(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_features, *BUGS[bug])
    with pytest.raises(AssertionError):
        salience_is_right()


def test_salience_is_the_measured_change_of_the_loss() -> None:
    """Oracle 11: a step of a thousandth of the error changes the loss by a thousandth of g.delta."""
    program, ids = build(MODEL), text(1)
    found = SCORE.run(program, Context(batches=(ids,))).tensor("layers.0.down", "mixllm")[:, 0]
    program.graph_module.double()
    weight = program.graph_module.get_parameter("layers.0.down.weight")
    delta = round_range(weight.detach(), 4, 32) - weight.detach()
    step = 1e-3
    for row in torch.argsort(found, descending=True)[:8].tolist():
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[row] += sign * step * delta[row]
                losses.append(float(sequence_loss(program, ids[0])))
                weight[row] -= sign * step * delta[row]
        dot = (losses[0] - losses[1]) / (2 * step)
        assert abs(dot + dot**2 / 2) == pytest.approx(float(found[row]), rel=5e-3)


def test_nothing_is_left_on_the_parameters() -> None:
    program = build(MODEL)
    SCORE.run(program, Context(batches=(text(),)))
    assert all(p.grad is None for p in program.graph_module.parameters())
    with pytest.raises(CalibrationError, match="two tokens"):
        SCORE.run(program, Context(batches=(text(3, 1),)))
    with pytest.raises(ConfigError, match=r"\(4, 8\)"):
        replace(SCORE, widths=(4, 8)).run(program, Context(batches=(text(),)))


shares = st.integers(0, 100).map(lambda n: n / 100)


def exact_counts(features: int, share: float, by_share: Callable[..., torch.Tensor]) -> None:
    scores = torch.rand(features, 1, generator=torch.Generator().manual_seed(features)) + 0.1
    widths = by_share(scores, (8, 4), (share,))
    wide = int((widths == 8).sum())
    assert wide == int(features * Fraction(str(share)))
    assert int((widths == 4).sum()) == features - wide
    if 0 < wide < features:
        assert scores[widths == 8].min() >= scores[widths == 4].max()


@given(st.integers(1, 300), shares)
def test_its_own_count_is_exact(features: int, share: float) -> None:
    """Oracle 9."""
    exact_counts(features, share, widths_by_share)


@pytest.mark.parametrize(
    "bug",
    [
        lambda scores, widths, shares: widths_by_share(scores, widths, (min(1.0, shares[0] + 0.01),)),
        lambda scores, widths, shares: widths_by_share(-scores, widths, shares),
    ],
)
def test_the_count_oracle_bites(bug: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(AssertionError):
        exact_counts(100, 0.29, bug)


def test_shares_of_several_widths_go_from_wide_to_narrow() -> None:
    scores = torch.tensor([[1.0, 0.0], [5.0, 9.0], [4.0, 1.0], [0.0, 8.0], [0.0, 7.0]])
    assert widths_by_share(scores, (8, 6, 3), (0.2, 0.4)).tolist() == [3, 8, 3, 6, 6]
    for wrong in ((0.5,), (0.7, 0.7), (-0.1, 0.2)):
        with pytest.raises(ConfigError, match="shares"):
            widths_by_share(scores, (8, 6, 3), wrong)


@given(st.integers(-20, 20))
def test_scaled_salience_changes_no_plan(power: int) -> None:
    """Oracle 10 for the allocation; the salience itself is not homogeneous."""
    scores = torch.rand(50, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(widths_by_share(scores, (8, 4), (0.3,)), widths_by_share(scores * 2.0**power, (8, 4), (0.3,)))


def test_scaling_the_loss_can_change_the_order() -> None:
    """Oracle 10's exception: the quadratic term weighs less in a smaller loss."""
    dots = torch.tensor([0.6, -0.9])
    assert taylor_salience(dots).argmax() == 0
    assert taylor_salience(dots / 10).argmax() == 1


def test_losses_rise_as_widths_fall() -> None:
    assert losses_of(torch.tensor([[2.0, 1.0], [0.5, 3.0]])).tolist() == [[2.0, 2.0, 0.0], [3.0, 0.5, 0.0]]
    mixllm.check_widths((8, 4))


@pytest.fixture(scope="module")
def scored() -> Program:
    return manager.run(build(MODEL), (CollectStatistics(), ScoreFeatures()), context(MODEL), level=2)


def assigned(program: Program, one: AssignFeatures) -> Program:
    return manager.run(program, (one,), context(MODEL), level=2)


@pytest.mark.parametrize("budget", [4.7, 6.0, 7.5])
def test_the_budget_buys_salience_per_stored_bit(scored: Program, budget: float) -> None:
    found = assigned(scored, AssignFeatures(Budget(budget)))
    price = float(found.tensor("budget", "price"))
    bits = weights = 0
    for site in found.open_sites():
        widths, score = found.tensor(site.name, "widths"), found.tensor(site.name, "mixllm")[:, 0].double()
        assert set(widths.tolist()) <= {4, 8}
        extra = row_bits(site.rows, site.columns, 8, False) - row_bits(site.rows, site.columns, 4, False)
        assert bool((score[widths == 4] / extra <= price * (1 + 1e-9)).all())
        bits += int(found.tensor(site.name, "planned_bits"))
        weights += site.rows * site.columns
    assert 0.97 * budget * weights < bits <= budget * weights


@pytest.mark.parametrize("budget", [4.7, 6.0])
def test_the_papers_form(scored: Program, budget: float) -> None:
    """4 bits with a zero, 8 without, an fp16 scale for 128 columns: stored as planned, within the budget."""
    found = assigned(scored, AssignFeatures(Budget(budget), group=128, scale_kind=1))
    done = manager.run(found, (ReorderFeatures(), QuantizeWeights()), context(MODEL), level=2)
    bits = weights = 0
    for site in done.open_sites():
        assert (site.layout.group, site.layout.scales) == (128, Scales.FLOAT_GROUP)
        assert {segment.width for segment in site.layout.segments} <= {4, 8}
        assert [site.layout.zero_bits(segment) for segment in site.layout.segments] == [
            4 if segment.width == 4 else 0 for segment in site.layout.segments
        ]
        bits += int(done.tensor(site.name, "planned_bits"))
        weights += site.rows * site.columns
    assert 0.97 * budget * weights < bits <= budget * weights
    assert row_bits(4096, 4096, 4, False, "stored", 128, Scales.FLOAT_GROUP) == 4096 * (4 + (16 + 4) / 128)


def test_forms_that_do_not_exist_are_refused(scored: Program) -> None:
    with pytest.raises(FormatError, match="kind of scales 5 is none of"):
        assigned(scored, AssignFeatures(Budget(6.0), scale_kind=5))
    with pytest.raises(FormatError, match="group"):
        assigned(scored, AssignFeatures(Budget(6.0), group=48))


def test_the_papers_count_decides_and_the_budget_refuses(scored: Program) -> None:
    found = assigned(scored, AssignFeatures(Budget(8.0), shares=(0.1,)))
    widths = torch.cat([found.tensor(s.name, "widths") for s in found.open_sites()])
    assert int((widths == 8).sum()) == len(widths) // 10
    for budget in (Budget(4.6), Budget(4.2, count="payload")):
        with pytest.raises(BudgetError, match=r"shares \(0.9,\)"):
            assigned(scored, AssignFeatures(budget, shares=(0.9,)))


def test_widths_that_were_not_scored_are_refused(scored: Program) -> None:
    with pytest.raises(ConfigError, match="scored at 1 widths"):
        assigned(scored, AssignFeatures(Budget(6.0), widths=(8, 6, 4)))
    with pytest.raises(BudgetError, match="below the floor"):
        assigned(scored, AssignFeatures(Budget(4.0)))


def test_pinned_sites_keep_their_width(scored: Program) -> None:
    found = assigned(scored, AssignFeatures(Budget(6.0), (("layers.0.down", 3),)))
    assert set(found.tensor("layers.0.down", "widths").tolist()) == {3}


def test_a_model_end_to_end() -> None:
    """Tiny and random: values matter more than queries and keys (oracle 43 as far as a toy shows it)."""
    original = family("llama")
    draw = torch.Generator().manual_seed(0)
    ids, probe = torch.randint(3, 128, (8, 32), generator=draw), torch.randint(3, 128, (2, 21), generator=draw)
    model = mixcomp.compile(original, 5.5, calibration=[ids], strategy="mixllm", copy=True)
    plan = model.mixcomp.plan  # type: ignore[union-attr]
    assert plan.totals["stored_bits"] <= 5.5 * plan.totals["weights"]
    assert {width for site in plan.sites.values() for width in site["widths"]} == {"4", "8"}
    wide = {n: site["widths"].count("8") / len(site["widths"]) for n, site in plan.sites.items()}
    layers = ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert all(wide[f"{a}.v_proj"] > max(wide[f"{a}.q_proj"], wide[f"{a}.k_proj"]) for a in layers)
    with torch.no_grad():
        wanted, got = original(probe).logits, model(probe).logits
    assert float((got - wanted).norm() / wanted.norm()) < 0.2
