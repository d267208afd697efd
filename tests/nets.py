"""Small modules to capture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mixcomp.program import Program


class Net(nn.Module):
    """Embedding of 32 tokens, then layers one after the other."""

    def __init__(self, *layers: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.layers = nn.ModuleList(layers)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 32, shape, generator=torch.Generator().manual_seed(1))


def run(program: Program, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = program.graph_module(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


class Branching(Net):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.sum() > 0:
            return super().forward(ids)
        return self.embed(ids)


class Noisy(Net):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = super().forward(ids)
        return x + torch.randn_like(x)


def open_names(program: Program) -> list[str]:
    return [s.name for s in program.open_sites()]


class Shifted(nn.Module):
    """Adds its own parameter to what a child computes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)
        self.shift = nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.shift
