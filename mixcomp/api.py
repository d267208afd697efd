"""The front door: validate, capture, run the passes, lower, swap the modules in."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixcomp import manager
from mixcomp.calibration import Calibration, more_text, resolve
from mixcomp.capture import capture
from mixcomp.clock import Clock
from mixcomp.config import CompileConfig, MeasureConfig
from mixcomp.errors import ConfigError, InputError, MismatchError
from mixcomp.fingerprint import Identity
from mixcomp.gate import RIVALS, Gate
from mixcomp.lowering.lower import LowerLinears, write_back
from mixcomp.measurement import Measurement
from mixcomp.passes import CollectStatistics, FollowPlan, TuneBlocks, TuneClipping, TuneModel
from mixcomp.passes.coupling import Couplings, analyse
from mixcomp.passes.decision import Decisions
from mixcomp.passes.distill import Texts
from mixcomp.passes.strategies import measuring_of, passes_of, quantizing_of
from mixcomp.planning import open_measurement, record
from mixcomp.plans import Compiled, Plan, parse_widths
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context, Pass, Progress
from mixcomp.workdir import Workdir

if TYPE_CHECKING:
    from mixcomp.config import Budget

#: tokens of backward passes, which on a CPU cost most of the time
GRADIENT_TOKENS = {"cpu": 8192, "cuda": 1 << 18}
DEFAULT_EFFORT = {"cpu": "fast", "cuda": "balanced"}
#: effort -> passes that learn two-level scales by gradients
TUNING: dict[str, tuple[Pass, ...]] = {
    "fast": (),
    "balanced": (TuneBlocks(),),
    "best": (TuneBlocks(), TuneModel()),
}
#: strategy -> what learns its float-group scales, at any effort but fast
CLIPPING: dict[str, tuple[Pass, ...]] = {name: (TuneClipping(),) for name in ("slim", "amlq")}


def compile(
    model: torch.nn.Module,
    budget: float | str | Budget,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    strategy: str = "joint",
    effort: str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, int] | None = None,
    activations: str = "native",
    seed: int = 0,
    samples: int | None = None,
    length: int | None = None,
    min_coverage: float = 0.9,
    copy: bool = False,
    workdir: str | Path | None = None,
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
        strategy: ``"joint"``, which has to pass a gate, see below; ``"uniform"``, the baseline at the same stored bits;
            ``"mixllm"``, ``"slim"`` and ``"amlq"`` decide as the papers of those names do.
        effort: ``"fast"``: statistics and GPTQ; ``"balanced"``, the default on a GPU, also learns rounding and scales
            layer by layer; ``"best"`` then learns all scales, side branches and norms together from the original's
            predictions; norms keep their dtype, and are new parameters of the model that comes back.  For ``slim`` and
            ``amlq`` both learn where ranges are clipped (SliM-LLM+).  Half of what both learn from is text that
            the model writes itself, and each stage is kept only if it helps on calibration windows that it did not see.
        include, exclude: site names or patterns (``"re:..."``) to add to the decoder's linears or leave out.
        overrides: pattern -> width in bits (16 leaves the site alone).
        activations: ``"native"``: as they come; ``"int8"``: rounded to 8 bits in products of more than 128 tokens, see
            ``lowering.int8``.  ``joint`` then scales channels for it, and ``mixllm`` stores weights as published; widths,
            the gate and what is learned do not depend on it.
        seed: of everything random.
        samples, length: calibration windows and their tokens; by default 48 x 512 on CPU, 128 x 2048 on a GPU.
        min_coverage: least share of the decoder's weights that must be compiled.
        copy: leave ``model`` alone and return a compiled copy.
        workdir: a folder that keeps the layers that were learned, so that the same call goes on there if it is cut off;
            they are deleted when it ends.
        progress: called with (stage, done, total).

    The gate: about a quarter of the calibration windows, eight at most, only judge.  On them the quantized plans of joint
    and of its rivals at the same budget (``"uniform"``; beyond ``effort="fast"`` all other strategies) are scored by
    KL(original || quantized) before anything is learned by gradients, and the best is what you get: its plan names the
    winner's strategy, ``model.mixcomp.report["strategy"]`` what was asked for, and ``report["gate"]`` is the table.

    Raises:
        MixCompError: bad options, budget out of range, a model that cannot be captured, unusable calibration text.
    """
    config = CompileConfig.from_kwargs(
        budget=budget, strategy=strategy, effort=effort, include=include, exclude=exclude, overrides=overrides,
        activations=activations, seed=seed, samples=samples, length=length, min_coverage=min_coverage,
    )  # fmt: skip
    run = _Run.start(model, config, config.alone, copy, progress, workdir)
    fixed = tuple(sorted(config.fixed(s.name for s in run.program.open_sites()).items()))
    measuring, deciding = passes_of(config.strategy, config.budget, fixed, run.gradient_tokens, config.activations)
    bounds = deciding.limits(run.program)
    bounds.require(config.budget.bits(bounds.weights), str(config.budget))  # before any calibration
    identity = run.identify()
    text = run.calibrate(config, calibration, tokenizer)
    plain = run.passes(run.program, (run.statistics,))
    measured = run.passes(plain, measuring)
    gate = Gate(run.passes(measured, (deciding, *quantizing_of(config.strategy, config.activations))), config.strategy)
    if config.strategy == "joint":
        names = RIVALS[run.effort(config)]
        rivals = {name: passes_of(name, config.budget, fixed, run.gradient_tokens) for name in names}
        with run.clock.stage("gate"):
            gate.run(plain, measured, rivals, run.context)
    won = replace(config, strategy=gate.strategy)
    plan = record(gate.kept.sites, run.couplings, Decisions.read(gate.kept), won, text.source, identity.fingerprint)
    source = {"source": text.source, "tokens": text.tokens}
    return run.finish(gate.kept, won, plan, source, strategy=config.strategy, gate=gate.rows)


