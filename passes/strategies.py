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

STRATEGIES: dict[str, tuple[tuple[Callable[[], Pass], ...], Callable[[Budget, Fixed], Assignment]]] = {
    "joint": ((AnnotateSalience,), AssignPrecision),
    "uniform": ((AnnotateSalience,), lambda budget, fixed: AssignPrecision(budget, fixed, "uniform")),
    "mixllm": ((ScoreFeatures,), AssignFeatures),
    "slim": ((KeepSamples,), AssignBlocks),
    "amlq": ((), AssignMixes),
}


def passes_of(strategy: str, budget: Budget, fixed: Fixed = ()) -> tuple[tuple[Pass, ...], Assignment]:
    """(passes that measure, the pass that decides) of a strategy that ``CompileConfig`` has checked."""
    measures, decides = STRATEGIES[strategy]
    return tuple(kind() for kind in measures), decides(budget, fixed)
