"""The plan: which width every row got, and why, as a plain readable file.

A plan holds decisions and nothing that differs between two runs of the same command: no times, no paths.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mixcomp.errors import FormatError, InputError, MismatchError
from mixcomp.files import read_whole, sha256, write_atomic
from mixcomp.records import read_json

if TYPE_CHECKING:
    import torch

PLAN_VERSION = 2
MAX_PLAN = 1 << 28  #: bytes
_RUNS = re.compile(r"[1-9][0-9]{0,9}x[0-9]+( [1-9][0-9]{0,9}x[0-9]+)*")
_KINDS = {
    "plan_version": (int,),
    "options": (dict,),
    "calibration": (str,),
    "totals": (dict,),
    "predicted_loss": (float, int),
    "price": (float, int),
    "gap": (float, int),
    "sites": (dict,),
    "left_alone": (dict,),
    "model": (str,),
}


class Measured(Protocol):
    """What a plan may ask of the measurement it was made from."""

    def curve(self, count: str = "stored") -> list[tuple[float, float]]:
        """(bits per weight, predicted loss) over all budgets."""


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """Decisions of one compilation.

    ``options`` is the configuration, ``calibration`` names the text, ``totals`` holds weights and bits, ``price`` is the
    loss (nats a token) that one more bit would save, ``gap`` bounds how far ``predicted_loss`` is above the best
    allocation of the same costs.  ``sites`` maps a name to ``{"widths": "4454...", one digit a row, "rank", "reorder"}``
    (where rows mix widths as ``widths_text`` says; ``"group"`` and ``"scales"`` where they are not the default),
    ``left_alone`` maps a name to the reason, ``model`` is the fingerprint of the model it is for.

    ``rank`` is what a side branch may have; one that does not lower the site's loss is not built, so a compiled model
    may store less than ``totals["stored_bits"]``, never more.  ``measurement`` is what the plan was made from, as long
    as the process lives; it is no part of the plan's file.
    """

    options: Mapping[str, Any]
    calibration: str
    totals: Mapping[str, int]
    predicted_loss: float
    price: float
    gap: float
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_alone: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    measurement: Measured | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        """Short, and the same for equal plans: it stands in the history of programs."""
        return f"<Plan of {len(self.sites)} sites, #{sha256(self.to_bytes())[:8]}>"

    def to_json(self) -> dict[str, Any]:
        return {
            "plan_version": PLAN_VERSION,
            "options": dict(self.options),
            "calibration": self.calibration,
            "totals": dict(self.totals),
            "predicted_loss": self.predicted_loss,
            "price": self.price,
            "gap": self.gap,
            "sites": {name: dict(site) for name, site in self.sites.items()},
            "left_alone": dict(self.left_alone),
            "model": self.model,
        }

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Read what ``to_json`` wrote; anything else is a ``FormatError``."""
        if not isinstance(data, dict) or set(data) != set(_KINDS):
            odd = (
                sorted(data.keys() ^ _KINDS.keys())
                if isinstance(data, dict)
                else f"{type(data).__name__} {data!r:.120}"
            )
            raise FormatError(
                f"a plan has the fields {sorted(_KINDS)}; missing or unknown in this one: {odd}; "
                "make it again with mixcomp.plan"
            )
        if data["plan_version"] != PLAN_VERSION:
            raise FormatError(
                f"plan version {data['plan_version']!r} is not {PLAN_VERSION}; read it with the release that wrote it"
            )
        for name, kinds in _KINDS.items():
            if type(data[name]) not in kinds:
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise FormatError(f"plan field {name!r} is {data[name]!r:.120}; it must be {wanted}: correct it")
        return cls(**{k: v for k, v in data.items() if k != "plan_version"})

    def to_bytes(self) -> bytes:
        """The plan's file: JSON for people, equal for equal plans."""
        return (json.dumps(self.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    def summary(self) -> dict[str, Any]:
        """Everything but the single rows."""
        found: Counter[str] = Counter()
        for site in self.sites.values():
            for count, digits in parse_widths(site["widths"]):
                found["+".join(sorted(set(digits)))] += count
        rows = dict(sorted(found.items()))
        ranks = sum(site["rank"] for site in self.sites.values())
        whole = {k: v for k, v in self.to_json().items() if k != "sites"}
        bits = {f"{kind}_bpw": self.totals[f"{kind}_bits"] / self.totals["weights"] for kind in ("payload", "stored")}
        return whole | {
            "sites": len(self.sites),
            "rows_by_width": rows,
            "rank": ranks,
            "totals": {**self.totals, **bits},
        }

    def lines(self) -> Iterator[str]:
        """The summary for people."""
        found = self.summary()
        yield f"payload     {found['totals']['payload_bpw']:.4f} bits per weight"
        yield f"stored      {found['totals']['stored_bpw']:.4f} bits per weight, {self.totals['stored_bits'] / 8e6:,.1f} MB"
        yield "rows        " + ", ".join(f"{width} bits: {rows:,}" for width, rows in found["rows_by_width"].items())
        if found["rank"]:
            yield f"branches    rank {found['rank']} in all, of {found['sites']} sites"
        yield f"loss        {self.predicted_loss:.4e} nats a token predicted, at most {self.gap:.1e} above the best"
        yield f"calibration {self.calibration}"

    def save(self, path: str | Path) -> None:
        """Write the plan's file; ``StorageError`` where the file system refuses."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan's file; ``ArtifactError`` or ``FormatError`` says what is wrong with it."""
        path = Path(path)
        return cls.from_json(read_json(read_whole(path.parent, path.name, MAX_PLAN), path.name))

    def curve(self) -> list[tuple[float, float]]:
        """(bits per weight, predicted loss) from the floor to the ceiling, of the measurement behind the plan."""
        if self.measurement is None:
            raise InputError(
                "plan.curve() needs the measurement the plan was made from, and this plan was read from a file; "
                "use Measurement.load(folder).curve(), or `mixcomp plan DIR --curve`"
            )
        return self.measurement.curve()


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ``model.mixcomp`` carries: the plan, and a report of the run that made it (times, memory; never stored)."""

    plan: Plan
    report: Mapping[str, Any] = field(default_factory=dict)


def widths_text(widths: torch.Tensor) -> str:
    """One digit a row, ``"4454"``; of uint8[rows, groups] runs of equal rows with a digit a group, ``"64x2244 8x4444"``."""
    if widths.dim() == 1:
        return (widths + ord("0")).numpy().tobytes().decode()
    equal = ((row, len(list(rows))) for row, rows in groupby(widths.tolist()))
    return " ".join(f"{count}x{''.join(map(str, row))}" for row, count in equal)


def parse_widths(text: str) -> list[tuple[int, str]]:
    """(rows, digits of each of them) of every run of equal rows that ``widths_text`` wrote; none of any other text."""
    if _RUNS.fullmatch(text):
        return [(int(rows), digits) for rows, digits in (run.split("x") for run in text.split(" "))]
    return [(len(list(rows)), digit) for digit, rows in groupby(text)] if text.isdecimal() else []


def overlap(one: Plan, other: Plan) -> float:
    """Jaccard overlap, 0..1, of the rows that two plans of one model favour.

    A plan favours the rows that are wider than its commonest width.  The overlap is the number of rows both favour over
    the number that either does: 1 for equal choices (none at all included), and p / (2 - p) to be expected from chance
    where each favours a share p.  Plans from several draws of calibration text show with it how far the choice is the
    model's and how far the text's.

    Raises:
        MismatchError: the plans do not speak of the same rows.
    """
    sizes = [
        {n: sum(rows * len(digits) for rows, digits in parse_widths(site["widths"])) for n, site in plan.sites.items()}
        for plan in (one, other)
    ]
    if sizes[0] != sizes[1]:
        odd = sorted(name for name, _ in sizes[0].items() ^ sizes[1].items())
        raise MismatchError(f"the plans differ in the sites or rows of {odd[:5]}; compare plans of one model and scope")
    first, second = (_favoured(plan, sorted(sizes[0])) for plan in (one, other))
    either = int((first | second).sum())
    return int((first & second).sum()) / either if either else 1.0


def _favoured(plan: Plan, names: list[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    text = "".join(digits * rows for name in names for rows, digits in parse_widths(plan.sites[name]["widths"]))
    digits = np.frombuffer(text.encode(), dtype=np.uint8)
    if not len(digits):
        return np.zeros(0, dtype=np.bool_)
    found: np.ndarray[Any, np.dtype[np.bool_]] = digits > np.bincount(digits).argmax()
    return found
