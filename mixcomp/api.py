"""The front door: validate, capture, run the passes, lower, swap the modules in."""

from __future__ import annotations

import copy as copying
import resource
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from mixcomp import manager
from mixcomp.calibration import Calibration, resolve
from mixcomp.capture import capture
from mixcomp.config import UNCOMPRESSED, CompileConfig
from mixcomp.errors import InputError
from mixcomp.lowering.lower import LowerLinears, write_back
from mixcomp.passes import CollectStatistics, InsertSideBranch, QuantizeWeights, ReorderFeatures
from mixcomp.passes.strategies import passes_of
from mixcomp.patterns import match
from mixcomp.plan import Compiled, record
from mixcomp.protocol import Context, Pass, Progress, silent

if TYPE_CHECKING:
    from mixcomp.config import Budget
    from mixcomp.program import Program

#: tokens of the backward pass: output weights settle early, and on a CPU they cost most of the time
GRADIENT_TOKENS = {"cpu": 8192, "cuda": 65536}


def compile(
    model: torch.nn.Module,
    budget: float | str | Budget,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    strategy: str = "joint",
    effort: str = "fast",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, int] | None = None,
    activations: str = "native",
    seed: int = 0,
    samples: int | None = None,
    length: int | None = None,
    min_coverage: float = 0.9,
    copy: bool = False,
    progress: Progress | None = None,
) -> torch.nn.Module:
    """Give the model back with its linears stored within ``budget`` bits per weight.

    The given model is changed in place and returned; modules are swapped at the very end, all or none, so a failure
    leaves it as it was.  ``model.mixcomp`` carries the plan and a report.

    Args:
        model: a transformers model with a language-modeling head, on the device where the work is to run.
        budget: hard ceiling on stored bits of the weights in scope: ``4.4``, ``"4.4bpw"``, ``"3.9GB"`` or a ``Budget``.
        calibration: strings, token tensors, batches, a text file, or None for the bundled text.
        tokenizer: for calibration text; without one, tokens are sampled from the model itself.
        strategy: ``"joint"``; ``"uniform"``, the baseline at the same stored bits; ``"mixllm"``, ``"slim"`` and ``"amlq"``
            decide as the papers of those names do.
        effort: ``"fast"``: statistics and GPTQ, no gradient tuning.
        include, exclude: site names or patterns (``"re:..."``) to add to the decoder's linears or leave out.
        overrides: pattern -> width in bits (16 leaves the site alone).
        activations: ``"native"``: the model's own dtype.
        seed: of everything random.
        samples, length: calibration windows and their tokens; by default 48 x 512 on CPU, 128 x 2048 on a GPU.
        min_coverage: least share of the decoder's weights that must be compiled.
        copy: leave ``model`` alone and return a compiled copy.
        progress: called with (stage, done, total).

    Raises:
        MixCompError: bad options, budget out of range, a model that cannot be captured, unusable calibration text.
    """
    config = CompileConfig.from_kwargs(
        budget=budget, strategy=strategy, effort=effort, include=include, exclude=exclude, overrides=overrides,
        activations=activations, seed=seed, samples=samples, length=length, min_coverage=min_coverage,
    )  # fmt: skip
    clock = _Clock(progress or silent)
    with clock.stage("capture"):
        target = _copy(model) if copy else model
        program = _captured(target, config)
    device = program.weight(program.open_sites()[0]).device
    passes = _passes(program, config, device)
    with clock.stage("calibration"):
        text = resolve(
            calibration, tokenizer=tokenizer, model=target, samples=config.samples, length=config.length,
            seed=config.seed, device=device,
        )  # fmt: skip
    context = Context(device, text.batches, config.seed, clock.progress)
    for step in passes:
        with clock.stage(step.name):
            program = manager.run(program, (step,), context)
    with clock.stage("write back"):
        plan = record(program, config.to_json(), text.source)
        write_back(program, target)
    target.mixcomp = Compiled(plan, _report(device, text, clock))  # type: ignore[assignment]
    return target


def _passes(program: Program, config: CompileConfig, device: torch.device) -> tuple[Pass, ...]:
    """The whole pipeline; a budget that its strategy cannot meet is refused here, before any calibration."""
    fixed = tuple(sorted(_fixed(program, config).items()))
    tokens = GRADIENT_TOKENS[device.type]
    measuring, deciding = passes_of(config.strategy, config.budget, fixed, tokens)
    bounds = deciding.limits(program)
    bounds.require(config.budget.bits(bounds.weights), str(config.budget))
    return (
        CollectStatistics(tokens),
        *measuring,
        deciding,
        ReorderFeatures(),
        QuantizeWeights(),
        InsertSideBranch(),
        LowerLinears(),
    )


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    try:
        return copying.deepcopy(model)
    except Exception as error:
        raise InputError(f"copy=True, but the model cannot be copied: {error}; use copy=False") from error


def _captured(model: torch.nn.Module, config: CompileConfig) -> Program:
    alone = tuple(pattern for pattern, width in config.overrides if width == UNCOMPRESSED)
    return capture(model, include=config.include, exclude=config.exclude + alone, min_coverage=config.min_coverage)


def _fixed(program: Program, config: CompileConfig) -> dict[str, int]:
    """Sites whose width the user set; later patterns win."""
    names = [s.name for s in program.open_sites()]
    fixed: dict[str, int] = {}
    for pattern, width in config.overrides:
        if width != UNCOMPRESSED:
            fixed.update(dict.fromkeys(match("overrides", pattern, names), width))
    return fixed


class _Clock:
    """Seconds and peak memory of every stage."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.stages = progress, list[dict[str, Any]]()
        self._name, self._start = "", 0.0

    def stage(self, name: str) -> _Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        self.progress(self._name, 0, 1)

    def __exit__(self, kind: object, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if kind is None:
            self.progress(self._name, 1, 1)
        seconds = round(time.perf_counter() - self._start, 3)
        self.stages.append({"stage": self._name, "seconds": seconds, **peak_memory()})


def peak_memory() -> dict[str, int]:
    """Highest memory so far in bytes: of the process on the host, and of the allocator on the GPU (per stage)."""
    out = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        out["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return out


def _report(device: torch.device, text: Calibration, clock: _Clock) -> dict[str, Any]:
    return {
        "stages": clock.stages,
        "seconds": round(sum(s["seconds"] for s in clock.stages), 3),
        "calibration": {"source": text.source, "tokens": text.tokens},
        "device": str(device),
    }
