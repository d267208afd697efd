"""How the command line answers: one JSON object or readable lines, progress aside, and errors in one line."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from mixcomp.errors import MixCompError

if TYPE_CHECKING:
    from rich.console import Console

    from mixcomp.protocol import Progress

#: width of tables where standard output is no terminal
PIPED_COLUMNS = 160


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verb found out: ``data`` for programs, ``show`` for people."""

    data: dict[str, Any]
    show: Callable[[Console], None]


def answer(work: Callable[[Progress], Answer], json: bool) -> None:
    """Run a verb with progress on standard error and put its answer, or its error, where it belongs."""
    with _errors(json):
        with _quiet_output() as progress:
            found = work(progress)
        if json:
            typer.echo(jsonlib.dumps(found.data))
        else:
            from rich.console import Console

            found.show(Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS))


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


def print_lines(console: Console, lines: Iterator[str]) -> None:
    """Lines as they are: no markup, no wrapping."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
