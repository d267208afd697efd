"""Everything MixComp refuses, by name.

One rule for every message: *what* (the layer or argument), *got* (the value), *wanted* (what is allowed)
and *what to do*.  A ``MixCompError`` always leaves the caller's model and files as they were.
"""

from __future__ import annotations


class MixCompError(Exception):
    """Base of every error MixComp raises on purpose."""


class ConfigError(MixCompError):
    """An argument is unknown, of the wrong type or out of range."""


class BudgetError(ConfigError):
    """The budget is below the floor or above the ceiling of the weights in scope."""


class InputError(MixCompError):
    """The thing given is not a model MixComp can work on (a class, a compiled model, meta weights ...)."""


class MismatchError(InputError):
    """A measurement or a plan was made from another model than the one given."""


class CaptureError(MixCompError):
    """The model could not be traced to a graph, or too little of it could be understood."""


class CalibrationError(MixCompError):
    """Calibration text or tokens are unusable, or they drive the model to NaN."""


class WeightError(MixCompError):
    """A weight holds values that cannot be quantized (NaN, infinity, out of the scale's range)."""


class PassError(MixCompError):
    """A pass failed or handed back a program that breaks an invariant."""


class PassOrderError(PassError):
    """A pass was run before a fact it requires was established."""


class InvariantError(PassError):
    """An invariant I01-I16 does not hold; the message starts with its id."""


class FormatError(MixCompError):
    """A stored format says something impossible (a width that does not exist, rows that do not add up)."""


class ArtifactError(MixCompError):
    """A saved folder is missing a file, is truncated, corrupted or foreign."""


class StorageError(MixCompError):
    """The file system refused a write; nothing half-written is left behind."""
