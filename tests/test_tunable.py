"""A tunable weight starts as the stored one, moves where it is pushed, and is stored as it was used."""

from __future__ import annotations

import pytest
import torch

import decisions
from mixcomp.lowering.lower import packed_weight
from mixcomp.lowering.reference import dequantize
from mixcomp.passes.descent import descend
from mixcomp.passes.tunable import MARGIN, Tunable
from mixcomp.passes.tune_blocks import TuneBlocks
from mixcomp.program import Program, Site
from mixcomp.quant import group_columns

CPU = torch.device("cpu")
SITES = (decisions.UP, decisions.GATE, decisions.DOWN, decisions.PROJ, decisions.FLAT)


def natural(program: Program, site: Site) -> torch.Tensor:
    """The stored weight with rows and columns where the original has them, fp32[rows, columns]."""
    found = dequantize(packed_weight(program, site), torch.float32)
    rows, columns = program.find(site.name, "row_order"), program.find(site.name, "column_order")
    if rows is not None and not site.layout.scatter:
        found = torch.empty_like(found).index_copy_(0, rows, found)
    return found if columns is None else torch.empty_like(found).index_copy_(1, columns, found)


@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize("name", SITES)
def test_it_starts_as_what_is_stored(name: str, rounding: bool) -> None:
    program = decisions.decided()
    site = program.site(name)
    one = Tunable.of(program, site, CPU, rounding=rounding)
    torch.testing.assert_close(one.weight().detach(), natural(program, site), rtol=1e-6, atol=0)
    for key, tensor in one.stored().items():
        assert torch.equal(tensor, program.tensor(name, key)), key


@pytest.mark.parametrize("name", SITES)
def test_gradients_pass_straight_through(name: str) -> None:
    program = decisions.decided()
    one = Tunable.of(program, program.site(name), CPU, rounding=True)
    assert one.place is not None
    one.place.requires_grad_()
    push = torch.randn(one.weight().shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((one.weight() * push).sum(), one.place)
    # inside the grid d weight / d shift is the step: every element's own gradient comes back at its own place
    step = (one.unit * one.factor * one.group)[..., None].expand_as(one.place).flatten(1)[:, : one.fmt.columns]
    rows = slice(None) if one.rows is None else one.rows
    columns = slice(None) if one.columns is None else one.columns
    ratio = (gradient.flatten(1)[:, : one.fmt.columns] / step)[rows][:, columns] / push
    inside = ratio != 0
    torch.testing.assert_close(ratio[inside], torch.ones_like(ratio[inside]), rtol=1e-4, atol=0)


def test_codes_go_where_they_are_pushed_and_no_further() -> None:
    program = decisions.decided()
    one = Tunable.of(program, program.site(decisions.FLAT), CPU, rounding=True)
    before = one.weight().detach().clone()
    picks = [torch.arange(1)] * 30
    descend([one], {"place": 0.2, "ratio": 0.0, "group": 0.0}, picks, lambda _: (-one.weight().sum()).backward())
    assert not any(t.requires_grad for t in one.learned().values())
    assert (one.weight() >= before).all()
    assert (one.weight() > before).any()
    top = (one.top - one.offset) * (one.unit * one.factor * one.group)[..., None]
    assert (one.weight() <= top.amax()).all()


def test_what_is_stored_is_what_was_used() -> None:
    program = decisions.decided()
    site = program.site(decisions.PROJ)
    one = Tunable.of(program, site, CPU, rounding=True)
    target = torch.randn(site.rows, site.columns, generator=torch.Generator().manual_seed(1))
    rates, picks = {"place": 0.05, "ratio": 0.01, "group": 0.2}, [torch.arange(1)] * 20
    rates |= {"branch_a": 60.0, "branch_b": 0.3, "branch_ratio": 0.01}
    descend([one], rates, picks, lambda _: (one.weight() - target).square().mean().backward())
    assert one.branch is not None
    assert one.branch.a.abs().amax() > 127
    changed = program.with_tensors({f"{site.name}/{key}": value for key, value in one.stored().items()})
    for key in ("codes", "scales", "factors", "branch_a", "branch_b", "branch_scale"):
        assert not torch.equal(changed.tensor(site.name, key), program.tensor(site.name, key)), key
    assert changed.tensor(site.name, "branch_a").abs().amax() == 127
    torch.testing.assert_close(one.weight().detach(), natural(changed, site), rtol=1e-6, atol=1e-6)
    again = Tunable.of(changed, site, CPU, rounding=True)
    assert torch.equal(again.weight(), one.weight())


def test_what_no_rate_names_stays() -> None:
    program = decisions.decided()
    one = Tunable.of(program, program.site(decisions.PROJ), CPU, rounding=True)
    descend([one], TuneBlocks().rates(), [torch.arange(1)] * 9, lambda _: one.weight().square().sum().backward())
    stored = one.stored()
    assert not torch.equal(stored["factors"], program.tensor(decisions.PROJ, "factors"))
    for key in ("branch_a", "branch_b", "branch_scale"):
        assert torch.equal(stored[key], program.tensor(decisions.PROJ, key)), key


def test_a_moved_code_lies_at_the_edge_of_its_cell() -> None:
    program = decisions.decided()
    one = Tunable.of(program, program.site(decisions.FLAT), CPU, rounding=True)
    assert one.place is not None
    step = (one.unit * one.factor * one.group)[..., None]
    exact = group_columns(program.weight(program.site(decisions.FLAT))) / step + one.offset
    moved = one.place != exact
    assert moved.any()
    assert not moved.all()
    torch.testing.assert_close(
        (one.place - one.place.round()).abs()[moved], torch.full_like(exact, 0.5 - MARGIN)[moved]
    )
    assert ((one.place - exact).abs() <= (one.place.round() - exact).abs()).all()
