"""What a pass is, and what it may use while it runs.

A pass is a frozen dataclass: its options are its fields, its contract is data.  It takes a ``Program`` (a clone it may
rewrite), returns a ``Program``, keeps no state, prints nothing, and draws randomness only from ``Context.generator``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import ClassVar, Protocol, TypeVar

import torch

from mixcomp.program import Fact, Program

Item = TypeVar("Item")


class Semantics(Enum):
    """What a pass may do to the function the program computes."""

    EXACT = "exact"  #: same outputs (up to the order of floating-point sums)
    LOSSY = "lossy"  #: outputs change as the stored weights say, and in no other way


#: called with (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]


def silent(_what: str, _done: int, _total: int) -> None:
    """The progress callback that shows nothing."""


class Memory(Protocol):
    """Where a pass keeps what it has finished, for the case that it is cut off."""

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """What was kept under ``name``, or None."""

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep ``tensors`` under ``name``, which says all that they depend on."""


@dataclass(frozen=True, slots=True)
class Context:
    """Everything a pass may know besides the program.

    ``batches`` are calibration tokens, int64[samples, length] each; ``device`` is where heavy work runs.  ``held`` are
    windows kept back from ``batches``: nothing is measured on them and nothing learned, they only judge.  ``memory``
    holds finished parts of long passes, where the user wants that.  ``written`` is text of the model's own, for passes that
    learn by gradients.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batches: tuple[torch.Tensor, ...] = ()
    seed: int = 0
    progress: Progress = silent
    held: tuple[torch.Tensor, ...] = ()
    memory: Memory | None = None
    written: tuple[torch.Tensor, ...] = ()

    def track(self, what: str, items: Sequence[Item]) -> Iterator[Item]:
        """Yield ``items``, reporting before each one how many are done, and at last that all are."""
        for done, item in enumerate(items):
            self.progress(what, done, len(items))
            yield item
        self.progress(what, len(items), len(items))

    def generator(self, pass_name: str, site: str = "") -> torch.Generator:
        """Own random stream of (seed, pass, site): the order of sites never matters."""
        digest = hashlib.sha256(f"{self.seed}/{pass_name}/{site}".encode()).digest()
        return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass; subclasses are frozen dataclasses too."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]] = frozenset()
    ensures: ClassVar[frozenset[Fact]] = frozenset()
    clobbers: ClassVar[frozenset[Fact]] = frozenset()
    semantics: ClassVar[Semantics] = Semantics.EXACT

    @abstractmethod
    def run(self, program: Program, context: Context) -> Program:
        """The whole of the pass.  Raise a ``MixCompError`` naming the site on any failure."""

    def spec(self) -> str:
        """Text such as ``assign-precision{budget=4.4}``: the pass's name and every option."""
        options = ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"{self.name}{{{options}}}" if options else self.name
