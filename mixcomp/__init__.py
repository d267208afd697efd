"""MixComp: a language model within a budget of stored bits, on mixed-precision kernels.

``mixcomp.compile(model, budget=4.4)`` gives a Hugging Face model back with its linears compiled; ``save`` and ``load``
keep it; ``measure``, ``plan`` and ``apply`` are its three steps.  Names are imported when first used, so that
``import mixcomp`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mixcomp.hook import register_when_imported

if TYPE_CHECKING:
    from mixcomp.api import apply, compile, measure
    from mixcomp.artifact import load, save
    from mixcomp.config import Budget
    from mixcomp.errors import MixCompError
    from mixcomp.measurement import Measurement
    from mixcomp.planning import plan
    from mixcomp.plans import Plan, overlap

_HOME = {
    "compile": "mixcomp.api",
    "measure": "mixcomp.api",
    "plan": "mixcomp.planning",
    "apply": "mixcomp.api",
    "overlap": "mixcomp.plans",
    "save": "mixcomp.artifact",
    "load": "mixcomp.artifact",
    "Budget": "mixcomp.config",
    "Measurement": "mixcomp.measurement",
    "Plan": "mixcomp.plans",
    "MixCompError": "mixcomp.errors",
}

__all__ = [
    "Budget",
    "Measurement",
    "MixCompError",
    "Plan",
    "apply",
    "compile",
    "load",
    "measure",
    "overlap",
    "plan",
    "save",
]
__version__ = "0.1.0"

register_when_imported()  # AutoModelForCausalLM.from_pretrained reads our folders after ``import mixcomp``


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mixcomp' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
