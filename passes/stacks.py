"""Sites that read the same activation, stacked: they share second moments, so one GPTQ run serves them all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixcomp.program import Program, Site


@dataclass(frozen=True, slots=True)
class Stack:
    """``weight`` fp32[sum of rows, columns] is the sites' weights one under another, columns in stored order."""

    sites: tuple[Site, ...]
    weight: torch.Tensor
    sigma: torch.Tensor

    def split(self, rows: torch.Tensor) -> list[tuple[Site, torch.Tensor]]:
        """Hand each site its rows of a tensor that has one entry per stacked row."""
        return list(zip(self.sites, rows.split([s.rows for s in self.sites]), strict=True))


def inputs(program: Program) -> dict[str, tuple[Site, ...]]:
    """Open sites by the activation they read, in graph order.

    Sites whose columns were permuted by an absorption stand under their own order and are never mixed with others.
    """
    out: dict[str, list[Site]] = {}
    for site in program.open_sites():
        out.setdefault(site.input, []).append(site)
    return {name: tuple(sites) for name, sites in out.items()}


def stack(program: Program, name: str, sites: tuple[Site, ...], device: torch.device) -> Stack:
    """Gather the weights of ``sites`` and the second moments of their input ``name``."""
    weight = torch.cat([program.weight(s).detach().to(device, torch.float32) for s in sites])
    sigma = program.tensor(name, "sigma").to(device)
    order = program.find(sites[0].name, "column_order")
    if order is not None:
        order = order.to(device)
        weight, sigma = weight[:, order], sigma[order][:, order]
    return Stack(sites, weight, sigma)
