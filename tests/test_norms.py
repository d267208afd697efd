"""Norms and side branches that tune-model learns: which they are, what is stored of them, and how they reach the model."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import families
import mixcomp
from mixcomp import api, manager
from mixcomp.calibration import Calibration
from mixcomp.capture import capture
from mixcomp.config import Budget
from mixcomp.errors import InputError, InvariantError
from mixcomp.lowering import lower
from mixcomp.lowering.lower import LowerLinears, write_back
from mixcomp.lowering.module import MixedLinear
from mixcomp.passes import CollectStatistics, InsertSideBranch, QuantizeWeights, ReorderFeatures, TuneModel
from mixcomp.passes.distill import Teacher, Texts, tunables
from mixcomp.passes.stages import split
from mixcomp.passes.strategies import passes_of
from mixcomp.passes.tunable import Norm
from mixcomp.passes.tune_model import _differentiate
from mixcomp.program import Program
from mixcomp.protocol import Context
from mixcomp.verify import check
from programs import PLAIN, build

CPU = torch.device("cpu")
TUNING = TuneModel(steps=25, ratio_rate=2e-3, branch_rate=0.2, norm_rate=5e-3)


def tokens(samples: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 128, (samples, 64), generator=torch.Generator().manual_seed(seed))


LEARN, HELD = Calibration((tokens(32, 0),), "").split()
CONTEXT = Context(CPU, LEARN, held=HELD)


def model_of(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Far from uniform logits, and norms that are neither ones nor zeros; two of a llama's are one parameter."""
    model = families.build(family, **options)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    if family == "llama":
        first, second = model.model.layers
        second.input_layernorm.weight = first.input_layernorm.weight
    return model.to(dtype)


def quantized(model: nn.Module) -> Program:
    """At 3 bits, and a side branch of rank 1 at every site on top."""
    measuring, deciding = passes_of("uniform", Budget(3.0))
    program = manager.run(capture(model), (CollectStatistics(), *measuring, deciding, ReorderFeatures()), CONTEXT)
    more = {f"{site.name}/planned_rank": torch.tensor(1) for site in program.open_sites()}
    program = program.with_tensors({**more, "budget/bits": program.tensors["budget/bits"] * 4})
    return manager.run(program, (QuantizeWeights(), InsertSideBranch()), CONTEXT)


@lru_cache(maxsize=4)
def tuned(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Program, Program]:
    """(model, quantized, and with everything learned)."""
    model = model_of(family, dtype)
    start = quantized(model)
    return model, start, manager.run(start, (TUNING,), CONTEXT, level=2)


def divergence(program: Program) -> float:
    """On windows that no pass has seen."""
    teacher, unseen = Teacher.of(program), tokens(8, 99)
    return teacher.distance(program, unseen, teacher.ends(unseen))


def norms_of(program: Program) -> set[str]:
    return {path for part in split(program).parts for path in part.norms}


@pytest.mark.parametrize("family", ["llama-bias", "gpt2", "bloom", "qwen3", "phi"])
def test_norms_are_the_vectors_that_no_linear_reads(family: str) -> None:
    model = families.build(family)
    inside = {path for path, _ in model.named_parameters() if any(w in path for w in ("norm", "ln_"))}
    assert norms_of(capture(model)) == inside


