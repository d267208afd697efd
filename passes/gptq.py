"""GPTQ: rounding column by column, each column's error spread over the columns still to come.

(Frantar et al. 2022; group order and clipping as in MixLLM section 4.)  With ``H = Sigma + damping`` and
``H^-1 = U^T U`` (U upper triangular) the loss of a finished row is an identity, not an estimate:

    (w - q) H (w - q)^T = sum_j e_j^2,      e_j = (w_j' - q_j) / U_jj,   w' the weight when its turn came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixcomp.errors import WeightError
from mixcomp.format import GROUP
from mixcomp.passes.columns import BLOCK, round_columns
from mixcomp.quant import Rounding

DAMPING = 0.01
MAX_DAMPING = 1e4


@dataclass(frozen=True, slots=True)
class Feedback:
    """What GPTQ needs to know of the inputs: shared by all sites that read the same activation.

    order int64[columns]: columns in the order of rounding, whole groups, most energetic first.
    hessian, factor fp32[columns, columns]: H and U in that order.  damping: the relative damping that made H factor.
    """

    order: torch.Tensor
    hessian: torch.Tensor
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
    hessian = sigma[order][:, order].double()
    hessian = (hessian + hessian.T).div_(2)
    mean = float(hessian.diagonal().mean()) or 1.0
    damping = DAMPING
    while damping <= MAX_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            factor = torch.cholesky_inverse(factor)  # 1.6 GB for 14,336 columns: no second name keeps the first one
            upper, info = torch.linalg.cholesky_ex(factor, upper=True)
            if int(info) == 0 and bool(torch.isfinite(upper).all()):
                return Feedback(order, damped.float(), upper.float(), damping)
        damping *= 10
    raise WeightError(f"{name}: second moments do not factor even with {MAX_DAMPING:g} x damping")


def _group_order(energy: torch.Tensor) -> torch.Tensor:
    """Whole groups of 32 columns by falling energy, a short last group at the end; inside a group nothing moves."""
    full = len(energy) // GROUP * GROUP
    groups = torch.argsort(energy[:full].view(-1, GROUP).double().sum(-1), descending=True, stable=True)
    order = (groups[:, None] * GROUP + torch.arange(GROUP, device=energy.device)).flatten()
    return torch.cat((order, torch.arange(full, len(energy), device=energy.device)))


@dataclass(frozen=True, slots=True)
class Task:
    """One matrix to round: weight fp32[rows, columns], the stored scales of its rows, and what is known of its inputs."""

    weight: torch.Tensor
    grid: Rounding
    known: Feedback


def gptq(tasks: Sequence[Task]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Round matrices of one shape side by side: a GPU is kept busy by many layers, not by one column of one layer.

    Rows are independent of each other (their widths may differ), and so are the tasks.

    Returns:
        Per task codes uint8[rows, columns] and loss fp32[rows] = (w - q) H (w - q)^T with the damped H.
    """
    left = torch.stack([t.weight.T[t.known.order] for t in tasks])  # [tasks, columns, rows]
    factor = torch.stack([t.known.factor for t in tasks])
    steps, offsets, tops = (torch.stack(part) for part in zip(*map(numbers, tasks), strict=True))
    loss = torch.zeros_like(left[:, 0])
    for start in range(0, left.shape[1], BLOCK):
        errors = round_columns(left, left, factor, steps, offsets, tops, start)
        stop = start + errors.shape[1]
        loss += errors.square().sum(1)
        left[:, stop:].baddbmm_(factor[:, start:stop, stop:].mT, errors, alpha=-1)
    codes = left.to(torch.uint8)
    return [(restore(own, t.known.order), lost) for own, lost, t in zip(codes, loss, tasks, strict=True)]


def numbers(task: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps, offsets and largest codes, each fp32[blocks of 32 columns in rounding order, rows]."""
    blocks, grid = task.known.order[::GROUP] // GROUP, task.grid
    return grid.steps()[:, blocks].T, grid.offsets()[:, blocks].T, grid.top()[:, blocks].T


def restore(codes: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Codes uint8[columns in rounding order, rows] -> uint8[rows, columns]."""
    out = torch.empty_like(codes)
    out[order] = codes
    return out.T.contiguous()
