"""The gradient passes lower the divergence from the original, repeat exactly, and never make things worse."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

import families
from mixcomp import manager
from mixcomp.calibration import Calibration
from mixcomp.capture import capture
from mixcomp.config import Budget
from mixcomp.errors import CalibrationError
from mixcomp.lowering.lower import LowerLinears
from mixcomp.passes import CollectStatistics, InsertSideBranch, QuantizeWeights, ReorderFeatures, distill
from mixcomp.passes.distill import Teacher, Texts, tunables
from mixcomp.passes.strategies import passes_of
from mixcomp.passes.tune_blocks import TuneBlocks
from mixcomp.passes.tune_clipping import TuneClipping
from mixcomp.passes.tune_model import TuneModel
from mixcomp.passes.watch import sampled_residual
from mixcomp.printer import Digests, digest
from mixcomp.program import Program
from mixcomp.protocol import Context, Pass

CPU = torch.device("cpu")


def tokens(samples: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 128, (samples, 64), generator=torch.Generator().manual_seed(seed))


LEARN, HELD = Calibration((tokens(96, 0),), "").split()
CONTEXT = Context(CPU, LEARN, held=HELD)


@lru_cache(maxsize=4)
def quantized(family: str, strategy: str = "joint", budget: float = 3.0) -> Program:
    """A model whose logits are far from uniform, up to its side branches."""
    model = families.build(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return manager.run(capture(model), passes(strategy, budget), CONTEXT)


def passes(strategy: str = "joint", budget: float = 3.0) -> tuple[Pass, ...]:
    """Everything up to side branches."""
    measuring, deciding = passes_of(strategy, Budget(budget))
    return (CollectStatistics(), *measuring, deciding, ReorderFeatures(), QuantizeWeights(), InsertSideBranch())


def divergence(program: Program) -> float:
    """On windows that no pass has seen."""
    teacher, unseen = Teacher.of(program), tokens(8, 99)
    return teacher.distance(tunables(program, CPU, rounding=False), unseen, teacher.ends(unseen))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_passes_bring_the_model_closer(family: str) -> None:
    start = quantized(family, budget=2.6)  # much to learn: what few kept-back windows say varies by 4 %
    blocks = manager.run(start, (TuneBlocks(steps=150),), CONTEXT, level=2)
    model = manager.run(blocks, (TuneModel(steps=30),), CONTEXT, level=2)
    found = [divergence(p) for p in (start, blocks, model)]
    assert found[1] < 0.97 * found[0]
    assert found[2] < found[1]
    assert [s.format for s in model.sites] == [s.format for s in start.sites]


@torch.no_grad()
def first_layer_error(program: Program) -> float:
    """Weighted as it is learned, by gamma of the layer's last linear; its inputs are the original's."""
    teacher, texts = Teacher.of(program), Texts.of(CONTEXT)
    part, stages = teacher.stages.parts[1], teacher.stages
    values = {stages.tokens: texts.learn, **stages.parts[0].run({stages.tokens: texts.learn}, {})}
    stored = {name: one.weight() for name, one in tunables(program, CPU, part, rounding=False).items()}
    wanted, got = (part.run(values, weights)[stages.live(2)[0]] for weights in (teacher.weights, stored))
    return float(((got - wanted).square() * program.tensor(part.sites[-1], "gamma")).mean())


@pytest.mark.parametrize(("strategy", "budget"), [("slim", 3.4), ("amlq", 3.4)])
def test_tuned_clipping_brings_layers_and_model_closer(strategy: str, budget: float) -> None:
    start = quantized("llama", strategy, budget)
    after = manager.run(start, (TuneClipping(steps=40),), CONTEXT, level=2)
    assert first_layer_error(after) < 0.97 * first_layer_error(start)
    assert divergence(after) < 0.97 * divergence(start)
    assert [s.format for s in after.sites] == [s.format for s in start.sites]


def test_default_scales_have_no_range_to_clip() -> None:
    start = quantized("llama")
    after = manager.run(start, (TuneClipping(steps=2),), CONTEXT)
    assert all(torch.equal(after.tensors[key], value) for key, value in start.tensors.items())


@pytest.mark.parametrize(
    ("tuning", "strategy"), [(TuneModel(steps=12), "joint"), (TuneClipping(steps=12, anew=True), "slim")]
)
def test_a_run_repeats_to_the_bit(tuning: Pass, strategy: str) -> None:
    start = quantized("llama", strategy, 3.4)
    one, two = (digest(manager.run(start, (tuning,), CONTEXT), Digests.WHOLE) for _ in range(2))
    assert one == two


@pytest.mark.parametrize(
    ("wild", "strategy"),
    [
        (TuneBlocks(steps=4, place_rate=3.0, group_rate=9.0), "joint"),
        (TuneModel(steps=4, ratio_rate=2.0), "joint"),
        (TuneClipping(steps=4, rate=9.0), "slim"),
    ],
)
def test_what_does_not_help_is_not_kept(wild: Pass, strategy: str) -> None:
    start = quantized("llama", strategy, 3.4)
    after = manager.run(start, (wild,), CONTEXT)
    assert all(torch.equal(after.tensors[key], value) for key, value in start.tensors.items())


def test_windows_kept_back_are_not_learned_from() -> None:
    texts = Texts.of(CONTEXT)
    assert (len(texts.learn), len(texts.held)) == (88, 8)
    rows = {tuple(row) for row in texts.learn.tolist()}
    assert not any(tuple(row) in rows for row in texts.held.tolist())
    learn, held = Calibration((tokens(6, 0), tokens(3, 1)[:, :9]), "").split()
    mixed = Texts.of(Context(CPU, learn, held=held))
    assert mixed.learn.shape[1] == mixed.held.shape[1] == 64


@pytest.mark.parametrize(("given", "own"), [(5, 0), (2, 9), (3, 7), (6, 1)])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_given_text_and_the_models_own_take_turns(
    given: int, own: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, steps = Texts(tokens(given + own, 0), tokens(1, 1), given), 40
    monkeypatch.setattr(distill, "STEP_TOKENS", batch * texts.learn.shape[1])
    picks = texts.picks(steps, torch.Generator().manual_seed(0))
    assert {len(pick) for pick in picks} == {min(batch, given + own)}
    assert len(picks) == steps
    found = torch.cat(picks)
    kinds = [found[found < given], found[found >= given] - given]
    if own:
        assert abs(len(kinds[0]) - len(kinds[1])) <= 1
        assert torch.equal(found < given, torch.arange(len(found)) % 2 == 0)
    for kind, count in zip(kinds, (given, own), strict=True):
        rounds = [sorted(part.tolist()) for part in kind.split(max(1, count)) if len(part) == count]
        assert all(part == list(range(count)) for part in rounds), "every one before any again"
        assert count < 5 or len(rounds) < 2 or kind[:count].tolist() != kind[count : 2 * count].tolist(), (
            "another order"
        )


def test_one_window_is_too_little() -> None:
    with pytest.raises(CalibrationError, match=r"1 calibration window.*at least 2.*effort"):
        Texts.of(Context(CPU, (tokens(1, 0),), 0))


def test_forms_of_the_papers_stay_as_they_are() -> None:
    program = quantized("llama", "slim", 4.4)
    assert any(site.layout.departure for site in program.open_sites())
    after = manager.run(program, (TuneBlocks(steps=2), TuneModel(steps=2)), CONTEXT)
    assert all(torch.equal(after.tensors[key], value) for key, value in program.tensors.items())
    settled = tunables(program, CPU, rounding=False)
    ids = tokens(2, 5)
    logits = manager.run(program, (LowerLinears(),), CONTEXT).graph_module(ids).logits
    stages = Teacher.of(program).stages
    weights = {name: one.weight() for name, one in settled.items()}
    found = [stages.parts[-1].run(v, weights)[stages.logits] for v in stages.forward(lambda _: weights, ids)]
    torch.testing.assert_close(torch.cat(found), logits, rtol=1e-4, atol=1e-5)


def test_strengths_are_norms_of_gradients_of_hidden_states() -> None:
    """Against one backward pass through the whole graph, node by node, with the same labels."""
    program = capture(families.build("llama", num_hidden_layers=2))
    context = Context(CPU, (tokens(6, 4),), 0, held=(tokens(2, 5),))
    teacher, texts = Teacher.of(program), Texts.of(context)
    found = teacher.strengths(texts, context.generator("x"))
    names = {name for k in teacher.stages.layers for name in teacher.stages.parts[k].outputs}
    assert found
    assert found.keys() <= names
    values: dict[str, torch.Tensor] = {}

    class Reader(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            y = super().run_node(n)
            if n.name in found:
                y.retain_grad()
                values[n.name] = y
            return y

    logits = Reader(program.graph_module).run(texts.learn).logits
    logits.backward(sampled_residual(logits.detach(), context.generator("x")))
    for name, relative in found.items():
        grad = values[name].grad
        assert grad is not None
        norms = grad.float().norm(dim=-1)
        torch.testing.assert_close(relative, norms / norms.mean(), rtol=1e-3, atol=1e-5)
