"""GPTQ: rounding column by column, each column's error spread over the columns still to come.

(Frantar et al. 2022; group order and clipping as in MixLLM section 4.)  With ``H = Sigma + damping`` and
``H^-1 = U^T U`` (U upper triangular) the loss of a finished row is an identity, not an estimate:

    (w - q) H (w - q)^T = sum_j e_j^2,      e_j = (w_j' - q_j) / U_jj,   w' the weight when its turn came.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixcomp.errors import WeightError
from mixcomp.format import GROUP
from mixcomp.quant import Grid, round_column

#: columns whose updates are collected before the rest of the matrix is touched (a GEMM instead of rank-1 updates)
BLOCK = 64
DAMPING = 0.01
MAX_DAMPING = 1e4


@dataclass(frozen=True, slots=True)
class Feedback:
    """What GPTQ needs to know of the inputs: shared by all sites that read the same activation.

    order int64[columns]: columns in the order of rounding, whole groups, most energetic first.
    factor fp32[columns, columns]: U in that order.  damping: the relative damping that made H factor.
    """

    order: torch.Tensor
    factor: torch.Tensor
    damping: float


def feedback(sigma: torch.Tensor, name: str) -> Feedback:
    """Factor damped second moments, sigma fp32[columns, columns].

    Damping starts at 1 % of the mean diagonal and grows tenfold until the matrix factors; columns that no calibration
    token ever touched have energy 0, so damping alone makes them independent of all others.

    Raises:
        WeightError: sigma is not finite, so nothing can make it factor.
    """
    if not torch.isfinite(sigma).all():
        raise WeightError(f"{name}: second moments of the inputs are not finite; check the calibration text")
    order = _group_order(sigma.diagonal())
    hessian = sigma.double()[order][:, order]
    hessian = (hessian + hessian.T) / 2
    mean = float(hessian.diagonal().mean()) or 1.0
    damping = DAMPING
    while damping <= MAX_DAMPING:
        damped = hessian + torch.eye(len(order), dtype=torch.float64, device=sigma.device) * (damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0 and bool(torch.isfinite(upper).all()):
                return Feedback(order, upper.float(), damping)
        damping *= 10
    raise WeightError(f"{name}: second moments do not factor even with {MAX_DAMPING:g} x damping")


def _group_order(energy: torch.Tensor) -> torch.Tensor:
    """Whole groups of 32 columns by falling energy; columns inside a group keep their order."""
    columns = len(energy)
    padded = torch.nn.functional.pad(energy, (0, -columns % GROUP)).view(-1, GROUP)
    groups = torch.argsort(padded.double().sum(-1), descending=True, stable=True)
    order = (groups[:, None] * GROUP + torch.arange(GROUP, device=energy.device)).flatten()
    return order[order < columns]


def gptq(weight: torch.Tensor, grid: Grid, known: Feedback) -> tuple[torch.Tensor, torch.Tensor]:
    """Round all rows with error feedback.  Rows are independent of each other.

    Args:
        weight: fp32[rows, columns].
        grid: stored scales of the rows (widths may differ from row to row).
        known: ``feedback`` of the inputs.

    Returns:
        codes uint8[rows, columns] and loss fp32[rows] = (w - q) H (w - q)^T with the damped H.
    """
    rows, columns = weight.shape
    left = weight.T[known.order].contiguous()  # [columns, rows]: a column of the weight is contiguous
    steps = grid.steps().T.contiguous()  # [groups, rows]
    offset, top = grid.offsets(), grid.top()
    group_of = (known.order // GROUP).tolist()
    pivots = known.factor.diagonal().tolist()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros(rows, device=weight.device)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(stop - start, rows, device=weight.device)
        for j in range(start, stop):
            step = steps[group_of[j]]
            code = round_column(left[j], step, offset, top)
            codes[j] = code.to(torch.uint8)
            error = torch.div(left[j] - code.sub_(offset).mul_(step), pivots[j], out=errors[j - start])
            if j + 1 < stop:
                left[j + 1 : stop].addr_(known.factor[j, j + 1 : stop], error, alpha=-1)
        loss += errors.square().sum(0)
        if stop < columns:
            left[stop:].addmm_(known.factor[start:stop, stop:].T, errors, alpha=-1)
    out = torch.empty_like(codes)
    out[known.order] = codes
    return out.T.contiguous(), loss