def test_a_model_without_norms_has_none() -> None:
    assert norms_of(build(PLAIN)) == set()
    assert build(PLAIN).norms() == {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_gradients_reach_everything_that_is_learned(family: str) -> None:
    """And nothing of the user's: bloom has a norm before its layers, all have one after them."""
    program = quantized(model_of(family))
    teacher, texts = Teacher.of(program), Texts.of(CONTEXT)
    made = tunables(program, CPU, rounding=False)
    made |= {path: Norm.of(own) for part in teacher.stages.parts for path, own in part.norms.items()}
    learned = {(name, key): t.requires_grad_() for name, one in made.items() for key, t in one.learned().items()}
    assert {key for _, key in learned} == {"ratio", "group", "branch_a", "branch_b", "branch_ratio", "norm"}
    ends = teacher.ends(texts.learn[:2])
    stacked = {name: torch.cat([one[name] for one in ends]) for name in ends[0]}
    with torch.enable_grad():
        _differentiate(teacher, made, texts.learn[:2], stacked)
    assert all(t.grad is not None and bool(t.grad.any()) for t in learned.values())
    assert all(parameter.grad is None for parameter in program.graph_module.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_and_branches_bring_the_model_closer_than_scales_alone(family: str) -> None:
    _, start, _ = tuned(family)
    options = {"scales": (0.0, 0.0), "branches": (0.2, 0.0), "norms": (0.0, 5e-3), "both": (0.2, 5e-3)}
    found = {}
    for name, (branch, norm) in options.items():
        one = TuneModel(steps=25, branch_rate=branch, norm_rate=norm)
        found[name] = divergence(manager.run(start, (one,), CONTEXT))
    assert found["scales"] < divergence(start)
    assert found["branches"] < found["scales"]
    assert found["norms"] < found["scales"]
    assert found["both"] < found["scales"]


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_what_is_stored_is_what_the_model_computes(family: str, dtype: torch.dtype) -> None:
    """The teacher's judgement of the program, against the user's model and its copy with modules and norms swapped in."""
    model, start, after = tuned(family, dtype)
    assert norms_of(start) == after.norms().keys()
    target = copy.deepcopy(model)
    write_back(manager.run(after, (LowerLinears(),), CONTEXT, level=2), target)
    for path, norm in after.norms().items():
        parameter = target.get_parameter(path)
        assert torch.equal(parameter, norm)
        assert (norm.dtype, norm.shape, parameter.requires_grad) == (dtype, model.get_parameter(path).shape, True)
        assert not torch.equal(norm, model.get_parameter(path))
    branches = {key: value for key, value in after.tensors.items() if "/branch_a" in key or "/branch_b" in key}
    assert branches
    assert all(value.dtype == torch.int8 and value.min() >= -127 for value in branches.values())
    assert any(not torch.equal(value, start.tensors[key]) for key, value in branches.items())
    unseen = tokens(4, 7)
    with torch.no_grad():
        wanted, got = (m(unseen).logits.float().log_softmax(-1) for m in (model, target))
    teacher = Teacher.of(after)
    found = teacher.distance(after, unseen, teacher.ends(unseen))
    expected = float((wanted.exp() * (wanted - got)).sum(-1).mean())
    assert found == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 0.1)
    stored = {site.name: site.layout.stored_bits() for site in start.sites if site.open}
    assert stored == {site.name: site.layout.stored_bits() for site in after.sites if site.open}


def test_the_judged_state_is_the_stored_one_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    _, start, after = tuned("llama")
    seen: list[Any] = []
    real = Teacher.distance

    def spy(self: Teacher, quantized: Any, *rest: Any) -> float:
        seen.append(quantized)
        return real(self, quantized, *rest)

    monkeypatch.setattr(Teacher, "distance", spy)
    manager.run(start, (TUNING,), CONTEXT)
    learned, judged = seen
    assert all(torch.equal(judged.tensors[key], value) for key, value in after.tensors.items())
    again = tunables(after, CPU, rounding=False)
    assert all(torch.equal(one.weight(), again[name].weight()) for name, one in learned.items())


def test_the_teacher_keeps_the_originals_norms() -> None:
    model, start, after = tuned("llama")
    unseen = tokens(3, 5)
    one, two = (Teacher.of(p).ends(unseen) for p in (start, after))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a)
    assert all(torch.equal(after.graph_module.get_parameter(p), model.get_parameter(p)) for p in after.norms())


def test_the_lowered_graph_computes_with_them() -> None:
    model, _, after = tuned("llama")
    target = copy.deepcopy(model)
    write_back(after, target)
    lowered = manager.run(after, (LowerLinears(),), CONTEXT, level=2)
    with torch.no_grad():
        torch.testing.assert_close(
            lowered.graph_module(tokens(2, 6)).logits, target(tokens(2, 6)).logits, rtol=1e-4, atol=1e-4
        )
    assert not torch.equal(after.graph_module(tokens(2, 6)).logits, lowered.graph_module(tokens(2, 6)).logits)


def test_norms_may_have_lain_in_one_storage() -> None:
    """As in models that were flattened: they are still different norms."""
    model = model_of("gpt2", n_layer=1)
    flat = torch.cat([p.detach() for p in model.parameters() if p.dim() == 1])
    start = 0
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.dim() == 1:
                setattr(module, name, nn.Parameter(flat[start : start + len(p)]))
                start += len(p)
    program = capture(model)
    moved = {f"{path}/norm": own + 1 for part in split(program).parts for path, own in part.norms.items()}
    lowered = manager.run(quantized(model).with_tensors(moved), (LowerLinears(),), CONTEXT)
    assert all(torch.equal(lowered.graph_module.get_parameter(k.removesuffix("/norm")), v) for k, v in moved.items())


def test_a_shared_norm_gets_one_value() -> None:
    model, _, after = tuned("llama")
    target = copy.deepcopy(model)
    write_back(after, target)
    first, second = target.model.layers
    assert first.input_layernorm.weight is second.input_layernorm.weight
    assert first.input_layernorm.weight is not first.post_attention_layernorm.weight
    assert sum("input_layernorm" in path for path in after.norms()) == 1


