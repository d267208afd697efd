"""Patterns of site names: an exact path, a path above it, a glob, or ``"re:..."``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from mixcomp.errors import ConfigError


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` speaks of the site ``name``.

    ``"model.layers.0"`` is that module and all below it, ``"*.down_proj"`` a glob over the whole path, and
    ``"re:.*[qk]_proj"`` a regular expression that has to match the whole path.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def match(argument: str, pattern: str, names: Iterable[str]) -> list[str]:
    """The names that ``pattern`` matches; none at all, or a broken expression, is a ``ConfigError``."""
    names = list(names)
    try:
        found = [name for name in names if matches(pattern, name)]
    except re.error as error:
        raise ConfigError(f"{argument} pattern {pattern!r} is not a regular expression: {error}; correct it") from None
    if not found:
        near = ", ".join(_near(pattern, names)) or "none"
        raise ConfigError(f"{argument} pattern {pattern!r} matches no site; the nearest sites are {near}")
    return found


def select(argument: str, patterns: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Name -> the last pattern that matches it, for names that any pattern matches.  Errors as ``match``."""
    names = list(names)
    return {name: pattern for pattern in patterns for name in match(argument, pattern, names)}


def _near(pattern: str, names: list[str]) -> list[str]:
    """A few names that resemble the pattern: by a part of the path, else by spelling, else the first."""
    text = pattern.removeprefix("re:").strip("*.^$")
    holding = [name for name in names if text and text in name]
    return (holding or get_close_matches(text, names, n=3, cutoff=0.3) or names)[:3]
