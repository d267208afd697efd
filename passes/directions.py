"""Directions of a weighted error: what a low-rank side branch can take away, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mixcomp.errors import PassError

#: directions examined per site; the price rarely lets more than a few pass
MAX_DIRECTIONS = 8
#: subspace iteration: spare vectors and rounds
SPARE, ROUNDS = 8, 6

#: where a branch's directions come from, see ``error_spectrum``
Basis = Literal["error", "output", "diagonal", "plain"]


@dataclass(frozen=True, slots=True)
class Directions:
    """Leading directions of a weighted error: ``vectors`` fp32[rows, k] orthonormal, ``shares`` fp32[k] of its loss."""

    vectors: torch.Tensor
    shares: torch.Tensor


def error_spectrum(
    error: torch.Tensor,
    sigma: torch.Tensor,
    gamma: torch.Tensor,
    count: int,
    draw: torch.Generator,
    basis: Basis = "error",
    weight: torch.Tensor | None = None,
) -> Directions:
    """Orthonormal V for the branch ``A = G^-1/2 V, B = V^T G^1/2 E``, by subspace iteration.

    V are the top eigenvectors of, by ``basis``::

        error      G^1/2 E S E^T G^1/2        exact: removes most of tr(G E S E^T) (QERA, EoRA; no inverse or root of S)
        diagonal   the same, S's diagonal only                                    (L2QER, QERA-approx)
        plain      the same, S = I: the SVD of the error                          (LQER, ZeroQuant-V2)
        output     G^1/2 W S W^T G^1/2: where outputs live, not errors            (AMLQ as far as its text tells)

    ``shares`` is what each direction removes of the loss of E under the full S, whatever the basis; shares add up.

    Args:
        error, weight: fp32[rows, columns]; ``weight`` is read by ``output`` alone.
        sigma: fp32[columns, columns].
        gamma: fp32[rows].
        count: directions wanted.
        draw: of the first basis.
    """
    root = gamma.clamp_min(0).sqrt()[:, None]
    weighted = error * root
    moved = weighted @ sigma
    total = float((moved * weighted).sum().double())
    left, right = _factors(basis, weighted, moved, sigma, None if weight is None else weight * root)
    rank = min(count, *error.shape)
    width = min(rank + SPARE, *error.shape)
    subspace = torch.randn(error.shape[0], width, generator=draw).to(error.device)
    for _ in range(ROUNDS):
        subspace = torch.linalg.qr(left @ (right.T @ subspace))[0]
    small = (subspace.T @ left) @ (right.T @ subspace)
    vectors = torch.linalg.eigh(((small + small.T) / 2).double())[1].flip(1)[:, :rank]
    found = subspace @ vectors.float()
    removed = ((found.T @ moved) * (found.T @ weighted)).sum(-1).clamp_min(0)
    return Directions(found, removed / total if total > 0 else torch.zeros_like(removed))


def _factors(
    basis: Basis, weighted: torch.Tensor, moved: torch.Tensor, sigma: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R, fp32[rows, columns] each, whose ``L R^T`` is the matrix to find eigenvectors of."""
    if basis == "output":
        if weight is None:
            raise PassError("basis 'output' needs the weight beside the error; give weight=")
        return weight @ sigma, weight
    return {"error": moved, "diagonal": weighted * sigma.diagonal(), "plain": weighted}[basis], weighted


def error_loss(error: torch.Tensor, sigma: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """``1/2 sum_c gamma_c e_c S e_c^T``, a 0-d fp64 tensor: nats per token."""
    return ((error @ sigma * error).sum(-1).double() * gamma.double()).sum() / 2


def rank_by_price(shares: torch.Tensor, loss: float, price: float, bits: int) -> int:
    """Leading directions whose share of ``loss`` is worth more than their ``bits`` would save elsewhere."""
    pays = shares.double().cpu() * loss > price * bits
    return int(pays.long().cumprod(0).sum())


def rank_by_energy(shares: torch.Tensor, energy: float) -> int:
    """Fewest leading directions that hold ``energy`` of the loss (AMLQ's rule); all examined ones where none do."""
    return min(len(shares), int((shares.double().cpu().cumsum(0) < energy).sum()) + (energy > 0))


def most_directions(rows: int, columns: int) -> int:
    """Directions worth examining: a branch is thinner than both sides of its weight."""
    return min(MAX_DIRECTIONS, rows - 1, columns - 1)


def branch_bits(rows: int, columns: int) -> int:
    """Stored bits of one direction: int8 on both sides and one fp32 scale."""
    return 8 * (rows + columns) + 32