@pytest.mark.parametrize("zeros", [True, False])
def test_a_norm_moves_in_units_of_its_size_in_its_own_dtype(zeros: bool) -> None:
    start = torch.zeros(3) if zeros else torch.tensor([3.0, -4.0, 0.0])
    one = Norm.of(start.bfloat16())
    one.shift += 0.0101
    unit = 1.0 if zeros else (25 / 3) ** 0.5
    assert torch.equal(one.weight(), (start + 0.0101 * torch.tensor(unit)).bfloat16())
    assert torch.equal(one.stored()["norm"], one.weight())


# all or none


class Stubborn(nn.Module):
    """Refuses new parameters."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and name in self._parameters:
            raise RuntimeError("hands off")
        super().__setattr__(name, value)


def _stubborn(model: Any) -> None:
    """Its last norm is written after everything else."""
    norm = model.model.norm
    norm.__class__ = type("StubbornNorm", (Stubborn, type(norm)), {})


def _other_dtype(model: Any) -> None:
    model.model.norm.to(torch.float16)


def _none(model: Any) -> None:
    model.model.norm = nn.Identity()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_stubborn, RuntimeError, "hands off"),
        (_other_dtype, InputError, "norm 'model.norm.weight': the parameter is .*float16"),
        (_none, InputError, "norm 'model.norm.weight'.*was captured"),
    ],
)
def test_linears_and_norms_go_in_together_or_not_at_all(
    spoil: Callable[[Any], None], error: type[Exception], message: str
) -> None:
    model, _, after = tuned("llama")
    victim = copy.deepcopy(model)
    spoil(victim)
    modules = list(victim.named_modules(remove_duplicate=False))
    parameters = list(victim.named_parameters(remove_duplicate=False))
    values = {name: p.clone() for name, p in parameters}
    with pytest.raises(error, match=message):
        write_back(after, victim)
    for old, new in (
        (modules, list(victim.named_modules(remove_duplicate=False))),
        (parameters, list(victim.named_parameters(remove_duplicate=False))),
    ):
        assert [name for name, _ in old] == [name for name, _ in new]
        assert all(a is b for (_, a), (_, b) in zip(old, new, strict=True))
    assert all(torch.equal(p, values[name]) for name, p in parameters)


# the front door


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``compile`` with effort best, learning for a few steps."""
    monkeypatch.setitem(api.TUNING, "best", (TuneModel(steps=12, norm_rate=5e-3),))
    monkeypatch.setitem(api.RIVALS, "best", ())
    return partial(mixcomp.compile, budget=3.0, calibration=[tokens(16, 0)], effort="best")


def test_a_saved_model_holds_its_norms(quick: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    done = quick(model, copy=True)
    norms = {name: p for name, p in done.named_parameters() if p.dim() == 1}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(not torch.equal(p, before[name]) for name, p in norms.items())
    mixcomp.save(done, tmp_path / "out")
    loaded: Any = mixcomp.load(tmp_path / "out")
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in norms.items())
    first, second = loaded.model.layers
    assert first.input_layernorm.weight is second.input_layernorm.weight
    with torch.no_grad():
        assert torch.equal(loaded(tokens(2, 1)).logits, done(tokens(2, 1)).logits)


def test_a_failed_compile_leaves_norms_alone(quick: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    before, values = dict(model.named_parameters()), {n: p.clone() for n, p in model.named_parameters()}

    class Full(MixedLinear):
        made = 0

        def __init__(self, *given: Any) -> None:
            Full.made += 1
            if Full.made > 5:
                raise MemoryError("full")
            super().__init__(*given)

    monkeypatch.setattr(lower, "MixedLinear", Full)
    with pytest.raises(MemoryError):
        quick(model)
    assert all(p is before[n] and torch.equal(p, values[n]) and p.grad is None for n, p in model.named_parameters())


def test_benchmarks_judge_with_the_learned_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with the original's again in the next row."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    common = importlib.import_module("common")
    model, start, after = tuned("llama")
    judge = common.Judge(model, model, {})
    for program in (after, start):
        judge.score(program, common.dequantized(program, CPU))
        wanted = {path: model.get_parameter(path) for path in after.norms()} | program.norms()
        assert all(torch.equal(judge.student.get_parameter(path), norm) for path, norm in wanted.items())


# laws


def test_laws_of_norms_bite() -> None:
    _, _, after = tuned("llama")
    path, value = next(iter(after.norms().items()))
    check(after)
    for key, wrong in {f"{path}/norm": value.half(), "model.nowhere.weight/norm": value}.items():
        with pytest.raises(InvariantError, match=r"^I09"):
            check(after.with_tensors({key: wrong}))
    lowered = manager.run(after, (LowerLinears(),), CONTEXT)
    with pytest.raises(InvariantError, match=r"^I16: parameter .* is not the norm"):
        check(lowered.with_tensors({f"{path}/norm": value + 1}))
    early = after.clone()
    owner, _, name = path.rpartition(".")
    setattr(early.graph_module.get_submodule(owner), name, nn.Parameter(value))
    with pytest.raises(InvariantError, match=r"^I08"):
        check(early, before=after)
