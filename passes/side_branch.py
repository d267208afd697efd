"""insert-side-branch: a thin low-rank pair beside a linear, where a direction of its error pays for its bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mixcomp.packed import PackedWeight
from mixcomp.passes.directions import Basis, branch_bits, error_loss, error_spectrum
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context, Pass, Semantics


@dataclass(frozen=True)
class InsertSideBranch(Pass):
    """Build the planned side branches from the error that quantization really left.

    With orthonormal V from ``error_spectrum``: ``A = G^-1/2 V``, ``B = V^T G^1/2 E``; both are rounded to int8 with one
    scale per direction.  A branch stays only if the *stored* factors lower the weighted loss of the site.

    Before::

        %3 = linear(%2, @layers.0.q_proj) {4x560 5x16}

    After, where a direction was planned::

        %3 = linear(%2, @layers.0.q_proj) {4x560 5x16 rank 1}

    Options:
        basis: where the directions come from, see ``error_spectrum``; ``error`` is optimal, the others are the papers'.
    """

    name: ClassVar[str] = "insert-side-branch"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED, Fact.STATISTICS})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.BRANCHED})
    semantics: ClassVar[Semantics] = Semantics.LOSSY

    basis: Basis = "error"

    def run(self, program: Program, context: Context) -> Program:
        tensors: dict[str, torch.Tensor] = {}
        sites: dict[str, Site] = {}
        planned = [s for s in program.open_sites() if int(program.tensor(s.name, "planned_rank"))]
        for site in context.track("side branches", planned):
            branch = _branch(program, site, context, self.basis)
            if branch is None:
                continue
            rank = int(branch["branch_scale"].shape[0])
            fmt = replace(site.layout, rank=rank)
            sites[site.name] = replace(site, format=fmt)
            more = rank - site.layout.rank  # a second run of the pass finds its own branch there
            bits = program.tensor(site.name, "planned_bits") + more * branch_bits(site.rows, site.columns)
            tensors[f"{site.name}/planned_bits"] = bits
            tensors.update({f"{site.name}/{key}": value for key, value in branch.items()})
        return program.with_sites(sites).with_tensors(tensors)


def _branch(program: Program, site: Site, context: Context, basis: Basis) -> dict[str, torch.Tensor] | None:
    """Stored factors in stored row order and the losses before and after, or None where the branch does not help."""
    fmt = replace(site.layout, rank=0)
    held = {name: program.tensor(site.name, name).to(context.device) for name in fmt.tensors()}
    stored = PackedWeight.from_tensors(fmt, held)
    weight = program.scaled_weight(site, context.device)
    gamma = program.gamma(site, context.device)
    sigma = program.sigma(site.input, context.device)
    rows, columns = program.find(site.name, "row_order"), program.find(site.name, "column_order")
    if columns is not None:
        columns = columns.to(context.device)
        weight, sigma = weight[:, columns], sigma[columns][:, columns]
    if rows is not None:
        rows = rows.to(context.device)
        weight, gamma = weight[rows], gamma[rows]
    error = weight - stored.base()
    floor = float(gamma.mean()) * 1e-6 or 1.0  # rows no token reacts to still need a finite G^-1/2
    gamma = gamma.clamp_min(floor)
    found = error_spectrum(
        error,
        sigma,
        gamma,
        int(program.tensor(site.name, "planned_rank")),
        context.generator(InsertSideBranch.name, site.name),
        basis,
        weight,
    )
    left = found.vectors / gamma.sqrt()[:, None]
    right = (found.vectors * gamma.sqrt()[:, None]).T @ error
    a, scale_a = _round_directions(left.T)
    b, scale_b = _round_directions(right)
    factors = {"branch_a": a.T.contiguous(), "branch_b": b, "branch_scale": scale_a * scale_b}
    before = error_loss(error, sigma, gamma)
    after = error_loss(error - (factors["branch_a"].float() * factors["branch_scale"]) @ b.float(), sigma, gamma)
    if not after < before:
        return None
    return {**factors, "loss_before_branch": before, "loss_after_branch": after}


def _round_directions(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32[rank, n] -> int8[rank, n] and one scale fp32[rank] per direction."""
    scale = (factor.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (factor / scale[:, None]).round().clamp_(-127, 127).to(torch.int8), scale
