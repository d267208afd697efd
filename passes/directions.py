"""Directions of a weighted error: what a low-rank side branch can take away, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: directions examined per site; the price rarely lets more than a few pass
MAX_DIRECTIONS = 8
#: subspace iteration: spare vectors and rounds
SPARE, ROUNDS = 8, 6


@dataclass(frozen=True, slots=True)
class Directions:
    """Leading directions of a weighted error: ``vectors`` fp32[rows, k] orthonormal, ``shares`` fp32[k] of its loss."""

    vectors: torch.Tensor
    shares: torch.Tensor


def error_spectrum(
    error: torch.Tensor, sigma: torch.Tensor, gamma: torch.Tensor, count: int, draw: torch.Generator
) -> Directions:
    """Top eigenvectors of ``G^1/2 E S E^T G^1/2`` by subspace iteration, and their share of its trace.

    They span the rank-k branch that removes most of ``tr(G E S E^T)``: LQER, QERA and EoRA's problem with output
    weights; no inverse or root of S is needed.  error fp32[rows, columns], sigma fp32[columns, columns],
    gamma fp32[rows].
    """
    weighted = error * gamma.clamp_min(0).sqrt()[:, None]
    moved = weighted @ sigma
    total = float((moved * weighted).sum().double())
    rank = min(count, *error.shape)
    width = min(rank + SPARE, *error.shape)
    basis = torch.randn(error.shape[0], width, generator=draw).to(error.device)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(moved @ (weighted.T @ basis))[0]
    small = (basis.T @ moved) @ (weighted.T @ basis)
    values, vectors = torch.linalg.eigh(((small + small.T) / 2).double())
    top = values.flip(0)[:rank].clamp_min(0)
    shares = (top / total).float() if total > 0 else torch.zeros(rank, device=error.device)
    return Directions(basis @ vectors.flip(1)[:, :rank].float(), shares)


def most_directions(rows: int, columns: int) -> int:
    """Directions worth examining: a branch is thinner than both sides of its weight."""
    return min(MAX_DIRECTIONS, rows - 1, columns - 1)


def branch_bits(rows: int, columns: int) -> int:
    """Stored bits of one direction: int8 on both sides and one fp32 scale."""
    return 8 * (rows + columns) + 32
