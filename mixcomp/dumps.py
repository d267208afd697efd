"""Showing programs between passes: printed to the log, and as numbered files.

``MIXCOMP_PRINT_IR``  ``all``, ``changed`` or the name of a pass: print the program after those passes.
``MIXCOMP_DUMP_DIR``  a folder for ``000_input.txt``, ``001_collect-statistics.txt`` ...; the number is the length
of the program's history, so one compilation in several steps fills one folder.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixcomp.errors import ConfigError, StorageError
from mixcomp.printer import render
from mixcomp.program import Program

DUMP_NAME = re.compile(r"(\d{3})_[a-z0-9-]+\.txt")

_log = logging.getLogger("mixcomp.ir")


@dataclass(frozen=True, slots=True)
class Dumps:
    """What to show, read once from the environment when a run starts."""

    show: str = ""
    folder: Path | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Dumps:
        folder = environment.get("MIXCOMP_DUMP_DIR")
        return cls(environment.get("MIXCOMP_PRINT_IR", ""), Path(folder) if folder else None)

    def start(self, program: Program) -> None:
        """Make the folder ours: no stranger's file in it, no dump of an earlier run from here on."""
        if self.folder is None:
            return
        number = len(program.history)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in _own_files(self.folder):
                if int(path.name[:3]) > number or number == 0:
                    path.unlink()
        except OSError as error:
            raise StorageError(f"MIXCOMP_DUMP_DIR={self.folder}: {error}; give one that can be written") from error
        if number == 0:
            _write(self.folder / "000_input.txt", program)

    def after(self, program: Program, name: str, changed: bool) -> None:
        """Show the program that a pass returned; its history ends with that pass."""
        if self.show in ("all", name) or (self.show == "changed" and changed):
            # warning: what somebody asked to see must not depend on how logging is set up
            _log.warning("after %s\n%s", name, render(program))
        if self.folder is not None:
            _write(self.folder / f"{len(program.history):03d}_{name}.txt", program)


def _write(path: Path, program: Program) -> None:
    try:
        path.write_text(render(program), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"MIXCOMP_DUMP_DIR: cannot write {path}: {error}; free some space or unset it") from error


def _own_files(folder: Path) -> list[Path]:
    found = sorted(folder.iterdir())
    for path in found:
        if not DUMP_NAME.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            raise ConfigError(f"MIXCOMP_DUMP_DIR={folder} holds {path.name!r}, which is no dump; give an empty folder")
    return found
