"""The command line: ``mixcomp compile | measure | plan | apply | eval | inspect | demo``.

Every verb takes ``--json``: then one JSON object is all that goes to standard output.  Progress goes to standard error.
Heavy libraries are imported when a verb runs, so ``--help`` is immediate.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixcomp.errors import ConfigError, InputError
from mixcomp.terminal import Answer, answer, print_lines

if TYPE_CHECKING:
    from rich.console import Console

    from mixcomp.protocol import Progress

app = typer.Typer(
    name="mixcomp",
    help="Compile Hugging Face language models to a budget of stored bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a transformers model.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a compiled model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0; the GPU where there is one by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
BudgetText = Annotated[str, typer.Option(help="Ceiling: bits per weight (4.4), or bytes (300MB, 3.9GB).")]


Out = Annotated[Path, typer.Option(help="Folder to write; a compiled model there is replaced.")]
TextFile = Annotated[Path | None, typer.Option(help="Text file to calibrate on; bundled books by default.")]
Strategy = Annotated[str, typer.Option(help="joint, uniform (the baseline at the same bytes), mixllm, slim or amlq.")]
Include = Annotated[list[str] | None, typer.Option(help="Site name or re:PATTERN to add; repeat at will.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Site name or re:PATTERN to leave alone.")]
Overrides = Annotated[list[str] | None, typer.Option(help="PATTERN=WIDTH; width 16 leaves alone.")]
Activations = Annotated[str, typer.Option(help="native, or int8: prompts are multiplied in 8-bit integers.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Samples = Annotated[int | None, typer.Option(help="Calibration windows (48 on a CPU, 128 on a GPU).")]
Length = Annotated[int | None, typer.Option(help="Tokens of a window (512 on a CPU, 2048 on a GPU).")]
Work = Annotated[Path | None, typer.Option("--workdir", help="Keeps learned layers: the same command goes on there.")]
Coverage = Annotated[float, typer.Option(help="Least share of the decoder's weights to compile.")]


@app.command("compile")
def compile_verb(
    model: Model,
    budget: BudgetText,
    out: Out,
    calibration: TextFile = None,
    strategy: Strategy = "joint",
    effort: Annotated[
        str | None, typer.Option(help="fast (CPU), balanced (GPU): learn rounding too, or best: end to end.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    overrides: Overrides = None,
    activations: Activations = "native",
    seed: Seed = 0,
    samples: Samples = None,
    length: Length = None,
    min_coverage: Coverage = 0.9,
    workdir: Work = None,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Compile MODEL to a budget and save it in a folder."""

    def work(progress: Progress) -> Answer:
        from mixcomp.config import CompileConfig

        options: dict[str, Any] = {
            "budget": _number_or_text(budget),
            "strategy": strategy,
            "effort": effort,
            "include": tuple(include or ()),
            "exclude": tuple(exclude or ()),
            "overrides": dict(map(_override, overrides or ())),
            "activations": activations,
            "seed": seed,
            "samples": samples,
            "length": length,
            "min_coverage": min_coverage,
        }
        CompileConfig.from_kwargs(**options)  # refuses bad options before a model is loaded
        from mixcomp import api, artifact, sources

        _require_file(calibration)
        artifact.check_replaceable(out)
        original = sources.load_original(model, sources.pick_device(device))
        tokenizer = sources.load_tokenizer(model)
        options |= {"calibration": calibration, "tokenizer": tokenizer, "workdir": workdir, "progress": progress}
        return _saved(api.compile(original, **options), out, tokenizer, progress)

    answer(work, json)


