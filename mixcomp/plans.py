"""The plan: which width every row got, and why, as a plain readable file.

A plan holds decisions and nothing that differs between two runs of the same command: no times, no paths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mixcomp.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mixcomp.program import Program, Site

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Decisions of one compilation.

    ``options`` is the configuration, ``calibration`` names the text, ``totals`` holds weights and bits, ``price`` is the
    loss (nats a token) that one more bit would save, ``gap`` bounds how far ``predicted_loss`` is above the best
    allocation of the same costs.  ``sites`` maps a name to ``{"widths": "4454...", one digit a row, "rank", "reorder"}``,
    ``left_alone`` maps a name to the reason.
    """

    options: Mapping[str, Any]
    calibration: str
    totals: Mapping[str, int]
    predicted_loss: float
    price: float
    gap: float
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_alone: Mapping[str, str] = field(default_factory=dict)

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
        }

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Read what ``to_json`` wrote; anything else is a ``FormatError``."""
        wanted = set(cls.__dataclass_fields__) | {"plan_version"}
        if not isinstance(data, dict) or set(data) != wanted:
            raise FormatError(
                f"a plan has the fields {sorted(wanted)}; this one is {type(data).__name__} {data!r:.120}"
            )
        if data["plan_version"] != PLAN_VERSION:
            raise FormatError(
                f"plan version {data['plan_version']!r} is not {PLAN_VERSION}; read it with the release that wrote it"
            )
        return cls(**{k: v for k, v in data.items() if k != "plan_version"})


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ``model.mixcomp`` carries: the plan, and a report of the run that made it (times, memory; never stored)."""

    plan: Plan
    report: Mapping[str, Any] = field(default_factory=dict)


def record(program: Program, options: Mapping[str, Any], calibration: str) -> Plan:
    """The plan that a finished program embodies."""
    compiled = [s for s in program.sites if s.format is not None]
    return Plan(
        options=options,
        calibration=calibration,
        totals=_totals(program),
        predicted_loss=float(program.tensor("budget", "loss")),
        price=float(program.tensor("budget", "price")),
        gap=float(program.tensor("budget", "gap")),
        sites={s.name: _decision(program, s) for s in compiled},
        left_alone={s.name: s.reason or "out of scope" for s in program.sites if s.format is None},
    )


def _decision(program: Program, site: Site) -> dict[str, Any]:
    widths = program.tensor(site.name, "widths").tolist()
    moved = program.find(site.name, "row_order") is not None
    reorder = "scatter" if site.layout.scatter else "absorbed" if moved else "none"
    return {"widths": "".join(map(str, widths)), "rank": site.layout.rank, "reorder": reorder}


def _totals(program: Program) -> dict[str, int]:
    out = {"weights": 0, "payload_bits": 0, "stored_bits": 0}
    for site in program.sites:
        if not site.in_scope:
            continue
        own = site.rows * site.columns * site.weight.dtype.itemsize * 8
        out["weights"] += site.rows * site.columns
        out["payload_bits"] += site.format.payload_bits() if site.format else own
        out["stored_bits"] += site.format.stored_bits() if site.format else own
    return out
