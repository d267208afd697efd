"""The passes, one idea a file, and the order they run in.

::

    collect-statistics  what calibration text says about inputs and outputs      S = E[|g| x x^T], gamma = E[g^2], g = dL/dy
    scale-channels      columns times s, what makes them by 1/s                  one convex problem a group
    annotate-salience   what each row would cost at each width                   six GPTQ runs
    assign-precision    which width each row gets                                one budget, one price
    (follow-plan        takes the widths from a plan instead)
    reorder-features    rows sorted into segments                                absorbed by the consumer, or scattered
    (scale-channels     again, for the groups that this leaves)
    quantize-weights    codes and scales                                         GPTQ, then coordinate descent
    insert-side-branch  low-rank pairs where a plan has some                     closed form
    tune-blocks         rounding and scales learned layer by layer               effort balanced and best
    tune-model          scales, branches, norms from the original's predictions  effort best
    (tune-clipping      where ranges are clipped, learned layer by layer         slim, amlq: instead of these two)
    (lowering)          lower-linears: canonical linears become mixed_linear

``strategies`` lists what other strategies put in place of the second to fourth.

No pass imports another pass; ``gptq``, ``refine``, ``allocate``, ``planner``, ``coupling``, ``orders``, ``directions``,
``stacks`` and others are mathematics they share, ``layerwise`` is the loop of tune-blocks and tune-clipping.
"""

from mixcomp.passes.follow import FollowPlan
from mixcomp.passes.precision import AssignPrecision
from mixcomp.passes.quantize import QuantizeWeights
from mixcomp.passes.reorder import ReorderFeatures
from mixcomp.passes.salience import AnnotateSalience
from mixcomp.passes.scale import ScaleChannels
from mixcomp.passes.side_branch import InsertSideBranch
from mixcomp.passes.statistics import CollectStatistics
from mixcomp.passes.tune_blocks import TuneBlocks
from mixcomp.passes.tune_clipping import TuneClipping
from mixcomp.passes.tune_model import TuneModel

PIPELINE = (
    CollectStatistics,
    ScaleChannels,
    AnnotateSalience,
    AssignPrecision,
    ReorderFeatures,
    ScaleChannels,
    QuantizeWeights,
    InsertSideBranch,
)

__all__ = [
    "PIPELINE",
    "AnnotateSalience",
    "AssignPrecision",
    "CollectStatistics",
    "FollowPlan",
    "InsertSideBranch",
    "QuantizeWeights",
    "ReorderFeatures",
    "ScaleChannels",
    "TuneBlocks",
    "TuneClipping",
    "TuneModel",
]