@app.command("measure")
def measure_verb(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; a measurement there is replaced.")],
    calibration: TextFile = None,
    include: Include = None,
    exclude: Exclude = None,
    seed: Seed = 0,
    samples: Samples = None,
    length: Length = None,
    min_coverage: Coverage = 0.9,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Measure MODEL once, so that it can be planned for any budget, and save what was found in a folder."""

    def work(progress: Progress) -> Answer:
        from mixcomp.config import MeasureConfig

        options: dict[str, Any] = {
            "include": tuple(include or ()),
            "exclude": tuple(exclude or ()),
            "seed": seed,
            "samples": samples,
            "length": length,
            "min_coverage": min_coverage,
        }
        MeasureConfig.from_kwargs(**options)
        from mixcomp import api, measurement, sources

        _require_file(calibration)
        measurement.check_replaceable(out)
        original = sources.load_original(model, sources.pick_device(device))
        tokenizer = sources.load_tokenizer(model)
        found = api.measure(original, calibration, tokenizer=tokenizer, progress=progress, **options)
        progress("save", 0, 1)
        found.save(out)
        progress("save", 1, 1)
        return Answer({"folder": str(out)} | found.summary(), lambda c: print_lines(c, found.lines(str(out))))

    answer(work, json)


@app.command("plan")
def plan_verb(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a measurement.")],
    budget: Annotated[str | None, typer.Option(help="Ceiling: bits per weight (4.4), or bytes (300MB, 3.9GB).")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the plan to.")] = None,
    strategy: Annotated[str, typer.Option(help="joint, or uniform: the baseline at the same bytes.")] = "joint",
    overrides: Overrides = None,
    activations: Activations = "native",
    against: Annotated[Path | None, typer.Option(help="Another plan's file: adds the overlap of both.")] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Predicted loss over all budgets.")] = False,
    json: AsJson = False,
) -> None:
    """Plan a measured model for a budget: no model and no GPU is needed."""

    def work(_progress: Progress) -> Answer:
        if budget is None and not curve:
            raise ConfigError("plan has nothing to do: give --budget, or --curve for the loss over all budgets")
        if budget is None and (out or against):
            raise ConfigError("--out and --against speak of a plan, and without --budget there is none; give --budget")
        from mixcomp import planning, plans

        measured = planning.open_measurement(folder)
        data: dict[str, Any] = {}
        lines: list[str] = []
        if budget is not None:
            changed = dict(map(_override, overrides or ()))
            made = planning.plan(
                measured, _number_or_text(budget), strategy=strategy, overrides=changed, activations=activations
            )
            data, lines = made.summary(), list(made.lines())
            if against is not None:
                data["overlap"] = plans.overlap(made, plans.Plan.load(against))
                lines.append(f"overlap     {data['overlap']:.4f} of the favoured rows with {against}")
            if out is not None:
                made.save(out)
                data["plan"] = str(out)
                lines.append(f"saved       {out}")
        if curve:
            data["curve"] = [list(point) for point in measured.curve()]
            lines += [f"{bits:9.4f} bits per weight   predicted loss {loss:.4e}" for bits, loss in data["curve"]]
        return Answer(data, lambda console: print_lines(console, iter(lines)))

    answer(work, json)


@app.command("apply")
def apply_verb(
    model: Model,
    plan: Annotated[Path, typer.Option(help="File of the plan to follow.")],
    out: Out,
    measurement: Annotated[
        Path | None, typer.Option(help="Folder of the measurement; without it MODEL is calibrated again.")
    ] = None,
    calibration: TextFile = None,
    workdir: Work = None,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Compile MODEL as a plan says and save it in a folder."""

    def work(progress: Progress) -> Answer:
        from mixcomp import api, artifact, planning, plans, sources

        made = plans.Plan.load(plan)
        measured = None if measurement is None else planning.open_measurement(measurement)
        _require_file(calibration)
        artifact.check_replaceable(out)
        original = sources.load_original(model, sources.pick_device(device))
        tokenizer = sources.load_tokenizer(model)
        compiled = api.apply(
            original, made, measurement=measured, calibration=calibration, tokenizer=tokenizer, workdir=workdir,
            progress=progress,
        )  # fmt: skip
        return _saved(compiled, out, tokenizer, progress)

    answer(work, json)


@app.command("eval")
def eval_verb(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a compiled (or any) model.")],
    text: Annotated[Path | None, typer.Option(help="Text file to score; bundled books by default.")] = None,
    against: Annotated[str | None, typer.Option(help="Model it came from: adds KL and top-1 agreement.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window; 2048, or the model's positions.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score that many windows at most.")] = None,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Perplexity of a model on a text, and its distance from the model it came from."""

    def work(progress: Progress) -> Answer:
        from mixcomp import evaluate, sources

        place = sources.pick_device(device)
        words = _text(text)
        scored = sources.load_any(model, place)
        tokenizer = sources.load_tokenizer(model) or (sources.load_tokenizer(against) if against else None)
        if tokenizer is None:
            raise InputError(f"model {model!r} has no tokenizer beside it; put its tokenizer files into the folder")
        windows = evaluate.text_windows(tokenizer, words, window or evaluate.default_window(scored), limit)
        reference = sources.load_original(against, place) if against else None
        scores = evaluate.evaluate(scored, windows, reference, progress=progress)
        name = str(text) if text is not None else "bundled evaluation text"
        data = {"model": model, "text": name, "against": against} | scores.to_json()
        return Answer(data, lambda console: print_lines(console, scores.lines()))

    answer(work, json)


@app.command("inspect")
def inspect_verb(folder: Folder, device: Device = "cpu", json: AsJson = False) -> None:
    """Every site of a compiled model: widths, sizes, paths, and what was left alone and why."""

    def work(_progress: Progress) -> Answer:
        from mixcomp import artifact, report

        facts = report.describe(artifact.load(folder, device=device))
        return Answer(facts.to_json(), facts.print)

    answer(work, json)


@app.command("demo")
def demo_verb(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub name; SmolLM2 by default.")
    ] = None,
    budget: BudgetText = "4.4",
    out: Annotated[Path, typer.Option(help="Folder for the model and the report.")] = Path(".demo"),
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Compile a real language model, score it before and after, and let both write a sentence."""

    def work(progress: Progress) -> Answer:
        from mixcomp import demo, sources

        result = demo.run(model, _number_or_text(budget), out, sources.pick_device(device), progress)
        return Answer(result.to_json(), lambda console: print_lines(console, result.lines()))

    answer(work, json)


def main() -> None:
    """Entry point of the ``mixcomp`` script."""
    app()


def _number_or_text(budget: str) -> float | str:
    try:
        return float(budget)
    except ValueError:
        return budget


def _override(item: str) -> tuple[str, int]:
    pattern, _, width = item.rpartition("=")
    if not pattern or not width.isdecimal():
        raise ConfigError(f"override {item!r} is not PATTERN=WIDTH; write --overrides 're:.*down_proj=8'")
    return pattern, int(width)


def _require_file(calibration: Path | None) -> None:
    if calibration is not None and not calibration.is_file():
        raise InputError(f"calibration file {str(calibration)!r} does not exist; give a text file")


def _saved(compiled: Any, out: Path, tokenizer: Any, progress: Progress) -> Answer:
    """Save a compiled model and tell what it consists of."""
    from mixcomp import artifact, report

    progress("save", 0, 1)
    artifact.save(compiled, out, tokenizer=tokenizer)
    progress("save", 1, 1)
    facts = report.describe(compiled)
    run = dict(compiled.mixcomp.report)

    def show(console: Console) -> None:
        facts.print(console, sites=False)
        print_lines(console, chain(report.gate_lines(run), [f"saved       {out}"]))

    return Answer({"folder": str(out), "run": run} | facts.to_json(), show)


def _text(path: Path | None) -> str:
    from mixcomp import data

    if path is None:
        return data.read(data.EVALUATION)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text file {str(path)!r} cannot be read as UTF-8: {error}") from None
