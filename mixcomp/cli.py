"""The command line: ``mixcomp compile | eval | inspect | demo``.

Every verb takes ``--json``: then one JSON object is all that goes to standard output.  Progress goes to standard error.
Heavy libraries are imported when a verb runs, so ``--help`` is immediate.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixcomp.errors import ConfigError, InputError, MixCompError

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


#: width of tables where standard output is no terminal
PIPED_COLUMNS = 160


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verb found out: ``data`` for programs, ``show`` for people."""

    data: dict[str, Any]
    show: Callable[[Console], None]


@app.command("compile")
def compile_verb(
    model: Model,
    budget: BudgetText,
    out: Annotated[Path, typer.Option(help="Folder to write; a compiled model there is replaced.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Text file to calibrate on; bundled books by default.")
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="joint, uniform (the baseline at the same bytes), mixllm, slim or amlq.")
    ] = "joint",
    effort: Annotated[str, typer.Option(help="fast: statistics and GPTQ.")] = "fast",
    include: Annotated[list[str] | None, typer.Option(help="Site name or re:PATTERN to add; repeat at will.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Site name or re:PATTERN to leave alone.")] = None,
    overrides: Annotated[list[str] | None, typer.Option(help="PATTERN=WIDTH; width 16 leaves alone.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    samples: Annotated[int | None, typer.Option(help="Calibration windows (48 on a CPU, 128 on a GPU).")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window (512 on a CPU, 2048 on a GPU).")] = None,
    min_coverage: Annotated[float, typer.Option(help="Least share of the decoder's weights to compile.")] = 0.9,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Compile MODEL to a budget and save it in a folder."""

    def work(progress: Progress) -> Answer:
        options: dict[str, Any] = {
            "budget": _number_or_text(budget),
            "strategy": strategy,
            "effort": effort,
            "include": tuple(include or ()),
            "exclude": tuple(exclude or ()),
            "overrides": dict(map(_override, overrides or ())),
            "seed": seed,
            "samples": samples,
            "length": length,
            "min_coverage": min_coverage,
        }
        _check_early(options, calibration)
        from mixcomp import api, artifact, report, sources

        artifact.check_replaceable(out)
        original = sources.load_original(model, sources.pick_device(device))
        tokenizer = sources.load_tokenizer(model)
        options |= {"calibration": calibration, "tokenizer": tokenizer, "progress": progress}
        compiled: Any = api.compile(original, **options)
        progress("save", 0, 1)
        artifact.save(compiled, out, tokenizer=tokenizer)
        progress("save", 1, 1)
        facts = report.describe(compiled)
        run = dict(compiled.mixcomp.report)

        def show(console: Console) -> None:
            facts.print(console, sites=False)
            console.print(f"saved       {out}", markup=False, highlight=False, soft_wrap=True)

        return Answer({"folder": str(out), "run": run} | facts.to_json(), show)

    _answer(work, json)


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
        return Answer(data, lambda console: _print_lines(console, scores.lines()))

    _answer(work, json)


@app.command("inspect")
def inspect_verb(folder: Folder, device: Device = "cpu", json: AsJson = False) -> None:
    """Every site of a compiled model: widths, sizes, paths, and what was left alone and why."""

    def work(_progress: Progress) -> Answer:
        from mixcomp import artifact, report

        facts = report.describe(artifact.load(folder, device=device))
        return Answer(facts.to_json(), facts.print)

    _answer(work, json)


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
        return Answer(result.to_json(), lambda console: _print_lines(console, result.lines()))

    _answer(work, json)


def main() -> None:
    """Entry point of the ``mixcomp`` script."""
    app()


def _answer(work: Callable[[Progress], Answer], json: bool) -> None:
    """Run a verb with progress on standard error and put its answer, or its error, where it belongs."""
    with _errors(json):
        with _quiet_output() as progress:
            answer = work(progress)
        if json:
            typer.echo(jsonlib.dumps(answer.data))
        else:
            from rich.console import Console

            answer.show(Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS))


@contextlib.contextmanager
def _quiet_output() -> Iterator[Progress]:
    """Progress bars; whatever a library prints meanwhile goes to standard error."""
    from mixcomp.progress import bars

    with contextlib.redirect_stdout(sys.stderr), bars() as progress:
        yield progress


@contextlib.contextmanager
def _errors(json: bool) -> Iterator[None]:
    """One line and a non-zero exit code for what MixComp refuses; bugs keep their traceback."""
    try:
        yield
    except MixCompError as error:
        _fail(type(error).__name__, str(error), json)
    except KeyboardInterrupt:
        _fail("Interrupted", "interrupted; nothing was saved", json, code=130)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            _fail("OutOfMemoryError", f"{_one_line(str(error))}; give fewer --samples, or --device cpu", json)
        if json:
            typer.echo(jsonlib.dumps({"error": {"type": type(error).__name__, "message": _one_line(str(error))}}))
        raise


def _fail(kind: str, message: str, json: bool, code: int = 1) -> None:
    if json:
        typer.echo(jsonlib.dumps({"error": {"type": kind, "message": message}}))
    typer.echo(f"mixcomp: {_one_line(message)}", err=True)
    raise typer.Exit(code)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _print_lines(console: Console, lines: Iterator[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


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


def _check_early(options: dict[str, Any], calibration: Path | None) -> None:
    """Refuse bad options before a model is loaded."""
    from mixcomp.config import CompileConfig

    CompileConfig.from_kwargs(**options)
    if calibration is not None and not calibration.is_file():
        raise InputError(f"calibration file {str(calibration)!r} does not exist; give a text file")


def _text(path: Path | None) -> str:
    from mixcomp import data

    if path is None:
        return data.read(data.EVALUATION)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text file {str(path)!r} cannot be read as UTF-8: {error}") from None
