"""The strategies by name: what runs between collect-statistics and reorder-features.

``joint`` prices every row at every width, ``uniform`` is its baseline; ``mixllm``, ``slim`` and ``amlq`` decide as the
papers do.  The last pass of each is an ``Assignment``: it knows its limits before any calibration.
"""

from __future__ import annotations

from collections.abc import Callable

from mixcomp.config import Budget
from mixcomp.passes.assign_blocks import AssignBlocks
from mixcomp.passes.assign_features import AssignFeatures
from mixcomp.passes.assign_mixes import AssignMixes
from mixcomp.passes.decision import Assignment
from mixcomp.passes.keep_samples import KeepSamples
from mixcomp.passes.precision import AssignPrecision
from mixcomp.passes.salience import AnnotateSalience
from mixcomp.passes.score_features import ScoreFeatures
from mixcomp.protocol import Pass

#: (site, width) pairs the user set
Fixed = tuple[tuple[str, int], ...]

#: name -> (passes that measure, given the tokens of a backward pass; the pass that decides)
STRATEGIES: dict[str, tuple[Callable[[int], tuple[Pass, ...]], Callable[[Budget, Fixed], Assignment]]] = {
    "joint": (lambda _: (AnnotateSalience(),), AssignPrecision),
    "uniform": (lambda _: (AnnotateSalience(),), lambda budget, fixed: AssignPrecision(budget, fixed, "uniform")),
    "mixllm": (lambda tokens: (ScoreFeatures(tokens=min(tokens, ScoreFeatures.tokens)),), AssignFeatures),
    "slim": (lambda _: (KeepSamples(),), AssignBlocks),
    "amlq": (lambda _: (), AssignMixes),
}


def measuring_of(strategy: str, gradient_tokens: int = 65536) -> tuple[Pass, ...]:
    """The passes that measure what a strategy needs besides statistics."""
    return STRATEGIES[strategy][0](gradient_tokens)


def passes_of(
    strategy: str, budget: Budget, fixed: Fixed = (), gradient_tokens: int = 65536
) -> tuple[tuple[Pass, ...], Assignment]:
    """(passes that measure, the pass that decides) of a strategy that ``CompileConfig`` has checked."""
    return measuring_of(strategy, gradient_tokens), STRATEGIES[strategy][1](budget, fixed)
