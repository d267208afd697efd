"""Hypothesis strategies: structure and seeds are drawn, tensors are built from them, so examples shrink well."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

import programs
from programs import Blueprint, Kind, Layer, Values

#: sizes around the group of 32, and those that divide nothing
SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 64)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)

sizes = st.sampled_from(SIZES)
seeds = st.integers(0, 2**16)

layers = st.builds(Layer, kind=st.sampled_from(Kind), size=sizes, bias=st.booleans(), dtype=st.sampled_from(DTYPES))


@st.composite
def blueprints(draw: st.DrawFn, max_layers: int = 3) -> Blueprint:
    """Small programs: 1 to 6 linears in scope, with residuals, reuse, ties, biases, odd sizes and mixed dtypes."""
    return Blueprint(
        layers=tuple(draw(st.lists(layers, min_size=1, max_size=max_layers))),
        width=draw(sizes),
        vocab=draw(st.integers(2, 17)),
        tied=draw(st.booleans()),
        values=draw(st.sampled_from(Values)),
        seed=draw(seeds),
    )


@st.composite
def nasty_weights(
    draw: st.DrawFn, rows: st.SearchStrategy[int] = sizes, columns: st.SearchStrategy[int] = sizes
) -> torch.Tensor:
    """fp32[rows, columns]: zeros, constants, subnormals, outliers, equal rows and other finite troublemakers."""
    generator = torch.Generator().manual_seed(draw(seeds))
    weight = torch.randn(draw(rows), draw(columns), generator=generator)
    return programs.NASTY[draw(st.sampled_from(sorted(programs.NASTY)))](weight)


@st.composite
def row_widths(draw: st.DrawFn, rows: int) -> torch.Tensor:
    """uint8[rows] of allowed widths, few or many different ones."""
    allowed = draw(st.lists(st.sampled_from((2, 3, 4, 5, 6, 8)), min_size=1, max_size=6, unique=True))
    generator = torch.Generator().manual_seed(draw(seeds))
    return torch.tensor(allowed, dtype=torch.uint8)[torch.randint(len(allowed), (rows,), generator=generator)]
