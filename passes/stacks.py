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


#: bytes of fp32 weights, second moments and their factors that are worked on side by side: a GPU wants many, a core's
#: cache few
BATCH_BYTES = {"cpu": 1, "cuda": 1 << 30}


def inputs(program: Program) -> dict[str, tuple[Site, ...]]:
    """Open sites by the activation they read, in graph order."""
    out: dict[str, list[Site]] = {}
    for site in program.open_sites():
        out.setdefault(site.input, []).append(site)
    return {name: tuple(sites) for name, sites in out.items()}


def stack(program: Program, name: str, sites: tuple[Site, ...], device: torch.device) -> Stack:
    """Gather the weights of ``sites`` and the second moments of their input ``name``."""
    weight = torch.cat([program.scaled_weight(s, device) for s in sites])
    sigma = program.sigma(name, device)
    order = program.find(sites[0].name, "column_order")
    if order is not None:
        order = order.to(device)
        weight, sigma = weight[:, order], sigma[order][:, order]
    return Stack(sites, weight, sigma)


def batches(program: Program, device: torch.device, copies: int) -> list[list[tuple[str, tuple[Site, ...]]]]:
    """Inputs whose stacks have one shape, as many together as ``BATCH_BYTES`` allows for ``copies`` of their weights."""
    waiting: dict[tuple[int, int], list[tuple[str, tuple[Site, ...]]]] = {}
    out = []
    for name, sites in inputs(program).items():
        rows, columns = sum(s.rows for s in sites), sites[0].columns
        batch = waiting.setdefault((rows, columns), [])
        batch.append((name, sites))
        if (len(batch) + 1) * (rows * copies + 2 * columns) * columns * 4 > BATCH_BYTES[device.type]:
            out.append(waiting.pop((rows, columns)))
    return out + list(waiting.values())
