"""scale-channels: the function stays, the objective is solved, and whoever reads the table sees scaled numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import families
import mixcomp
from mixcomp import manager
from mixcomp.calibration import Calibration
from mixcomp.capture import capture
from mixcomp.config import Budget
from mixcomp.passes import AssignPrecision, CollectStatistics, ReorderFeatures, ScaleChannels, TuneBlocks, scale
from mixcomp.passes.channels import Channels, scalable
from mixcomp.passes.directions import error_loss
from mixcomp.passes.distill import Teacher, tunables
from mixcomp.passes.scale import _folded, _Problem, _problems
from mixcomp.passes.strategies import passes_of, quantizing_of
from mixcomp.program import Program
from mixcomp.protocol import Context

CPU = torch.device("cpu")


def tokens(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (samples, 48), generator=torch.Generator().manual_seed(seed))


LEARN, HELD = Calibration((tokens(12),), "").split()
CONTEXT = Context(CPU, LEARN, held=HELD)


def uneven(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Weights and norms whose channels differ by much."""
    model = families.build(family)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_((0.8 * torch.randn(parameter.shape[-1], generator=draw)).exp())
    return model.to(dtype)


def scaled(family: str, dtype: torch.dtype = torch.float32) -> tuple[Program, Program]:
    plain = manager.run(capture(uneven(family, dtype)), (CollectStatistics(),), CONTEXT)
    return plain, manager.run(plain, (ScaleChannels(),), CONTEXT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
def test_the_function_stays(family: str, dtype: torch.dtype) -> None:
    """Part by part, in fp32: the graph with scaled weights and new norms predicts what the original does."""
    _, program = scaled(family, dtype)
    program = replace(program, graph_module=capture(uneven(family, dtype).float()).graph_module)
    teacher = Teacher.of(program)
    norms = {path: norm.float() for path, norm in program.norms().items()}
    weights = {s.name: program.scaled_weight(s, CPU) for s in program.open_sites()} | norms
    assert norms
    assert all(not torch.equal(weights[s.name], program.weight(s)) for s in program.open_sites() if "up" in s.name)
    values: list[dict[str, torch.Tensor]] = [{teacher.stages.tokens: tokens(2, 9)} for _ in range(2)]
    for part in teacher.stages.parts:
        for own, given in zip(values, (teacher.weights, weights), strict=True):
            own.update(part.run(own, given))
    wanted, got = (own[teacher.stages.logits].detach().double() for own in values)
    biased = family in ("phi", "gpt2") and dtype is torch.bfloat16  # a bias divided is rounded again
    torch.testing.assert_close(got, wanted, rtol=0, atol=float(wanted.abs().max()) * (5e-3 if biased else 2e-5))


def test_what_is_scaled_costs_the_same() -> None:
    """An error of the scaled weight costs under scaled statistics what its image costs under the plain ones."""
    plain, program = scaled("llama")
    for site in program.open_sites():
        s = program.find(site.input, "scale")
        rows = program.find(site.name, "row_scale")
        columns = torch.ones(site.columns) if s is None else s
        image = torch.randn(site.rows, site.columns, generator=torch.Generator().manual_seed(1))
        error = image * columns / (1.0 if rows is None else rows[:, None])
        got = error_loss(error, program.sigma(site.input, CPU), program.gamma(site, CPU))
        wanted = error_loss(image, plain.tensor(site.input, "sigma"), plain.tensor(site.name, "gamma"))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)


HOWS = {
    "free": ScaleChannels(),
    "given": ScaleChannels("given"),
    "int8": ScaleChannels(activations="int8"),
}


def with_widths(program: Program) -> Program:
    draw = torch.Generator().manual_seed(2)
    return program.with_tensors(
        {f"{s.name}/widths": torch.randint(2, 7, (s.rows,), generator=draw, dtype=torch.uint8) for s in program.sites}
    )


@torch.no_grad()
def test_tokens_count_in_the_unit_of_their_rows() -> None:
    """8-bit activations: both roundings of every row, written out."""
    plain = with_widths(scaled("llama")[0])
    channels = next(c for c in scalable(plain) if c.norm)
    how = HOWS["int8"]
    assert how.activations == "int8"
    (own,) = _problems(plain, channels, how, CPU)
    readers = [plain.site(name) for name in channels.readers]
    logs = torch.randn(1, channels.count, generator=torch.Generator().manual_seed(1)) / 2
    s = logs[0].exp()
    energy = plain.sigma(readers[0].input, CPU).diagonal()
    free = _Problem.together((replace(own, noise=None, power=None, energy=None),))
    wanted = 0.0
    for i, site in enumerate(readers):
        for r in range(site.rows):
            one = replace(free, size=free.size[:, :, sum(x.rows for x in readers[:i]) + r, None],
                          reach=free.reach[:, :, sum(x.rows for x in readers[:i]) + r, None])  # fmt: skip
            weights = one.loss(logs).exp() / (3 * (2.0**4 - 1) ** 2)
            step = 40 * (energy / s**2).mean() / 127**2
            wanted += float((weights + step / 12 * (plain.weight(site)[r] * s).square().sum()).log())
    assert float(_Problem.together((own,)).loss(logs)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["norm", "up", "v"])
