"""Variants of ``joint`` that the product does not offer: other stored forms, other units, rounding without feedback.

``price`` is annotate-salience for any form of scales; ``AssignMenus`` buys from menus: a site has one menu for every
form it may be stored in, a unit (a row, or the site as a whole) takes one choice of its site's menu, everything at one
price of a bit.  With the default form alone this is ``AssignPrecision``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch

from mixcomp.errors import BudgetError
from mixcomp.float_grid import FloatGrid, fit_float
from mixcomp.format import GROUP, WIDTHS, Scales, Segment, SiteFormat
from mixcomp.passes.allocate import Offers
from mixcomp.passes.coupling import analyse, needs_index
from mixcomp.passes.decision import Assignment, Decision, Decisions
from mixcomp.passes.directions import branch_bits, error_spectrum, rank_by_price
from mixcomp.passes.gptq import Feedback, Task, feedback, gptq
from mixcomp.passes.stacks import Stack, batches, stack
from mixcomp.profiles import site_format
from mixcomp.program import Program, Site
from mixcomp.protocol import Context
from mixcomp.quant import Grid, concatenate, dequantize, fit_grid, round_nearest

#: times that bits counted too high are spent again
ROUNDS = 6
#: share of a budget that may stay unspent
NEAR_ENOUGH = 1e-6
#: the width whose error tells what a side branch could take away, as in annotate-salience
SPECTRUM = WIDTHS.index(3)


@dataclass(frozen=True, slots=True)
class Form:
    """Columns of a group and kind of its scales."""

    group: int = GROUP
    scales: Scales = Scales.TWO_LEVEL

    @property
    def label(self) -> str:
        return f"{self.scales.text} {self.group}"

    def fit(self, weight: torch.Tensor, energy: torch.Tensor, width: int, site: str) -> Grid | FloatGrid:
        if self.scales is Scales.TWO_LEVEL:
            return fit_grid(weight, energy, width, site, self.group)
        widths = torch.full((len(weight),), width, dtype=torch.uint8, device=weight.device)
        return fit_float(weight, energy, widths, site, self.group)

    def row_bits(self, site: Site, widths: torch.Tensor, index: bool) -> int:
        """Stored bits of a row at uint8[] or uint8[groups] widths; what its order of groups takes is not counted."""
        bits = _row_bits(self, site.columns, tuple(widths.flatten().tolist()))
        return bits + (8 * SiteFormat(site.rows, 1, (Segment(site.rows, 2),)).index_dtype.itemsize if index else 0)


@lru_cache(maxsize=4096)
def _row_bits(form: Form, columns: int, widths: tuple[int, ...]) -> int:
    many = len(widths) > 1
    given = torch.tensor(widths, dtype=torch.uint8)
    fmt = site_format(given[None] if many else given, columns, group=form.group, scales=form.scales)
    order = fmt.tensors().get("group_index")
    return fmt.stored_bits() - (8 * order[0].itemsize * fmt.groups if order else 0)


DEFAULT = Form()
FORMS = (DEFAULT, Form(64), Form(128), Form(64, Scales.FLOAT_GROUP), Form(128, Scales.FLOAT_GROUP))


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """What quantizing costs in one form, per site.

    ``losses`` fp32[rows, widths], with ``by_group`` fp32[rows, groups of 32, widths]: nats a token; ``spectra``, where
    asked for, shares of the loss at 3 bits that directions of a side branch would remove.
    """

    form: Form
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    spectra: dict[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def price(
    program: Program,
    context: Context,
    form: Form = DEFAULT,
    *,
    error_feedback: bool = True,
    by_group: bool = False,
    directions: int = 0,
    names: Iterable[str] | None = None,
) -> Priced:
    """Price every row at every width with real errors, as ``AnnotateSalience`` does for the default form.

    Args:
        program: with statistics; its column orders are obeyed.
        context: of the passes.
        form: how scales are stored.
        error_feedback: GPTQ; otherwise every weight is rounded to its nearest level.
        by_group: losses of every group of 32 columns, in stored order of the columns; they add up to the row's.
        directions: most that are examined for a side branch of a site.
        names: sites to price; stacks that hold none of them are left out.
    """
    wanted = None if names is None else set(names)
    out = Priced(form)
    for batch in batches(program, context.device, len(WIDTHS)):
        chosen = [one for one in batch if wanted is None or wanted & {s.name for s in one[1]}]
        stacks = [stack(program, *one, context.device) for one in chosen]
        known = [feedback(rows.sigma, rows.sites[0].name) for rows in stacks]
        grids = [concatenate([_fit(rows, form, width) for width in WIDTHS]) for rows in stacks]
        tasks = [
            Task(s.weight.repeat(len(WIDTHS), 1), grid, own) for s, grid, own in zip(stacks, grids, known, strict=True)
        ]
        codes = [c for c, _ in gptq(tasks)] if error_feedback and tasks else []
        codes = codes or [round_nearest(task.weight, task.grid) for task in tasks]
        for rows, own, task, code in zip(stacks, known, tasks, codes, strict=True):
            error = task.weight - dequantize(code, task.grid)
            _book(program, context, out, rows, error, _losses(error, own, by_group), directions)
    return out


def _fit(rows: Stack, form: Form, width: int) -> Grid | FloatGrid:
    energy = rows.sigma.diagonal()
    parts = [form.fit(weight, energy, width, site.name) for site, weight in rows.split(rows.weight)]
    return concatenate(parts)


def _losses(error: torch.Tensor, known: Feedback, by_group: bool) -> torch.Tensor:
    """``E H E^T`` of every row, fp32[rows, 1] or, split among groups of columns, fp32[rows, groups].

    With ``H^-1 = U^T U`` and ``e U = E`` it is the sum of e^2; for GPTQ e is what its steps spread over later columns.
    """
    spread = torch.linalg.solve_triangular(known.factor, error[:, known.order], upper=True, left=False).square()
    if not by_group:
        return spread.sum(1, keepdim=True)
    back = torch.empty_like(spread)
    back[:, known.order] = spread
    return torch.nn.functional.pad(back, (0, -back.shape[1] % GROUP)).view(len(back), -1, GROUP).sum(-1)


def _book(
    program: Program, context: Context, out: Priced, rows: Stack, error: torch.Tensor, losses: torch.Tensor, most: int
) -> None:
    """Losses and spectra of the sites of a stack; ``error`` and ``losses`` hold a copy of its rows for every width."""
    by_width = torch.stack(losses.chunk(len(WIDTHS)), -1)  # [rows, parts, widths]
    for (site, part), (_, own) in zip(
        rows.split(by_width), rows.split(error.chunk(len(WIDTHS))[SPECTRUM]), strict=True
    ):
        gamma = program.gamma(site, context.device)
        part = part * gamma[:, None, None] / 2
        out.losses[site.name] = (part[:, 0] if part.shape[1] == 1 else part).cpu()
        if most:
            count, draw = min(most, site.rows - 1, site.columns - 1), context.generator("spectrum", site.name)
            out.spectra[site.name] = error_spectrum(own, rows.sigma, gamma, count, draw).shares.cpu()


@dataclass(frozen=True, slots=True, eq=False)
class Menu:
    """What the units of a site may be in one form.

    ``widths`` uint8[choices] or uint8[choices, groups]; ``losses`` fp64[units, choices]; ``bits`` fp64[choices], rising,
    of one unit.  A site of one unit is bought as a whole.
    """

    form: Form
    widths: torch.Tensor
    losses: torch.Tensor
    bits: torch.Tensor

    @classmethod
    def of(
        cls, site: Site, form: Form, widths: torch.Tensor, losses: torch.Tensor, index: bool, whole: bool = False
    ) -> Menu:
        """``losses`` [rows, choices]; with ``whole`` the site is one unit, which needs no row index."""
        bits = torch.tensor([form.row_bits(site, w, index and not whole) for w in widths], dtype=torch.float64)
        order = torch.argsort(bits, stable=True)
        bits, widths, losses = bits[order], widths[order], losses.double()[:, order]
        if whole:
            bits, losses = bits * site.rows, losses.sum(0, keepdim=True)
        return cls(form, widths, losses, bits)

    def decide(self, site: Site, choice: torch.Tensor, rank: int) -> Decision:
        """``choice`` int64[units]."""
        widths = self.widths[choice]
        widths = widths if len(choice) == site.rows else widths.repeat_interleave(site.rows, 0)
        if widths.dim() == 2 and bool((widths == widths[:, :1]).all()):
            widths = widths[:, 0].contiguous()
        return Decision(widths, rank, self.form.group, self.form.scales)


class Menus(dict[str, Sequence[Menu]]):
    """Site -> its menus; the short repr stands in a program's history."""

    def __repr__(self) -> str:
        return f"<menus of {len(self)} sites>"


