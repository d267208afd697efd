"""Whether other stored forms earn a place inside ``joint``: what they would gain at equal stored bits.

    python benchmarks/forms.py MODEL --calibration calib_c4.txt calib_wikipedia.txt --text wikitext2_raw_test.txt \
        --out benchmarks/forms_h100.json

Every row buys widths for single rows at one price, as ``joint`` does, and may besides choose, site by site at that price:

    joint             nothing (two-level scales in groups of 32)
    group per site    32, 64 or 128 columns in a group
    scales per site   two-level 32, float-group 64 or float-group 128
    form per site     any of the five
    columns by row    single rows may take one of 28 column profiles (two widths) of their site
    columns by site   every site is bought as a whole, plain or with a profile
    rank 8, rank 64   side branches of ranks up to that, by price

``predicted_loss`` is what the plan was chosen by (side branches not counted), ``predicted_with_branches`` takes off what
they are expected to remove, ``second_order_loss`` is the same sum for the weights that were really stored after GPTQ at
the mix, and the KL is measured.  A form earns its place if the last one says so: prices of the other two are the same
idea three times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from columns import assign_columns
from common import Results, Setting, parser
from variants import DEFAULT, FORMS, AssignMenus, Form, Priced, menus_of, price

from mixcomp.config import Budget
from mixcomp.format import WIDTHS
from mixcomp.passes.decision import Decisions
from mixcomp.program import Program

#: row -> forms a site may take
CHOICES: dict[str, tuple[Form, ...]] = {
    "joint": (DEFAULT,),
    "group per site": FORMS[:3],
    "scales per site": (DEFAULT, *FORMS[3:]),
    "form per site": FORMS,
}
#: row -> most directions of a side branch
RANKS = {"rank 8": 8, "rank 64": 64}
COLUMNS = {"columns by row": False, "columns by site": True}
ROWS = (*CHOICES, *COLUMNS, *RANKS)


class Bench:
    """Prices, each made when a row first needs them."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.table: Callable[..., Priced] = cache(partial(price, setting.program, setting.context))

    def plan(self, name: str, budget: float) -> tuple[Program, Mapping[str, torch.Tensor]]:
        """A plan, and the shares that its ranks were chosen by."""
        if name in COLUMNS:
            priced = self.table(by_group=True)
            return assign_columns(self.setting, self.setting.program, priced, budget, whole=COLUMNS[name]), {}
        spectra = self.table(directions=RANKS[name]).spectra if name in RANKS else {}
        menus = menus_of(self.setting.program, [self.table(form=form) for form in CHOICES.get(name, (DEFAULT,))])
        return self.setting.run(self.setting.program, AssignMenus(Budget(budget), (), menus, spectra)), spectra

    def row(self, name: str, budget: float) -> dict[str, Any]:
        self.setting.stages.clear()
        program, spectra = self.plan(name, budget)
        made = Decisions.read(program).sites
        removed = self._removed(program, spectra, self.table(form=DEFAULT).losses)
        found = self.setting.judged(self.setting.quantize(program))
        return {
            **found,
            "predicted_with_branches": found["predicted_loss"] - removed,
            "forms": dict(Counter(Form(one.group, one.scales).label for one in made.values())),
            "rows_with_profiles": sum(_profiled(one.widths) for one in made.values()),
            "rank": sum(one.rank for one in made.values()),
            "stages": dict(self.setting.stages),
        }

    def _removed(
        self, program: Program, spectra: Mapping[str, torch.Tensor], losses: Mapping[str, torch.Tensor]
    ) -> float:
        """What the planned branches are expected to take off, at each row's widest width in the default form."""
        total = 0.0
        for name, one in Decisions.read(program).sites.items():
            if one.rank:
                widest = one.widths if one.widths.dim() == 1 else one.widths.amax(1)
                option = torch.searchsorted(torch.tensor(WIDTHS, dtype=torch.uint8), widest.contiguous())
                total += float(spectra[name][: one.rank].sum() * losses[name].gather(1, option[:, None]).sum())
        return total


def _profiled(widths: torch.Tensor) -> int:
    return int((widths != widths[:, :1]).any(1).sum()) if widths.dim() == 2 else 0


def main(given: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--budgets", type=float, nargs="+", default=[4.4, 3.35, 2.6])
    made.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    arguments = made.parse_args(given)
    results = Results(arguments, "python benchmarks/forms.py")
    bench = Bench(Setting.start(arguments))
    for name in arguments.rows:
        for budget in arguments.budgets:
            results.make({"row": name, "budget": budget}, partial(bench.row, name, budget))
    results.finish()


if __name__ == "__main__":
    main()