def test_the_optimum_is_found(kind: str, how: str) -> None:
    """Against scipy on the same function, with rows that are yet to be given widths and at given ones."""
    plain = with_widths(scaled("llama")[0])
    channels = next(c for c in scalable(plain) if (c.site or "norm").endswith((kind, f"{kind}_proj")))
    problems = [_Problem.together((own,)) for own in _problems(plain, channels, HOWS[how], CPU)]
    start = torch.zeros(1, channels.count)

    def value(logs: np.ndarray) -> tuple[float, np.ndarray]:
        u = torch.from_numpy(logs).float().view(start.shape).requires_grad_()
        out = torch.stack([own.loss(u) for own in problems]).sum()
        (gradient,) = torch.autograd.grad(out, u)
        unit = 1e-3 * float(torch.stack([own.loss(start) for own in problems]).sum().abs())  # losses are tiny
        return float(out.detach()) / unit, gradient.double().flatten().numpy() / unit

    best = minimize(value, start.double().flatten().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 500}).fun
    found = value(ScaleChannels()._search(problems, channels.count).double().flatten().numpy())[0]
    first = value(start.double().flatten().numpy())[0]
    assert best < first
    assert found - best < 0.05 * (first - best)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers together, as on a GPU, and one by one."""
    plain, alone = scaled("llama")
    monkeypatch.setitem(scale.BATCH_BYTES, "cpu", 1 << 30)
    assert max(map(len, scale._batches(plain, CPU))) == 2
    together = manager.run(plain, (ScaleChannels(),), CONTEXT)
    assert alone.tensors.keys() == together.tensors.keys()
    for key, tensor in alone.tensors.items():
        torch.testing.assert_close(together.tensors[key], tensor, rtol=1e-4, atol=0)


def test_norms_are_rounded_first_and_zeros_stay() -> None:
    plain, _ = scaled("gemma2", torch.bfloat16)
    channels = next(c for c in scalable(plain) if c.norm)
    (vector,) = channels.norm
    own = plain.graph_module.get_parameter(vector.path)
    with torch.no_grad():
        own[3] = -1.0  # 1 + w = 0: this channel is off
    s = torch.linspace(0.1, 8, channels.count)
    found = _folded(plain, channels, s)
    new, columns = found[f"{vector.path}/norm"], found[f"{plain.site(channels.readers[0]).input}/scale"]
    assert new.dtype is torch.bfloat16
    before, after = own.detach().double() + 1, new.double() + 1
    torch.testing.assert_close(after * columns.double(), before, rtol=1e-7, atol=0)
    assert (columns[3], new[3]) == (1.0, -1.0)
    near = (columns / s - 1).abs()
    near[3] = 0
    assert float(near.max()) < 0.1


def test_groups_follow_the_order_of_columns() -> None:
    """After features were reordered, the groups of down are others, and so are its factors; the rest stays."""
    _, program = scaled("llama")
    done = manager.run(program, (*passes_of("joint", Budget(3.5))[0], AssignPrecision(Budget(3.5)),
                                 ReorderFeatures(min_segment_rows=1)),
                       CONTEXT)  # fmt: skip
    again = manager.run(done, (ScaleChannels(),), CONTEXT)
    changed = {c.readers[0] for c in scalable(program)
               if not torch.equal(again.tensor(done.site(c.readers[0]).input, "scale"),
                                  done.tensor(done.site(c.readers[0]).input, "scale"))}  # fmt: skip
    assert changed == {s.name for s in done.open_sites() if done.find(s.name, "column_order") is not None}
    assert any(name.endswith("down_proj") for name in changed)


def test_short_groups_read_no_channel_that_is_not_there() -> None:
    channels = Channels(18, ("reader",), block=18, repeats=1)
    plain, program = scaled("olmo2")  # hidden 72, inner 100
    assert all(torch.isfinite(t).all() and (t > 0).all() for k, t in program.tensors.items() if k.endswith("/scale"))
    found = next(c for c in scalable(plain) if (c.site or "").endswith("up_proj"))
    (groups,) = _problems(plain, found, ScaleChannels(), CPU)
    assert groups.column[-1, 4:].tolist() == [100] * 28
    assert groups.remains[-1, 4:].tolist() == [0.0] * 28
    assert channels.columns().tolist() == list(range(18))


def test_layers_are_learned_beside_new_norms() -> None:
    """Two bits and a sharp head leave much to learn."""
    model = uneven("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    measuring, deciding = passes_of("joint", Budget(2.7))
    program = manager.run(capture(model), (CollectStatistics(), *measuring, deciding, *quantizing_of("joint")), CONTEXT)
    teacher, held = Teacher.of(program), HELD[0]
    ends = teacher.ends(held)
    before = teacher.distance(program, held, ends)
    after = manager.run(program, (TuneBlocks(steps=40),), CONTEXT)
    assert teacher.distance(after, held, ends) < 0.95 * before
    tuned = tunables(program, CPU, rounding=False)
    for path in program.norms():
        del tuned[path]
    assert teacher.distance(tuned, held, ends) > 1.5 * before, "weights without their norms are another model's"


def test_the_model_that_comes_back_has_the_new_norms() -> None:
    model, text = uneven("llama"), [tokens(12)]
    original = model.model.layers[0].input_layernorm.weight
    plan = mixcomp.plan(mixcomp.measure(uneven("llama"), text), 3.5)
    mixcomp.compile(model, 3.5, calibration=text)
    new = model.model.layers[0].input_layernorm.weight
    assert new is not original
    assert not torch.equal(new, original)
    again = mixcomp.apply(uneven("llama"), plan)
    with torch.no_grad():
        logits = model(tokens(1)).logits
        assert torch.equal(again(tokens(1)).logits, logits)
        wanted = uneven("llama")(tokens(1)).logits
    assert float((logits - wanted).norm() / wanted.norm()) < 0.5