def measure(
    model: torch.nn.Module,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    seed: int = 0,
    samples: int | None = None,
    length: int | None = None,
    min_coverage: float = 0.9,
    progress: Progress | None = None,
) -> Measurement:
    """Find out all that planning and quantizing a model takes; the expensive part of ``compile``, once for any budget.

    The model is left as it is.  Arguments as in ``compile``.  Keep the result with ``.save(folder)``.

    Raises:
        MixCompError: bad options, a model that cannot be captured, unusable calibration text.
    """
    options = MeasureConfig.from_kwargs(
        include=include, exclude=exclude, seed=seed, samples=samples, length=length, min_coverage=min_coverage
    )
    run = _Run.start(model, options, (), False, progress)
    identity = run.identify()
    text = run.calibrate(options, calibration, tokenizer)
    program = run.passes(run.program, (run.statistics, *measuring_of("joint", run.gradient_tokens)))
    return Measurement.of(program, run.couplings, identity, options, text.source)


def apply(
    model: torch.nn.Module,
    plan: Plan | str | Path,
    *,
    measurement: Measurement | str | Path | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    copy: bool = False,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> torch.nn.Module:
    """Give the model back compiled as ``plan`` says; in place, all or nothing, as ``compile`` does.

    Args:
        model: the model that was measured.
        plan: what ``plan`` returned, or its file.
        measurement: where the second moments are; by default the measurement the plan was made from, as long as the
            process lives.  Nothing is learned by gradients then, as a measurement holds no text.  Without one the model
            runs on calibration text again, with the plan's options, and ``model.mixcomp.report["calibration"]`` says so.
        calibration, tokenizer: for calibrating again, as in ``compile``.
        copy, workdir, progress: as in ``compile``.

    Raises:
        MismatchError: plan or measurement were made from another model; the first differences are named.
        BudgetError: an edited plan takes more bits than its budget.
        MixCompError: anything else that ``compile`` refuses.
    """
    plan = _plan(plan)
    config = CompileConfig.from_json(plan.options)
    given = measurement if measurement is not None else plan.measurement
    measured = None if given is None else open_measurement(given)
    if measured is not None and calibration is not None:
        raise ConfigError("calibration and a measurement are given, and the measurement holds its own; leave one out")
    run = _Run.start(model, config, config.alone, copy, progress, workdir)
    identity = run.identify()
    if measured is not None:
        identity.require(measured.identity)
    if plan.model != identity.fingerprint:
        raise MismatchError(
            f"the plan is for the model {plan.model[:12]!r}, this one is {identity.fingerprint[:12]!r}: "
            f"{_first_difference(plan, run.program)}; give the model it was made for, or plan this one"
        )
    followed: tuple[Pass, ...] = (FollowPlan(plan),)
    if measured is None:
        text = run.calibrate(config, calibration, tokenizer)
        source = {"source": f"again, for quantization: {text.source}", "tokens": text.tokens}
        followed = (run.statistics, *followed)
    else:
        with run.clock.stage("read moments"):
            run.program = replace(
                run.program.with_tensors(measured.statistics(run.program)),
                facts=run.program.facts | {Fact.STATISTICS},
            )
        source = {"source": f"measured: {measured.calibration}", "tokens": 0}
        run.context = Context(run.device, (), config.seed, run.clock.progress)
    program = run.passes(run.program, (*followed, *quantizing_of(config.strategy, config.activations)))
    return run.finish(program, config, plan, source)


def _plan(given: object) -> Plan:
    if isinstance(given, (str, Path)):
        return Plan.load(given)
    if not isinstance(given, Plan):
        raise InputError(f"plan is a {type(given).__name__}; give what mixcomp.plan returned, or its file")
    return given


def _first_difference(plan: Plan, program: Program) -> str:
    """The first linear whose shape the plan contradicts, as far as a plan knows shapes."""
    rows = {s.name: s.rows for s in program.sites}
    for name in sorted({*plan.sites, *plan.left_alone} ^ rows.keys()):
        return f"{name} is only in the {'model' if name in rows else 'plan'}"
    for name, site in sorted(plan.sites.items()):
        planned = sum(count for count, _ in parse_widths(site.get("widths", "")))
        if planned != rows[name]:
            return f"{name} has {rows[name]} rows, the plan {planned}"
    return "their weights differ"


@dataclass(slots=True)
class _Run:
    """What the three verbs have in common: a captured model on its way."""

    target: torch.nn.Module
    program: Program
    couplings: Couplings
    device: torch.device
    clock: Clock
    workdir: Workdir | None = None
    context: Context = field(default_factory=Context)

    @classmethod
    def start(
        cls,
        model: torch.nn.Module,
        config: MeasureConfig,
        alone: tuple[str, ...],
        copy: bool,
        progress: Progress | None,
        workdir: str | Path | None = None,
    ) -> _Run:
        """Capture ``model``, or a copy of it."""
        kept = None if workdir is None else Workdir.open(workdir)
        clock = Clock(progress)
        with clock.stage("capture"):
            target = _copy(model) if copy else model
            program = capture(
                target, include=config.include, exclude=config.exclude + alone, min_coverage=config.min_coverage
            )
        device = program.weight(program.open_sites()[0]).device
        return cls(target, program, analyse(program), device, clock, kept)

    def identify(self) -> Identity:
        """Which model it is."""
        with self.clock.stage("fingerprint"):
            return Identity.of(self.program)

    def calibrate(self, config: MeasureConfig, calibration: Any, tokenizer: Any) -> Calibration:
        """Tokens for the passes that follow."""
        with self.clock.stage("calibration"):
            text = resolve(
                calibration, tokenizer=tokenizer, model=self.target, samples=config.samples, length=config.length,
                seed=config.seed, device=self.device,
            )  # fmt: skip
        batches, held = text.split()
        self.context = Context(self.device, batches, config.seed, self.clock.progress, held, self.workdir)
        return text

    @property
    def gradient_tokens(self) -> int:
        """Tokens of a backward pass."""
        return GRADIENT_TOKENS[self.device.type]

    @property
    def statistics(self) -> Pass:
        """The pass that every strategy starts from."""
        return CollectStatistics(self.gradient_tokens)

    def passes(self, program: Program, steps: Iterable[Pass]) -> Program:
        """Run passes one by one, each a stage of its own."""
        for step in steps:
            with self.clock.stage(step.name):
                program = manager.run(program, (step,), self.context)
        return program

    def effort(self, config: CompileConfig) -> str:
        """The effort asked for, or the default of the device; without calibration tokens nothing can be learned."""
        if self.context.batches:
            return config.effort or DEFAULT_EFFORT[self.device.type]
        if config.effort not in (None, "fast"):
            raise ConfigError(
                f"the plan asks for effort {config.effort!r}, which learns from calibration text, and a measurement holds "
                "none; leave the measurement out, so that the model is calibrated again"
            )
        return "fast"

    def write(self) -> int:
        """Let the original write text of its own for the passes that learn by gradients; its number of tokens.

        What these passes learn fits the text they see better than any other: half of every step is of the model's own.
        Second moments are better off without it.
        """
        with self.clock.stage("writing"):
            text = more_text(self.target, Texts.of(self.context).learn, self.context)
        self.context = replace(self.context, written=(text,))
        return text.numel()

    def finish(
        self, program: Program, config: CompileConfig, plan: Plan, calibration: dict[str, Any], **found: Any
    ) -> torch.nn.Module:
        """Tune a quantized program, and swap the modules in."""
        tuning = TUNING[self.effort(config)] and CLIPPING.get(plan.options["strategy"], TUNING[self.effort(config)])
        written_tokens = self.write() if tuning else 0
        program = self.passes(program, (*tuning, LowerLinears(config.activations)))
        with self.clock.stage("write back"):
            write_back(program, self.target)
        if self.workdir:
            self.workdir.clear()
        held = self.context.held
        calibration |= {"held_windows": sum(map(len, held)), "held_tokens": sum(b.numel() for b in held)}
        calibration["written_tokens"] = written_tokens
        report = self.clock.report(self.device, calibration) | {"strategy": config.strategy, "gate": []} | found
        self.target.mixcomp = Compiled(replace(plan, measurement=None), report)  # type: ignore[assignment]
        return self.target


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    try:
        return copying.deepcopy(model)
    except Exception as error:
        raise InputError(f"copy=True, but the model cannot be copied: {error}; use copy=False") from error
