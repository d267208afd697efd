"""Progress for people: the stage at work, time left and peak memory, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bars:
    """A bar per stage on a terminal, a line per finished stage anywhere else.  Call it as a ``protocol.Progress``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("peak {task.fields[peak]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._open: dict[str, tuple[TaskID, float]] = {}
        self._finished: set[str] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Stage ``what`` has finished ``done`` of ``total`` steps; stages may be nested."""
        if done >= total and what in self._finished:
            return
        if what not in self._open:
            self._finished.discard(what)
            self._open[what] = self._bars.add_task(what, total=max(total, 1), peak=""), time.monotonic()
        task, since = self._open[what]
        self._bars.update(task, completed=done, total=max(total, 1), peak=peak_memory())
        if done >= total:
            del self._open[what]
            self._finished.add(what)
            if not self._console.is_terminal:
                line = f"{what}: {time.monotonic() - since:.1f} s, peak {peak_memory()}"
                self._console.print(line, highlight=False, soft_wrap=True)

    @contextmanager
    def shown(self) -> Iterator[Bars]:
        """The bars on screen while the block runs; stages that never said they were finished end with it."""
        with self._bars:
            yield self
            for what in tuple(self._open):
                self(what, 1, 1)


@contextmanager
def bars() -> Iterator[Bars]:
    """Progress bars on standard error."""
    with Bars(Console(stderr=True)).shown() as shown:
        yield shown


def peak_memory() -> str:
    """Most memory this process has held, main memory and (where a GPU is in use) the GPU's, as text."""
    parts = [f"{main_memory() / 2**30:.1f} GiB"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        parts.append(f"GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return ", ".join(parts)


def main_memory() -> int:
    """Peak resident bytes of this process; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
