"""Rounding a block of columns, against its definition one number at a time."""

from __future__ import annotations

import pytest
import torch

from column_cases import SHAPES, Block, block
from mixcomp.format import GROUP
from mixcomp.passes.columns import BLOCK, round_columns


def definition(given: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of all columns, and amounts of the block, in fp64 and plain loops over columns."""
    values, codes = given.values.double().clone(), given.codes.double().clone()
    columns = range(given.start, min(given.start + BLOCK, values.shape[1]))
    amounts = []
    for j in columns:
        step, top = (t[:, j // GROUP].double() for t in (given.steps, given.tops))
        pivot = given.matrix[:, j, j, None].double()
        if given.bases is None:
            base = codes[:, j].clone()
            codes[:, j] = (base + values[:, j] / pivot / step).round().clamp(min=0).minimum(top)
            amounts.append((codes[:, j] - base) * step)
        else:
            base = given.bases[:, j // GROUP].double()
            codes[:, j] = (base + values[:, j] / step).round().clamp(min=0).minimum(top)
            amounts.append((values[:, j] - (codes[:, j] - base) * step) / pivot)
        for i in range(j + 1, columns.stop):
            values[:, i] -= given.matrix[:, j, i, None].double() * amounts[-1]
    return codes, torch.stack(amounts, 1)


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_is_rounded_as_defined(shape: tuple[int, int, int, int], feedback: bool) -> None:
    given = block(1, *shape, feedback=feedback, dyadic=True)
    own = slice(given.start, given.start + BLOCK)
    wanted, amounts = definition(given)
    found = given.copy()
    made = round_columns(*found.arguments())
    assert torch.equal(found.codes[:, own].double(), wanted[:, own])
    assert torch.equal(made.double(), amounts)
    outside = torch.ones(given.codes.shape[1], dtype=torch.bool)
    outside[own] = False
    assert torch.equal(found.codes[:, outside], given.codes[:, outside]), "other columns stay as they are"


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # Triton and torch warn about each other's versions
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 200, 5000, 128)])
def test_the_kernel_gives_equal_bits_on_a_gpu(shape: tuple[int, int, int, int], feedback: bool) -> None:
    given = block(2, *shape, feedback=feedback, dyadic=True)
    one, two = given.copy(), given.copy("cuda")
    wanted = round_columns(*one.arguments())
    found = round_columns(*two.arguments())
    assert torch.equal(found.cpu(), wanted)
    assert torch.equal(two.codes.cpu(), one.codes)
