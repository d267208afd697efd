"""Budgets and the options of a compilation: what may be asked for, checked before any work is done."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fractions import Fraction
from numbers import Real
from typing import Any, Self

from mixcomp.errors import BudgetError, ConfigError
from mixcomp.format import WIDTHS
from mixcomp.patterns import match

#: bits of a weight that is left as it came; the width to give in ``overrides`` to leave a site alone
UNCOMPRESSED = 16
STRATEGIES = ("joint", "uniform", "mixllm", "slim", "amlq")
EFFORTS = ("fast", "balanced", "best")
#: what a compiled linear multiplies with: the numbers it is given, or where there are many of them 8-bit integers
ACTIVATIONS = ("native", "int8")

_UNITS = {"bpw": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_AMOUNT = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]+)\s*")
_FORMS = 'bits per weight as a number (4.4) or text ("4.4bpw"), decimal bytes as text ("300MB", "3.9GB"), or a Budget'


@dataclass(frozen=True, slots=True)
class Budget:
    """A hard ceiling on the weights in scope.

    ``value`` is in bits per weight (``unit="bpw"``, at most 16: the uncompressed weight) or in bytes (``"bytes"``).
    ``count="stored"`` counts everything that is kept for a weight; ``"payload"`` counts codes only, as papers do.
    """

    value: float
    unit: str = "bpw"
    count: str = "stored"

    def __post_init__(self) -> None:
        one_of("budget unit", self.unit, ("bpw", "bytes"))
        one_of("budget count", self.count, ("stored", "payload"))
        object.__setattr__(self, "value", _number("budget", self.value, f"give {_FORMS}"))
        if not (math.isfinite(self.value) and self.value > 0):
            raise BudgetError(f"budget {self.value!r} is not a positive finite number; give {_FORMS}")
        if self.unit == "bpw" and self.value > UNCOMPRESSED:
            raise BudgetError(
                f"budget {self.value!r} is above {UNCOMPRESSED} bits per weight, the uncompressed weight; "
                f'give bits per weight in (0, {UNCOMPRESSED}], or bytes as "3.9GB"'
            )

    @classmethod
    def parse(cls, given: object) -> Budget:
        """A budget from a number, ``"4.4bpw"``, ``"300MB"``, ``"3.9GB"`` or a ``Budget``; ``ConfigError`` otherwise."""
        if isinstance(given, Budget):
            return given
        if not isinstance(given, str):
            return cls(_number("budget", given, f"give {_FORMS}"))
        match = _AMOUNT.fullmatch(given)
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(f"budget {given!r} is not an amount with a unit; give {_FORMS}")
        unit = match[2].lower()
        if unit == "bpw":
            return cls(float(match[1]))
        return cls(float(Fraction(match[1]) * _UNITS[unit]), "bytes")

    def bits(self, weights: int) -> int:
        """Most bits that ``weights`` weights may take.  ``value`` is read as the decimal number it prints as."""
        exact = Fraction(str(self.value))
        return math.floor(exact * (weights if self.unit == "bpw" else 8))

    def __str__(self) -> str:
        unit = "bits per weight" if self.unit == "bpw" else "bytes"
        return f"{self.value:.12g} {unit} ({self.count})"

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "unit": self.unit, "count": self.count}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """The options that shape a measurement, checked.

    ``include`` and ``exclude`` are patterns of site names: ``"re:..."`` is a regular expression, anything else a name.
    ``samples`` x ``length`` shapes calibration text into windows (None: by device).  ``min_coverage`` is the least share
    of the decoder's weights that must be compiled.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    samples: int | None = None
    length: int | None = None
    min_coverage: float = 0.9

    def __post_init__(self) -> None:
        checked = {
            "include": patterns("include", self.include),
            "exclude": patterns("exclude", self.exclude),
            "min_coverage": _number("min_coverage", self.min_coverage, "give a share in 0..1"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        integer("seed", self.seed, 0, 2**63 - 1)
        if self.samples is not None:
            integer("samples", self.samples, 1, 2**31 - 1)
        if self.length is not None:
            integer("length", self.length, 2, 2**31 - 1)
        if not 0 <= self.min_coverage <= 1:
            raise ConfigError(f"min_coverage {self.min_coverage!r} is not a share; give a number in 0..1")

    @classmethod
    def from_kwargs(cls, **given: Any) -> Self:
        """A config from keyword arguments; an unknown one is a ``ConfigError`` with the nearest name."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}{nearest(name, known)}; options are {', '.join(known)}")
        if "budget" in known and "budget" not in given:
            raise ConfigError(f"budget is missing; give {_FORMS}")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        return out | {"include": list(self.include), "exclude": list(self.exclude)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig(MeasureConfig):
    """Every option of ``compile`` that is a plain value, checked.

    ``overrides`` are (pattern, width) pairs, later ones win; width 16 leaves a site alone.  ``activations`` is one of
    ``ACTIVATIONS``.
    """

    budget: Budget
    strategy: str = "joint"
    effort: str | None = None
    overrides: tuple[tuple[str, int], ...] = ()
    activations: str = "native"

    def __post_init__(self) -> None:
        MeasureConfig.__post_init__(self)  # with slots the class is made twice, and super() would miss it
        object.__setattr__(self, "budget", Budget.parse(self.budget))
        object.__setattr__(self, "overrides", _overrides(self.overrides))
        one_of("strategy", self.strategy, STRATEGIES)
        if self.effort is not None:
            one_of("effort", self.effort, EFFORTS)
        one_of("activations", self.activations, ACTIVATIONS)

    def to_json(self) -> dict[str, Any]:
        shared = MeasureConfig.to_json(self)
        return shared | {"budget": self.budget.to_json(), "overrides": [list(pair) for pair in self.overrides]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CompileConfig:
        """Read what ``to_json`` wrote; anything else is a ``ConfigError``."""
        budget = data.get("budget")
        known = {f.name for f in fields(Budget)}
        if not isinstance(budget, Mapping) or set(budget) != known:
            raise ConfigError(f"budget {budget!r:.200} of a plan must be an object with the fields {sorted(known)}")
        return cls.from_kwargs(**{**data, "budget": Budget(**budget)})

    @property
    def alone(self) -> tuple[str, ...]:
        """Patterns of sites that overrides leave alone."""
        return tuple(pattern for pattern, width in self.overrides if width == UNCOMPRESSED)

    def fixed(self, names: Iterable[str]) -> dict[str, int]:
        """Those of ``names`` whose width the user set; later patterns win."""
        names = list(names)
        found: dict[str, int] = {}
        for pattern, width in self.overrides:
            if width != UNCOMPRESSED:
                found.update(dict.fromkeys(match("overrides", pattern, names), width))
        return found


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'budget'?`` where a known name is close, else nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``allowed``."""
    if isinstance(value, str) and value in allowed:
        return
    hint = nearest(value, allowed) if isinstance(value, str) else ""
    raise ConfigError(f"{name} {value!r} is unknown{hint}; allowed: {', '.join(map(repr, allowed))}")


def integer(name: str, value: object, low: int, high: int) -> int:
    """``value`` if it is a whole number in low..high (a bool is none), else ``ConfigError``."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} {value!r} is not a whole number in {low}..{high}; give such a number")
    return value


def patterns(name: str, given: object) -> tuple[str, ...]:
    """Site patterns as a tuple; a lone string, an empty pattern or a broken ``re:`` is a ``ConfigError``."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f'{name} {given!r} is not a list of patterns; write {name}=["lm_head"]')
    return tuple(_pattern(name, item) for item in given)


def _pattern(name: str, item: object) -> str:
    if not isinstance(item, str) or not item:
        raise ConfigError(f'{name} pattern {item!r} is not a site name or "re:..." expression')
    if item.startswith("re:"):
        try:
            re.compile(item[3:])
        except re.error as error:
            raise ConfigError(f"{name} pattern {item!r} is not a regular expression: {error}; correct it") from None
    return item


def _overrides(given: object) -> tuple[tuple[str, int], ...]:
    allowed = (*WIDTHS, UNCOMPRESSED)
    pairs = given.items() if isinstance(given, Mapping) else () if given is None else given
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise ConfigError(f'overrides {given!r} is not a mapping; write overrides={{"re:.*down_proj": 8}}')
    out = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ConfigError(f"overrides entry {pair!r} is not a (pattern, width) pair")
        pattern, width = _pattern("overrides", pair[0]), pair[1]
        if type(width) is not int or width not in allowed:
            raise ConfigError(f"overrides width {width!r} of {pattern!r} is not one of {allowed} (16 leaves it alone)")
        out.append((pattern, width))
    return tuple(out)


def _number(name: str, value: object, hint: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{name} {value!r} is not a number; {hint}")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name} is a number too large to be one; {hint}") from None
