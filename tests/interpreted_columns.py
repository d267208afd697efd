"""The kernel that rounds columns under Triton's interpreter; run by ``test_kernels_interpreter`` in its own process."""

from __future__ import annotations

import pytest
import torch

from column_cases import SHAPES, block
from mixcomp.errors import InputError
from mixcomp.kernels import columns as kernel
from mixcomp.passes import columns as eager


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_exact_data_gives_equal_bits(shape: tuple[int, int, int, int], feedback: bool, seed: int) -> None:
    given = block(seed, *shape, feedback=feedback, dyadic=True)
    one, two = given.copy(), given.copy()
    wanted = eager.round_columns(*one.arguments())
    found = kernel.round_columns(*two.arguments(), wanted.shape[1])
    assert torch.equal(found, wanted)
    assert torch.equal(two.codes, one.codes)
    assert torch.equal(two.values, one.values) or two.values is two.codes


@pytest.mark.parametrize("feedback", [True, False])
def test_random_data_differs_at_ties_at_most(feedback: bool) -> None:
    given = block(5, 2, 160, 70, 64, feedback=feedback, dyadic=False)
    one, two = given.copy(), given.copy()
    wanted = eager.round_columns(*one.arguments())
    found = kernel.round_columns(*two.arguments(), wanted.shape[1])
    rows = (one.codes == two.codes).all(1)  # a code that falls the other way changes the rest of its row
    assert rows.float().mean() > 0.97
    close = rows[:, None].expand_as(found)
    torch.testing.assert_close(found[close], wanted[close], rtol=1e-4, atol=1e-5)


def test_strided_tensors_are_refused() -> None:
    given = block(0, 1, 64, 32, 0, feedback=True, dyadic=True)
    values, codes, *rest = given.arguments()
    with pytest.raises(InputError, match="contiguous"):
        kernel.round_columns(values.mT.contiguous().mT, codes, *rest, 64)
