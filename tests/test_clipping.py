"""A weight with tunable clipping starts as the stored one, gives the gradients of its formula, is stored as it was used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import decisions
from mixcomp import manager
from mixcomp.config import Budget
from mixcomp.format import Scales
from mixcomp.lowering.lower import packed_weight
from mixcomp.packed import check_values, pack_codes, pack_zeros
from mixcomp.passes import CollectStatistics, QuantizeWeights, ReorderFeatures, clipping
from mixcomp.passes.assign_blocks import AssignBlocks
from mixcomp.passes.clipping import Clipped
from mixcomp.passes.descent import descend
from mixcomp.passes.keep_samples import KeepSamples
from mixcomp.program import Program, Site
from programs import Blueprint, Kind, Layer, build, context
from test_tunable import natural

CPU = torch.device("cpu")
MODEL = Blueprint((Layer(Kind.GATED, 96), Layer(Kind.PLAIN, 66, bias=True)), width=150)
UP, DOWN = "layers.0.up", "layers.0.down"


@pytest.fixture(scope="module")
def slim() -> Program:
    """Blocks of 1, 2 and 3 bits, the last one short; ``up`` and ``gate`` have other rows too, which ``down`` follows."""
    program = build(MODEL)
    with torch.no_grad():
        program.graph_module.get_parameter("embed.weight")[:, 64:130].mul_(30)
    steps = (CollectStatistics(), KeepSamples(), AssignBlocks(Budget(2, count="payload"), group=32))
    program = manager.run(program, steps, context(MODEL))
    widths = {f"{name}/widths": program.tensor(name, "widths").clone() for name in (UP, "layers.0.gate")}
    for table in widths.values():
        table[::2] = torch.tensor([8, 3, 3, 2, 4], dtype=torch.uint8)
    program = ReorderFeatures(min_segment_rows=1).run(program.with_tensors(widths), context(MODEL))
    return QuantizeWeights().run(program, context(MODEL))


@pytest.fixture(params=[UP, DOWN, "layers.1.proj", decisions.PROJ + " by hand"])
def case(request: pytest.FixtureRequest, slim: Program) -> tuple[Program, Site]:
    """Absorbed rows, permuted columns, one profile and a bias; and random codes, scattered, with a side branch."""
    name, _, by_hand = request.param.partition(" ")
    program = decisions.mixed() if by_hand else slim
    return program, program.site(name)


def pushed(one: Clipped, site: Site, rate: float = 0.2, steps: int = 12) -> None:
    """Some steps towards a random weight."""
    target = one.weight().detach().float() * 0.8
    target += torch.randn(site.rows, site.columns, generator=torch.Generator().manual_seed(1)) * target.std() / 4
    picks = [torch.arange(1)] * steps
    descend([one], {"upper": rate, "lower": rate}, picks, lambda _: (one.weight() - target).square().mean().backward())


def starts_as_stored(program: Program, site: Site, anew: bool = True) -> None:
    one = Clipped.of(program, site, CPU, anew=anew)
    assert torch.equal(one.weight(), natural(program, site))
    for key, tensor in one.stored().items():
        assert torch.equal(tensor, program.tensor(site.name, key)), key


def stored_is_what_was_used(program: Program, site: Site, anew: bool = True) -> None:
    one = Clipped.of(program, site, CPU, anew=anew)
    pushed(one, site)
    changed = program.with_tensors({f"{site.name}/{key}": value for key, value in one.stored().items()})
    assert not torch.equal(changed.tensor(site.name, "factors"), program.tensor(site.name, "factors"))
    assert torch.equal(one.weight(), natural(changed, site))
    check_values(packed_weight(changed, site))
    assert packed_weight(changed, site).stored_bits() == site.layout.stored_bits()


@pytest.mark.parametrize("anew", [False, True])
def test_it_starts_as_what_is_stored(case: tuple[Program, Site], anew: bool) -> None:
    starts_as_stored(*case, anew)


@pytest.mark.parametrize("anew", [False, True])
def test_what_is_stored_is_what_was_used(case: tuple[Program, Site], anew: bool) -> None:
    stored_is_what_was_used(*case, anew)


def test_codes_and_zeros_stay_unless_they_are_rounded_anew(case: tuple[Program, Site]) -> None:
    program, site = case
    for anew in (False, True):
        one = Clipped.of(program, site, CPU, anew=anew)
        pushed(one, site)
        found = one.stored()
        same = [torch.equal(found[key], program.tensor(site.name, key)) for key in ("codes", "zeros") if key in found]
        assert all(same) is not anew


def test_the_cases_hold_every_kind_of_group(slim: Program) -> None:
    assert slim.find(DOWN, "column_order") is not None
    assert slim.find(UP, "absorbed") is not None
    assert {int(w) for w in slim.tensor(UP, "widths").unique()} == {1, 2, 3, 4, 8}
    assert all(s.layout.scales is Scales.FLOAT_GROUP for s in slim.open_sites())


def by_hand(one: Clipped, anew: bool, upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """The weight in stored order, fp64, without a rounding or a clamp: what they did is added as a constant."""
    widths, shift = one.widths[..., None], one.shift.double()[..., None]
    ones, symmetric, top = widths == 1, widths == 8, torch.exp2(widths.double()) - 1
    high = (one.high.double() * (upper.sigmoid() + 0.5))[..., None]
    low = (one.low.double() * (lower.sigmoid() + 0.5))[..., None]
    exact = (high + low) / torch.where(symmetric, 127.0, top)
    factor = exact + (exact.half().double() - exact).detach()
    if not anew:
        return shift + one.level.double() * factor
    assert one.place is not None
    x, zero = one.place.double(), (low / factor).detach().round()
    fixed = zero.clamp(min=0).minimum(top)
    zero = torch.where(zero == fixed, low / factor + (zero - low / factor).detach(), fixed)
    zero = torch.where(symmetric, 128.0, zero)
    level = (x / factor).detach().round()
    rest = level - (x / factor).detach()
    outside = torch.where(level + zero < 0, -zero * factor, (top - zero) * factor)
    inside = (level + zero >= 0) & (level + zero <= top)
    asked = torch.where(inside, x + factor * rest, outside)
    return torch.where(ones, shift + torch.where(x >= shift, factor, -factor), asked)


def gradients_are_those_of_the_formula(program: Program, site: Site, anew: bool = True) -> None:
    one = Clipped.of(program, site, CPU, anew=anew)
    pushed(one, site, steps=3)
    push = torch.randn(site.rows, site.columns, generator=torch.Generator().manual_seed(0))
    for tensor in one.learned().values():
        tensor.requires_grad_()
    got = torch.autograd.grad((one.weight() * push).sum(), list(one.learned().values()))
    leaves = [tensor.detach().double().requires_grad_() for tensor in one.learned().values()]
    weight = by_hand(one, anew, *leaves).flatten(1)[:, : site.columns]
    weight = weight if one.rows is None else weight[one.rows]
    weight = weight if one.columns is None else weight[:, one.columns]
    side = 0.0 if one.branch is None else (one.branch if one.rows is None else one.branch[one.rows])
    torch.testing.assert_close(one.weight().double(), weight + side, rtol=1e-5, atol=1e-7)
    for mine, theirs in zip(got, torch.autograd.grad((weight * push).sum(), leaves), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().mean()) + 1e-9)


@pytest.mark.parametrize("anew", [False, True])
def test_gradients_pass_straight_through(case: tuple[Program, Site], anew: bool) -> None:
    gradients_are_those_of_the_formula(*case, anew)


def test_a_bit_keeps_its_middle_and_learns_its_reach(slim: Program) -> None:
    one = Clipped.of(slim, slim.site(UP), CPU, anew=True)
    ones = one.widths == 1
    assert ones.any()
    torch.testing.assert_close(one.high[ones], slim.tensor(UP, "factors").float()[ones])
    before = dict(one.stored())
    one.upper[ones] = 1.0
    after = one.stored()
    ratio = after["factors"].float() / before["factors"].float()
    torch.testing.assert_close(ratio[ones], torch.full_like(ratio[ones], 1.0).sigmoid() + 0.5, rtol=1e-3, atol=0)
    assert torch.equal(ratio[~ones], torch.ones_like(ratio[~ones]))
    assert "offsets" not in after
    assert torch.equal(before["codes"], after["codes"])  # a sign is a sign


BUGS: dict[str, tuple[str, Callable[..., torch.Tensor], Callable[[Program, Site], None]]] = {
    "the factor is not rounded": ("_stored", lambda factor: factor, stored_is_what_was_used),
    "roundings stop gradients": ("_straight", lambda exact, used: used, gradients_are_those_of_the_formula),
    "zeros in another order": ("pack_zeros", lambda zeros, fmt: pack_zeros(zeros.flip(0), fmt), starts_as_stored),
    "codes as they lie": ("pack_codes", lambda codes, fmt, index: pack_codes(codes, fmt), stored_is_what_was_used),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_oracles_bite(bug: str, slim: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, oracle = BUGS[bug]
    oracle(slim, slim.site(UP))
    monkeypatch.setattr(clipping, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        oracle(slim, slim.site(UP))
