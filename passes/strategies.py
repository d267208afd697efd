"""The strategies by name: what runs between collect-statistics and insert-side-branch.

``joint`` prices every row at every width, ``uniform`` is its baseline; ``mixllm``, ``slim`` and ``amlq`` decide as the
papers do, on weights as they are.  The deciding pass is an ``Assignment``: it knows its limits before any calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mixcomp.config import Budget
from mixcomp.format import Scales
from mixcomp.passes.assign_blocks import AssignBlocks
from mixcomp.passes.assign_features import AssignFeatures
from mixcomp.passes.assign_mixes import AssignMixes
from mixcomp.passes.decision import Assignment
from mixcomp.passes.keep_samples import KeepSamples
from mixcomp.passes.precision import AssignPrecision
from mixcomp.passes.quantize import QuantizeWeights
from mixcomp.passes.reorder import ReorderFeatures
from mixcomp.passes.salience import AnnotateSalience
from mixcomp.passes.scale import ScaleChannels
from mixcomp.passes.score_features import ScoreFeatures
from mixcomp.passes.side_branch import InsertSideBranch
from mixcomp.protocol import Pass

#: columns of a group as MixLLM publishes them
PUBLISHED_GROUP = 128
#: (site, width) pairs the user set
Fixed = tuple[tuple[str, int], ...]

_PRICING: tuple[Pass, ...] = (ScaleChannels(), AnnotateSalience())

#: name -> (passes that measure, given the tokens of a backward pass; the pass that decides)
STRATEGIES: dict[str, tuple[Callable[[int], tuple[Pass, ...]], Callable[[Budget, Fixed], Assignment]]] = {
    "joint": (lambda _: _PRICING, AssignPrecision),
    "uniform": (lambda _: _PRICING, lambda budget, fixed: AssignPrecision(budget, fixed, "uniform")),
    "mixllm": (lambda tokens: (ScoreFeatures(tokens=min(tokens, ScoreFeatures.tokens)),), AssignFeatures),
    "slim": (lambda _: (KeepSamples(),), AssignBlocks),
    "amlq": (lambda _: (), AssignMixes),
}


#: from widths to stored tensors
QUANTIZING: tuple[Pass, ...] = (ReorderFeatures(), QuantizeWeights(), InsertSideBranch())
#: strategy -> how channels are scaled to the groups that reordering leaves; weights of the others stay as they are
_SCALING = {"joint": ScaleChannels(), "uniform": ScaleChannels("given")}


def quantizing_of(strategy: str, activations: str = "native") -> tuple[Pass, ...]:
    """The passes from widths to stored tensors of a strategy."""
    reorder, *rest = QUANTIZING
    if strategy not in _SCALING:
        return QUANTIZING
    return (reorder, replace(_SCALING[strategy], activations=activations), *rest)


def measuring_of(strategy: str, gradient_tokens: int = 65536) -> tuple[Pass, ...]:
    """The passes that measure what a strategy needs besides statistics."""
    return STRATEGIES[strategy][0](gradient_tokens)


def passes_of(
    strategy: str, budget: Budget, fixed: Fixed = (), gradient_tokens: int = 65536, activations: str = "native"
) -> tuple[tuple[Pass, ...], Assignment]:
    """(passes that measure, the pass that decides) of a strategy that ``CompileConfig`` has checked.

    With 8-bit activations mixllm stores weights as published too: a token's scales follow the weights' groups.
    """
    if (strategy, activations) == ("mixllm", "int8"):
        score = ScoreFeatures(tokens=min(gradient_tokens, ScoreFeatures.tokens), group=PUBLISHED_GROUP)
        return (score,), AssignFeatures(budget, fixed, group=PUBLISHED_GROUP, scale_kind=Scales.FLOAT_GROUP)
    return measuring_of(strategy, gradient_tokens), STRATEGIES[strategy][1](budget, fixed)
