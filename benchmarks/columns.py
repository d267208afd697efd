"""Column profiles inside ``joint``: rows may have two widths along their columns, the hot groups of the site wide.

The loss of a mix is the sum of what GPTQ loses in each group of columns at that group's width: an estimate, since the
error that a group hands on depends on its width only through its size.  What a plan really costs is measured after
quantizing at the mix (``second_order_loss``, KL).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from common import Setting
from variants import AssignMenus, Form, Menu, Menus, Pinned, Priced, price

from mixcomp.config import Budget
from mixcomp.format import WIDTHS
from mixcomp.passes import ReorderFeatures
from mixcomp.passes.coupling import analyse, needs_index, taken
from mixcomp.passes.decision import Decisions
from mixcomp.program import Program, Site

#: (narrow, wide)
PAIRS = ((2, 3), (2, 4), (3, 4), (3, 5), (4, 5), (4, 6), (5, 6))
#: of the groups that are wide
SHARES = (0.125, 0.25, 0.5, 0.75)


def profiles(losses: torch.Tensor) -> torch.Tensor:
    """Profiles worth offering: uint8[profiles, groups] from fp32[rows, groups, widths].

    For every pair of widths groups are ranked by what the wide one saves over all rows.  A short last group counts like
    any other, which is only the ranking's concern: bits are counted exactly.
    """
    total, out = losses.sum(0, dtype=torch.float64), []
    for (narrow, wide), share in product(PAIRS, SHARES):
        saved = total[:, WIDTHS.index(narrow)] - total[:, WIDTHS.index(wide)]
        hot = torch.argsort(saved, descending=True, stable=True)[: max(1, round(share * len(saved)))]
        out.append(torch.full((len(saved),), narrow, dtype=torch.uint8).index_fill(0, hot, wide))
    return torch.stack(out)


def column_menus(program: Program, priced: Priced, *, whole: bool, names: Iterable[str] | None = None) -> Menus:
    """One menu per site: the plain widths and the profiles, for single rows or for the site as a whole."""
    index, out = needs_index(program.sites, analyse(program)), Menus()
    wanted = {s.name for s in program.open_sites()} if names is None else set(names)
    for site in (s for s in program.open_sites() if s.name in wanted):
        losses = priced.losses[site.name]
        losses = losses if losses.dim() == 3 else losses[:, None]  # one group of columns is the whole row
        out[site.name] = [_menu(site, losses, index[site.name], whole)]
    return out


def _menu(site: Site, losses: torch.Tensor, index: bool, whole: bool) -> Menu:
    groups = losses.shape[1]
    plain = torch.tensor(WIDTHS, dtype=torch.uint8)[:, None].expand(-1, groups)
    widths = torch.cat((plain, profiles(losses))) if groups > 1 else plain
    option = torch.searchsorted(torch.tensor(WIDTHS, dtype=torch.uint8), widths.contiguous())
    # [rows, choices] one choice after another: all at once would be rows x groups x choices
    summed = [losses.gather(2, own[None, :, None].expand(len(losses), -1, 1)).sum((1, 2)) for own in option]
    return Menu.of(site, Form(), widths.contiguous(), torch.stack(summed, 1), index, whole)


def assign_columns(
    setting: Setting, program: Program, priced: Priced, budget: float, *, whole: bool = False
) -> Program:
    """A plan with profiles.

    Groups form in the order that an absorbed permutation gives the columns (down's, by the rows of gate and up), so the
    producers of such orders are settled first, and everything else is bought anew with the consumers priced in it.
    """
    menus = column_menus(program, priced, whole=whole)
    first = setting.run(program, AssignMenus(Budget(budget), (), menus))
    settled = {name for absorption in taken(analyse(program)) for name in absorption.producers}
    moved = setting.run(first, ReorderFeatures())
    names = [s.name for s in moved.open_sites() if moved.find(s.name, "column_order") is not None]
    if not names:
        return first
    again = price(moved, setting.context, by_group=True, names=names)
    menus = Menus({**menus, **column_menus(program, again, whole=whole, names=names)})
    made = Decisions.read(first).sites
    pinned = Pinned({name: made[name] for name in settled})
    second = setting.run(program, AssignMenus(Budget(budget), (), menus, pinned=pinned))
    lost = sum(_loss(menus[name][0], made[name].widths) for name in settled)
    return second.with_tensors({"budget/loss": second.tensors["budget/loss"] + lost})


def _loss(menu: Menu, widths: torch.Tensor) -> float:
    """Predicted loss of a decided site."""
    by_group = widths if widths.dim() == 2 else widths[:, None].expand(-1, menu.widths.shape[1])
    choice = (by_group[:, None] == menu.widths[None]).all(2).byte().argmax(1)
    picked = choice[:1] if len(menu.losses) == 1 else choice
    return float(menu.losses.gather(1, picked[:, None]).sum())
