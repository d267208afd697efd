"""MixLLM's mathematics: what one output feature costs the loss, and which features get the wide codes.

(Zheng et al., MLSys 2026.)  Pure numbers, no graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch

from mixcomp.errors import ConfigError


def taylor_salience(dots: torch.Tensor) -> torch.Tensor:
    """``|g.delta + 1/2 (g.delta)^2|``: the loss change of one sequence to second order, float[...] in and out.

    The Hessian is the empirical Fisher block of the feature, ``g g^T``, so the quadratic form is a square.  The square
    is not homogeneous: scaling the loss by a constant may change the order of features whose ``g.delta`` is not small.
    """
    return (dots + dots.square() / 2).abs()


def feature_dots(gradient: torch.Tensor, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """``g.delta`` of every feature, ``sum_t (dL/dy)[t, c] (x_t . delta_c)``: one GEMM and no weight gradient.

    gradient float[tokens, rows], x float[tokens, columns], delta float[rows, columns] -> fp32[rows].
    """
    return (gradient.float() * (x.float() @ delta.T)).sum(0)


def widths_by_share(scores: torch.Tensor, widths: Sequence[int], shares: Sequence[float]) -> torch.Tensor:
    """MixLLM's own budget, a count of features: width of every feature of the whole model.

    From the widest width down, the ``floor(total * share)`` features not yet served that would lose most at the next
    narrower width get this one; the rest get the narrowest.  Ties go to the feature that comes first.

    Args:
        scores: float[features, widths - 1]; column i is the salience at ``widths[i + 1]``.
        widths: falling, e.g. ``(8, 4)``.
        shares: of the first ``len(widths) - 1`` widths, each read as the decimal number it prints as; sum at most 1.

    Returns:
        uint8[features].

    Raises:
        ConfigError: widths do not fall, or shares are not as many shares as needed.
    """
    check_widths(widths)
    exact = [Fraction(str(s)) for s in shares]
    if len(exact) != len(widths) - 1 or min(exact) < 0 or sum(exact) > 1:
        raise ConfigError(
            f"shares {tuple(shares)!r} for widths {tuple(widths)}: give {len(widths) - 1} numbers in 0..1 whose sum "
            "is at most 1, one for each width but the narrowest"
        )
    out = torch.full((len(scores),), widths[-1], dtype=torch.uint8)
    left = torch.ones(len(scores), dtype=torch.bool)
    for i, share in enumerate(exact):
        count = math.floor(len(scores) * share)
        own = scores[:, i].double().cpu().masked_fill(~left, -torch.inf)
        best = torch.argsort(own, descending=True, stable=True)[: min(count, int(left.sum()))]
        out[best], left[best] = widths[i], False
    return out


def losses_of(scores: torch.Tensor) -> torch.Tensor:
    """What each width costs, narrowest first: fp64[features, widths] from float[features, widths - 1].

    The widest width counts as lossless, as in the paper; a narrower width never counts as better than a wider one.
    With two widths, buying at one price per stored bit is ranking by ``S_c / (stored bits the wide code adds)``.
    """
    rising = torch.cat((torch.zeros(len(scores), 1, dtype=torch.float64), scores.double().cpu()), 1)
    return rising.cummax(1).values.flip(1)


def check_widths(widths: Sequence[int]) -> None:
    """Raise ``ConfigError`` unless there are two widths or more, each smaller than the one before."""
    if len(widths) < 2 or any(a <= b for a, b in pairwise(widths)):
        raise ConfigError(f"widths {tuple(widths)!r} are not two or more falling widths; write for example (8, 4)")