class Pinned(dict[str, Decision]):
    """Site -> a decision that is not up for choice."""

    def __repr__(self) -> str:
        return f"<{len(self)} decisions>"


@dataclass(frozen=True)
class AssignMenus(Assignment):
    """Least predicted loss within the budget.

    The price of a bit is found by bisection, sites with several menus take the one that is best at that price, and then
    units are bought exactly, as ``allocate`` does; directions of side branches by the same price.  Bits are counted from
    the formats that come out, and what is left over is spent again.

    Options:
        budget, fixed: see ``Assignment``; no site can be fixed.
        menus: of every open site.
        spectra: "<site>" -> shares, for side branches; none without.
        pinned: sites that were decided before; their bits are taken off the budget first.
    """

    name: ClassVar[str] = "assign-precision"

    menus: Menus = field(default_factory=Menus)
    spectra: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    pinned: Pinned = field(default_factory=Pinned)

    def spec(self) -> str:
        return f"{self.name}{{budget={self.budget},menus={self.menus}}}"

    def span(self, site: Site, index: bool) -> tuple[int, int]:
        bits = [menu.bits * (site.rows if len(menu.losses) > 1 else 1) for menu in self.menus[site.name]]
        return int(min(b[0] for b in bits)), int(max(b[-1] for b in bits))

    def decide(
        self, program: Program, sites: tuple[Site, ...], index: Mapping[str, bool], room: int, context: Context
    ) -> Decisions:
        true = {name: one.layout(program.site(name), index[name]).stored_bits() for name, one in self.pinned.items()}
        free = [s for s in sites if s.name not in self.pinned]
        room -= sum(true.values()) + sum(self._branch(program, name, one) for name, one in self.pinned.items())
        chosen = _choose(self.menus, free, room)
        offers = _offers(chosen, free)
        best: tuple[float, dict[str, Decision], float, float] | None = None
        bought = offers.buy(room)
        ranks = self._ranks(chosen, free, bought.choice, bought.price)
        allowed = room - sum(ranks[s.name] * branch_bits(s.rows, s.columns) for s in free)
        target = allowed
        for _ in range(ROUNDS):
            bought = offers.buy(target)
            parts = _split(chosen, free, bought.choice)
            made = {s.name: chosen[s.name].decide(s, parts[s.name], ranks[s.name]) for s in free}
            used = sum(made[s.name].layout(s, index[s.name]).stored_bits() for s in free)
            if used <= allowed and (best is None or bought.loss < best[0]):
                best = (bought.loss, made, bought.price, bought.gap)
                if allowed - used <= NEAR_ENOUGH * allowed:
                    break
            # too dear: leave out what was bought last, which the part of the target that stood empty may have hidden
            target = (bought.bits if used > allowed else target) + allowed - used
        if best is None:
            raise BudgetError(f"budget {self.budget} is below what these menus and their orders take; raise it")
        loss, made, price_of_bit, gap = best
        return Decisions({**made, **self.pinned}, loss, price_of_bit, gap)

    def _ranks(
        self, chosen: Mapping[str, Menu], sites: Sequence[Site], choice: torch.Tensor, price_of_bit: float
    ) -> dict[str, int]:
        parts, out = _split(chosen, sites, choice), dict.fromkeys((s.name for s in sites), 0)
        for s in (s for s in sites if s.name in self.spectra):
            loss = float(chosen[s.name].losses.gather(1, parts[s.name][:, None]).sum())
            out[s.name] = rank_by_price(self.spectra[s.name], loss, price_of_bit, branch_bits(s.rows, s.columns))
        return out

    def _branch(self, program: Program, name: str, one: Decision) -> int:
        return one.rank * branch_bits(*program.site(name).weight.shape)


