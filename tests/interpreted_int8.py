"""The kernels of 8-bit integers under Triton's interpreter: run by ``test_kernels_interpreter`` in its own process.

``lowering.int8`` says what has to come out: the same codes on either side, and the same bits of their products.
"""

from __future__ import annotations

import random

import pytest
import torch

from interpreted_kernels import MIXED, STRIDES, fenced
from kernel_cases import EDGES, Case, operands, random_format, random_weight
from mixcomp.errors import InputError
from mixcomp.format import WIDTHS, Segment, SiteFormat
from mixcomp.kernels import int8 as kernels
from mixcomp.kernels import launch
from mixcomp.lowering import int8

CASES = 20
F16, F32 = torch.float16, torch.float32
TILES = (kernels.Int8Tile(16, 32, 4, 2), kernels.Int8Tile(32, 16, 4, 3), kernels.Int8Tile(64, 64, 4, 1))


def given(case: Case) -> tuple:
    """(weight, x, bias): numbers of several sizes, a token of zeros now and then."""
    generator = torch.Generator().manual_seed(case.seed)
    weight = random_weight(case.fmt, generator, dyadic=False)
    x = torch.randn(case.tokens, case.fmt.columns, generator=generator) * 10.0 ** (case.seed % 5 - 2)
    x[: case.seed % 2] = 0
    bias = None if case.bias is None else torch.randn(case.fmt.rows, generator=generator).to(case.bias)
    return weight, x.to(case.dtype), bias


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    fmt = random_format(rng, rng.choice((*EDGES, 600, 1090)), segments=rng.choice((1, 2, 3)), most_rows=40, rank=0)
    tokens, dtype = rng.choice((1, 2, 7, 16, 17, 33, 70)), rng.choice((F16, F32))
    return Case(fmt, tokens, dtype, rng.choice((None, F16, F32, torch.float64)), seed)


@pytest.mark.parametrize("seed", range(CASES))
def test_products_are_those_of_the_reference(seed):
    weight, x, bias = given(random_case(seed))
    behind = seed % 2 == 0
    tensors = {name: fenced(tensor, behind=behind) for name, tensor in operands(weight).items()}
    got = launch.int8_linear(
        fenced(x, behind=behind), **tensors, bias=fenced(bias, behind=behind), fmt=weight.fmt, tile=TILES[seed % 3]
    )
    wanted = int8.mixed_linear(x, weight, None if bias is None else bias.float())
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("layout", ["", *STRIDES])
@pytest.mark.parametrize("columns", [1, 96, 257, 640])
@pytest.mark.parametrize("span", [64, 4096])
def test_tokens_become_the_codes_of_the_reference(layout, columns, span, monkeypatch):
    monkeypatch.setattr(kernels, "SPAN", span)
    for dtype in (F16, F32):
        _, x, _ = given(Case(SiteFormat(1, columns, (Segment(1, 4),)), 5, dtype, None, 1))
        x = STRIDES[layout](x) if layout else fenced(x, behind=True)
        codes, scales = launch.int8_tokens(x)
        wanted, wanted_scales = int8.round_tokens(x)
        assert codes.shape[1] % 128 == 0
        assert torch.equal(codes[:, :columns], wanted)
        assert not codes[:, columns:].any(), "products of padding are zero"
        assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("columns", [1, 122, 128, 1096])
def test_rows_become_the_codes_of_the_reference_in_output_order(columns):
    fmt = SiteFormat(66, columns, MIXED, scatter=columns != 122)
    weight, _, _ = given(Case(fmt, 1, F16, None, 1))
    tensors = {name: fenced(tensor, behind=True) for name, tensor in operands(weight).items() if "branch" not in name}
    codes, units = launch.int8_rows(**tensors, fmt=fmt)
    wanted, wanted_units = int8.round_rows(weight)
    index = torch.arange(fmt.rows) if weight.row_index is None else weight.row_index.long()
    assert torch.equal(codes[index, :columns], wanted)
    assert torch.equal(units[index], wanted_units)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(width):
    weight, x, bias = given(Case(SiteFormat(35, 130, (Segment(35, width),)), 20, F32, F32, width))
    got = launch.int8_linear(x, **operands(weight), bias=bias, fmt=weight.fmt, tile=TILES[0])
    assert torch.equal(got, int8.mixed_linear(x, weight, bias))


def test_a_side_branch_is_added():
    weight, x, bias = given(Case(SiteFormat(66, 130, MIXED, scatter=True, rank=5), 70, F32, F16, 2))
    got = launch.int8_linear(x, **operands(weight), bias=bias, fmt=weight.fmt)
    wanted = int8.mixed_linear(x, weight, bias)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_token_spoils_only_itself(value):
    weight, x, _ = given(Case(SiteFormat(5, 40, (Segment(5, 4),)), 6, F32, None, 1))
    wanted = int8.mixed_linear(x, weight, None)
    x[2, 7] = value
    out = launch.int8_linear(x, **operands(weight), bias=None, fmt=weight.fmt, tile=TILES[0])
    assert not out[2].isfinite().any()
    good = torch.arange(6) != 2
    assert torch.equal(out[good], wanted[good])


def test_no_tokens():
    weight, x, _ = given(Case(SiteFormat(5, 40, (Segment(5, 4),)), 0, F16, None, 1))
    assert launch.int8_linear(x, **operands(weight), bias=None, fmt=weight.fmt).shape == (0, 5)


def test_refuses_what_it_would_misread():
    weight, x, _ = given(Case(SiteFormat(5, 40, (Segment(5, 4),)), 6, F32, None, 1))
    with pytest.raises(InputError, match=r"\[tokens, 40\]"):
        launch.int8_linear(x[:, 1:], **operands(weight), bias=None, fmt=weight.fmt)


def test_more_token_tiles_than_a_strip_holds():
    weight, x, _ = given(Case(SiteFormat(66, 33, MIXED), 200, F32, None, 1))
    got = launch.int8_linear(x, **operands(weight), bias=None, fmt=weight.fmt, tile=kernels.Int8Tile(16, 16, 4, 1))
    assert torch.equal(got, int8.mixed_linear(x, weight, None))
