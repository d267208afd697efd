"""SliM-LLM's mathematics: which blocks of input columns get one bit more, which one less, and how ranges are fitted.

(Huang et al., ICML 2025, sections 3.2 and 3.3.)  Pure numbers, no graph.  A *block* is ``group`` contiguous input columns
of all rows; the last one may be short, and then keeps the middle width so that the mean stays N exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mixcomp.passes.gptq import Feedback
from mixcomp.passes.rounding import round_range

#: shares of a range that quantizer calibration tries: the whole one, 50 up to a tenth more, 50 down to a tenth less
TAUS = (1.0, *(1 + i / 500 for i in range(1, 51)), *(1 - i / 500 for i in range(1, 51)))


def element_salience(weight: torch.Tensor, known: Feedback) -> torch.Tensor:
    """``w^2 / U_jj^2``, fp64[rows, columns]: the loss of zeroing a weight after those rounded earlier are frozen.

    ``U_jj^2 = [(H_FF)^-1]_jj`` over the columns F still to come (the code's form; the paper's text squares it again).
    """
    pivots = torch.empty(weight.shape[1], dtype=torch.float64, device=weight.device)
    pivots[known.order] = known.factor.diagonal().double().square()
    return weight.double().square() / pivots


def block_salience(elements: torch.Tensor, group: int) -> torch.Tensor:
    """Sum over each block, fp64[blocks] from fp64[rows, columns]."""
    columns = elements.sum(0)
    return torch.stack([part.sum() for part in columns.split(group)])


def pairing(salience: torch.Tensor, columns: int, group: int) -> list[tuple[int, int]]:
    """(low, high) blocks in the order in which they leave the middle width: least and most salient whole block first."""
    order = torch.argsort(salience[: columns // group].cpu(), stable=True).tolist()
    return list(zip(order[: len(order) // 2], order[::-1], strict=False))


def split_widths(pairs: list[tuple[int, int]], blocks: int, middle: int, count: int) -> torch.Tensor:
    """uint8[blocks]: the first ``count`` pairs at ``middle - 1`` and ``middle + 1``, so the mean is ``middle``."""
    widths = torch.full((blocks,), middle, dtype=torch.uint8)
    for low, high in pairs[:count]:
        widths[low], widths[high] = middle - 1, middle + 1
    return widths


def split_outputs(
    x: torch.Tensor, weight: torch.Tensor, pairs: list[tuple[int, int]], middle: int, group: int
) -> Iterator[torch.Tensor]:
    """Outputs float[samples, rows] of every split, 0 pairs first.

    The scan of the paper multiplies the whole matrix for every split; here each split adds what its two blocks change,
    so all of them cost two products: exact, only in another order of sums.  The yielded tensor is a buffer.
    """
    plain = round_range(weight, middle, group)
    y = x @ plain.T
    yield y
    for pair in pairs:
        for block, width in zip(pair, (middle - 1, middle + 1), strict=True):
            own = slice(block * group, (block + 1) * group)
            y = y.addmm_(x[:, own], (round_range(weight[:, own], width, group) - plain[:, own]).T)
        yield y


def divergences(
    x: torch.Tensor, weight: torch.Tensor, pairs: list[tuple[int, int]], middle: int, group: int
) -> torch.Tensor:
    """KL(original || rounded) of softmaxes over output features, mean over samples: fp64[splits].

    x float[samples, columns].  This is the order the paper prints (its code has the arguments the other way round).
    """
    wanted = (x @ weight.T).log_softmax(-1)
    found = []
    for y in split_outputs(x, weight, pairs, middle, group):
        found.append((wanted.exp() * (wanted - y.log_softmax(-1))).sum(-1).double().mean())
    return torch.stack(found)


def quadratic_errors(
    sigma: torch.Tensor, weight: torch.Tensor, pairs: list[tuple[int, int]], middle: int, group: int
) -> torch.Tensor:
    """``tr(E S E^T)`` of every split, fp64[splits], from float[columns, columns] S alone: no samples.

    When block b of E changes by D the trace changes by ``2 <D, (E S)_b> + <D S_bb, D>``.
    """
    plain = round_range(weight, middle, group)
    error = weight - plain
    moved = error @ sigma
    found = [(moved * error).sum(dtype=torch.float64)]
    for pair in pairs:
        total = found[-1]
        for block, width in zip(pair, (middle - 1, middle + 1), strict=True):
            own = slice(block * group, (block + 1) * group)
            change = plain[:, own] - round_range(weight[:, own], width, group)
            inside = moved[:, own] * 2 + change @ sigma[own, own]
            total = total + (change * inside).sum(dtype=torch.float64)
            moved.addmm_(change, sigma[own])
        found.append(total)
    return torch.stack(found)


def widened(widths: torch.Tensor, salience: torch.Tensor, middle: int, extra: int) -> torch.Tensor:
    """``extra`` steps of one bit for whole blocks: what a budget between N and N + 1 bits adds to a split.

    Middle blocks go first, the most salient first; then the low ones, two steps each.
    """
    order = torch.argsort(salience.cpu(), descending=True, stable=True).tolist()
    out = widths.clone()
    steps = [b for b in order if widths[b] == middle]
    steps += [b for b in order if widths[b] < middle for _ in range(2)]
    for block in steps[:extra]:
        out[block] += 1
    return out