def _choose(menus: Menus, sites: Sequence[Site], room: int) -> dict[str, Menu]:
    """The menu of every site that is best at the price where the budget is spent."""
    if all(len(menus[s.name]) == 1 for s in sites):
        return {s.name: menus[s.name][0] for s in sites}
    low, high = 1e-18, 1.0
    for _ in range(50):
        middle = (low * high) ** 0.5
        used = sum(min(_at(menu, middle) for menu in menus[s.name])[1] for s in sites)
        low, high = (middle, high) if used > room else (low, middle)
    return {s.name: min(menus[s.name], key=lambda menu: _at(menu, high)) for s in sites}


def _at(menu: Menu, price_of_bit: float) -> tuple[float, float]:
    """(loss + price x bits, bits) of a menu whose units choose at a price."""
    best, choice = (menu.losses + price_of_bit * menu.bits).min(1)
    return float(best.sum()), float(menu.bits[choice].sum())


def _offers(chosen: Mapping[str, Menu], sites: Sequence[Site]) -> Offers:
    """All units of all sites; menus with fewer choices repeat their last one."""
    most = max(chosen[s.name].losses.shape[1] for s in sites)
    losses, bits = [], []
    for menu in (chosen[s.name] for s in sites):
        more = most - menu.losses.shape[1]
        losses.append(torch.cat((menu.losses, menu.losses[:, -1:].expand(-1, more)), 1))
        bits.append(torch.cat((menu.bits, menu.bits[-1:].expand(more))).expand(len(menu.losses), -1))
    return Offers.of(torch.cat(losses), torch.cat(bits))


def _split(chosen: Mapping[str, Menu], sites: Sequence[Site], choice: torch.Tensor) -> dict[str, torch.Tensor]:
    counts = [len(chosen[s.name].losses) for s in sites]
    parts = choice.split(counts)
    return {s.name: part.clamp_max(chosen[s.name].losses.shape[1] - 1) for s, part in zip(sites, parts, strict=True)}


def menus_of(program: Program, priced: Sequence[Priced], *, whole: bool = False) -> Menus:
    """A menu of plain widths for every open site and form."""
    index, out = needs_index(program.sites, analyse(program)), Menus()
    widths = torch.tensor(WIDTHS, dtype=torch.uint8)
    for s in program.open_sites():
        out[s.name] = [Menu.of(s, one.form, widths, one.losses[s.name], index[s.name], whole) for one in priced]
    return out
