"""How well predicted losses rank plans: rank correlation with measured KL over hundreds of plans, good and bad.

    python benchmarks/correlation.py MODEL --calibration calib_c4.txt calib_wikipedia.txt \
        --text wikitext2_raw_test.txt --out benchmarks/correlation_h100.json

Rows of a GPTQ run do not depend on each other, so six runs, one per width, hold every mix of row widths exactly: a plan
is judged by picking rows from six dequantized copies.  Original and copies run in fp32, so that the loss of a single
site is not lost in the rounding of activations.  Channels are scaled once, before rows are priced; nothing is reordered.

    plans     at every budget: joint, uniform, widths drawn for rows and for sites, ``joint`` with some of its widths
              shuffled among rows that cost as much, and bought at prices with noise on every row or every site
    singles   one site, or all sites of a kind or a layer, at ``--width`` bits and everything else as it was
    checks    ``joint``, and bought at losses corrected by what singles measured, per site and per kind of site, judged
              on ``--check`` windows that come after those that singles were measured on

``summary`` has Spearman's and Kendall's coefficients over all plans, at one budget and by kind of plan, the slope of
log KL over log prediction, and the ratio measured / predicted by kind of site.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from common import Judge, Results, Setting, parser
from scipy.stats import kendalltau, spearmanr

from mixcomp.budget import row_bits
from mixcomp.config import Budget
from mixcomp.evaluate import evaluate
from mixcomp.format import WIDTHS
from mixcomp.packed import PackedWeight
from mixcomp.passes import AnnotateSalience, AssignPrecision, QuantizeWeights, ReorderFeatures, ScaleChannels
from mixcomp.passes.allocate import Offers
from mixcomp.passes.coupling import analyse, needs_index
from mixcomp.passes.decision import Decision, Decisions
from mixcomp.program import Fact, Program, Site

NOISE = (0.25, 1.0, 2.0, 4.0)
#: a KL near the rounding of fp32 is no reason to starve a site
MOST_CORRECTION = 8.0
SHARES = (0.03, 0.1, 0.3, 1.0)


@dataclass(slots=True, eq=False)
class Shop:
    """All rows of all open sites, one after another: ``losses`` and ``bits`` fp64[rows, widths]; a plan is int64[rows],
    the place of every row's width in ``WIDTHS``."""

    sites: tuple[Site, ...]
    index: Mapping[str, bool]
    losses: torch.Tensor
    bits: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, program: Program) -> Shop:
        sites, index = program.open_sites(), needs_index(program.sites, analyse(program))
        losses = torch.cat([program.tensor(s.name, "salience").double().cpu() for s in sites])
        costs = torch.tensor([[row_bits(s.rows, s.columns, w, index[s.name]) for w in WIDTHS] for s in sites])
        rows = torch.tensor([s.rows for s in sites])
        columns = torch.tensor([s.columns for s in sites]).repeat_interleave(rows)
        return cls(sites, index, losses, costs.double().repeat_interleave(rows, 0), columns)

    @property
    def weights(self) -> int:
        return sum(s.rows * s.columns for s in self.sites)

    def split(self, plan: torch.Tensor) -> dict[str, torch.Tensor]:
        return {s.name: own for s, own in zip(self.sites, plan.split([s.rows for s in self.sites]), strict=True)}

    def by_site(self, values: torch.Tensor) -> torch.Tensor:
        """One value a site -> one a row."""
        return values.repeat_interleave(torch.tensor([s.rows for s in self.sites]), 0)

    def predicted(self, plan: torch.Tensor) -> float:
        return float(self.losses.gather(1, plan[:, None]).sum())

    def bits_per_weight(self, plan: torch.Tensor) -> float:
        widths = {n: torch.tensor(WIDTHS, dtype=torch.uint8)[own] for n, own in self.split(plan).items()}
        bits = sum(Decision(widths[s.name]).layout(s, self.index[s.name]).stored_bits() for s in self.sites)
        return bits / self.weights

    def bought(self, budget: float, factor: torch.Tensor | float = 1.0) -> torch.Tensor:
        """What one price buys at losses times fp64[rows, 1]."""
        return Offers.of(self.losses * factor, self.bits).buy(int(budget * self.weights)).choice

    def repaired(self, plan: torch.Tensor, budget: float, draw: torch.Generator) -> torch.Tensor:
        """Rows drawn at random take the next width until the budget is met to a row or so."""
        plan = plan.clone()
        for _ in range(8):
            used = self.bits.gather(1, plan[:, None])[:, 0]
            gap = budget * self.weights - float(used.sum())
            to = (plan + (1 if gap > 0 else -1)).clamp(0, len(WIDTHS) - 1)
            change = (self.bits.gather(1, to[:, None])[:, 0] - used).abs()
            order = torch.randperm(len(plan), generator=draw)
            order = order[change[order] > 0]
            take = order[: int((change[order].cumsum(0) <= abs(gap)).sum())]
            if not len(take):
                break
            plan[take] = to[take]
        return plan

    def drawn(self, budget: float, draw: torch.Generator, *, by_site: bool) -> torch.Tensor:
        """Widths of a random subset, cheap and dear ones so tilted that they cost the budget on average."""
        costs = self.bits.sum(0) / self.weights
        while True:
            kept = torch.rand(len(WIDTHS), generator=draw) < 0.6
            if int(kept.sum()) > 1 and float(costs[kept].min()) < budget < float(costs[kept].max()):
                break
        low, high = -50.0, 50.0
        for _ in range(60):
            tilt = (low + high) / 2
            share = torch.where(kept, tilt * costs, -torch.inf).softmax(0)
            low, high = (tilt, high) if float(share @ costs) < budget else (low, tilt)
        count = len(self.sites) if by_site else len(self.losses)
        plan = torch.multinomial(share, count, replacement=True, generator=draw)
        return self.repaired(self.by_site(plan) if by_site else plan, budget, draw)

    def shuffled(self, plan: torch.Tensor, share: float, draw: torch.Generator) -> torch.Tensor:
        """``share`` of the rows of each number of columns exchange their widths, so codes and scales cost the same."""
        plan = plan.clone()
        for columns in self.columns.unique().tolist():
            own = (self.columns == columns).nonzero()[:, 0]
            own = own[torch.rand(len(own), generator=draw) < share]
            plan[own] = plan[own[torch.randperm(len(own), generator=draw)]]
        return plan

    def noise(self, size: float, draw: torch.Generator, *, by_site: bool) -> torch.Tensor:
        """Log-normal factors fp64[rows, 1] on losses."""
        count = len(self.sites) if by_site else len(self.losses)
        values = (size * torch.randn(count, 1, generator=draw, dtype=torch.float64)).exp()
        return self.by_site(values) if by_site else values


def plans(
    shop: Shop, uniform: torch.Tensor, budget: float, count: int, draw: Callable[[str], torch.Generator]
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """(name, plan) at one budget; ``count`` of every random kind."""
    yield "joint", partial(shop.bought, budget)
    yield "uniform", lambda: uniform
    for i in range(count):
        size, share = NOISE[i % len(NOISE)], SHARES[i % len(SHARES)]
        yield f"rows drawn {i}", partial(lambda own: shop.drawn(budget, own, by_site=False), draw(f"rows {i}"))
        yield f"sites drawn {i}", partial(lambda own: shop.drawn(budget, own, by_site=True), draw(f"sites {i}"))
        yield (
            f"shuffled {share} {i}",
            partial(lambda own, share: shop.shuffled(shop.bought(budget), share, own), draw(f"shuffle {i}"), share),
        )
        for by_site in (False, True):
            yield (
                f"noise on {'sites' if by_site else 'rows'} {size} {i}",
                partial(
                    lambda own, size, by_site: shop.bought(budget, shop.noise(size, own, by_site=by_site)),
                    draw(f"noise {by_site} {i}"), size, by_site,
                ),
            )  # fmt: skip


@dataclass(slots=True, eq=False)
class Bench:
    """Six dequantized copies of every site, fp32[widths, rows, columns], and a model to put their rows into."""

    shop: Shop
    judge: Judge
    copies: dict[str, torch.Tensor]
    held: torch.Tensor
    check: torch.Tensor

    @classmethod
    def of(cls, setting: Setting, priced: Program, held: int, check: int) -> Bench:
        (text,) = list(setting.judge.windows.values())[:1]
        if len(text) < held + check:
            raise SystemExit(f"the text has {len(text)} windows, --held and --check take {held + check}")
        exact = copy.deepcopy(setting.model).float()
        copies: dict[str, list[torch.Tensor]] = {}
        for width in WIDTHS:
            made = _at_width(setting, priced, width)
            for s in made.open_sites():
                stored = {name: made.tensor(s.name, name) for name in s.layout.tensors()}
                copies.setdefault(s.name, []).append(PackedWeight.from_tensors(s.layout, stored).dequantize())
        stacked = {name: torch.stack(parts) for name, parts in copies.items()}
        judge = Judge(exact, _scaled(exact, priced, setting.context.device), {})
        return cls(Shop.of(priced), judge, stacked, text[:held], text[held : held + check])

    def kl(self, plan: Mapping[str, torch.Tensor], windows: torch.Tensor) -> float:
        """KL of a plan for some sites, the others as they were."""
        device = next(iter(self.copies.values())).device
        weights = {n: self.copies[n][o.to(device), torch.arange(len(o), device=device)] for n, o in plan.items()}
        self.judge.install(self.shop.sites, weights)
        return float(evaluate(self.judge.student, windows, self.judge.original).kl or 0.0)

    def row(self, plan: Callable[[], torch.Tensor]) -> dict[str, float]:
        made = plan()
        return {
            "stored_bits_per_weight": self.shop.bits_per_weight(made),
            "predicted": self.shop.predicted(made),
            "kl": self.kl(self.shop.split(made), self.held),
        }

    def single(self, names: set[str], option: int) -> dict[str, float]:
        sites = [s for s in self.shop.sites if s.name in names]
        plan = {s.name: torch.full((s.rows,), option) for s in sites}
        losses = self.shop.split(self.shop.losses[:, option])
        predicted = sum(float(losses[name].sum()) for name in names)
        return {"sites": len(names), "predicted": predicted, "kl": self.kl(plan, self.held)}

    def checked(self, budget: float, factor: torch.Tensor | float) -> dict[str, float]:
        made = self.shop.bought(budget, factor)
        return {
            "stored_bits_per_weight": self.shop.bits_per_weight(made),
            "predicted": self.shop.predicted(made),
            "kl": self.kl(self.shop.split(made), self.check),
        }


def _scaled(exact: Any, priced: Program, device: torch.device) -> Any:
    """The same function as ``exact``, in the channels that rows were priced in."""
    judge = Judge(exact, exact, {})
    weights = {s.name: priced.scaled_weight(s, device) for s in priced.open_sites()}
    judge.install(priced.open_sites(), weights, priced.norms())
    return judge.student


def _at_width(setting: Setting, program: Program, width: int) -> Program:
    """All sites quantized to one width; the rows stay where they are."""
    return _quantized(
        setting, program, {s.name: torch.full((s.rows,), width, dtype=torch.uint8) for s in program.open_sites()}
    )


def _quantized(setting: Setting, program: Program, widths: Mapping[str, torch.Tensor]) -> Program:
    """Sites quantized to widths uint8[rows], whatever they take."""
    made = {name: Decision(own) for name, own in widths.items()}
    index = needs_index(program.sites, analyse(program))
    decided = Decisions(made, ceiling=1 << 60).write(program, index, "stored")
    decided = replace(decided, facts=decided.facts | {Fact.ASSIGNED})
    return setting.run(decided, ReorderFeatures(), QuantizeWeights())


def kind_of(site: str) -> str:
    """``q_proj`` of ``model.layers.0.self_attn.q_proj``."""
    return site.rpartition(".")[2]


def groups_of(sites: tuple[Site, ...]) -> dict[str, set[str]]:
    """What singles quantize: every site, all of a kind, all of a layer, everything."""
    out = {f"site {s.name}": {s.name} for s in sites}
    for s in sites:
        out.setdefault(f"kind {kind_of(s.name)}", set()).add(s.name)
        layer = re.search(r"\.(\d+)\.", s.name)
        out.setdefault(f"layer {layer[1] if layer else 'none'}", set()).add(s.name)
    return out | {"everything": {s.name for s in sites}}


def corrections(shop: Shop, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor | float]:
    """Factors fp64[rows, 1] on losses that make predictions of singles right, within ``MOST_CORRECTION`` either way."""
    singles = [row for row in rows if "single" in row and row["predicted"] > 0]
    ratio = {row["single"]: row["kl"] / row["predicted"] for row in singles}
    ratio = {name: min(max(found, 1 / MOST_CORRECTION), MOST_CORRECTION) for name, found in ratio.items()}
    out: dict[str, torch.Tensor | float] = {"joint": 1.0}
    for name, key in (("by site", lambda s: f"site {s.name}"), ("by kind", lambda s: f"kind {kind_of(s.name)}")):
        if all(key(s) in ratio for s in shop.sites):
            factors = torch.tensor([[ratio[key(s)]] for s in shop.sites], dtype=torch.float64)
            out[f"corrected {name}"] = shop.by_site(factors)
    return out


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = [row for row in rows if "plan" in row]
    kinds = sorted({re.sub(r"[ .\d]+$", "", row["plan"]) for row in found})
    budgets = sorted({row["budget"] for row in found})
    out: dict[str, Any] = {"all plans": _agreement(found)}
    out["by budget"] = {b: _agreement([row for row in found if row["budget"] == b]) for b in budgets}
    out["by kind of plan"] = {k: _agreement([row for row in found if row["plan"].startswith(k)]) for k in kinds}
    singles = [row for row in rows if row.get("single", "").startswith("site ")]
    ratios: dict[str, list[float]] = {}
    for row in singles:
        ratios.setdefault(kind_of(row["single"]), []).append(row["kl"] / row["predicted"])
    out["measured / predicted of single sites"] = {
        kind: dict(zip(("least", "median", "most"), np.quantile(own, (0, 0.5, 1)).tolist(), strict=True))
        for kind, own in ratios.items()
    }
    out["single sites"] = _agreement(singles)
    whole = next((row for row in rows if row.get("single") == "everything"), None)
    if whole and singles:
        out["everything at once / sum of single sites"] = whole["kl"] / sum(row["kl"] for row in singles)
    return out


def _agreement(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Rank correlations, the slope of log measured over log predicted, and the ratio's quartiles."""
    predicted, measured = (np.array([row[what] for row in rows]) for what in ("predicted", "kl"))
    use = (predicted > 0) & (measured > 0)
    predicted, measured = predicted[use], measured[use]
    if len(predicted) < 3:
        return {"count": len(predicted)}
    lower, median, upper = np.quantile(measured / predicted, (0.25, 0.5, 0.75)).tolist()
    return {
        "count": len(predicted),
        "spearman": float(spearmanr(predicted, measured).statistic),
        "kendall": float(kendalltau(predicted, measured).statistic),
        "slope": float(np.polyfit(np.log(predicted), np.log(measured), 1)[0]),
        "ratio_lower_quartile": lower,
        "ratio_median": median,
        "ratio_upper_quartile": upper,
    }


def main(given: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--budgets", type=float, nargs="+", default=[2.6, 3.0, 3.35, 3.9, 4.4, 5.0])
    made.add_argument("--each", type=int, default=8, help="plans of each of the five random kinds at a budget")
    made.add_argument("--held", type=int, default=8, help="windows that everything is measured on")
    made.add_argument("--check", type=int, default=24, help="windows after them, for checks")
    made.add_argument("--width", type=int, default=3, choices=WIDTHS, help="of singles")
    arguments = made.parse_args(given)
    results = Results(arguments, "python benchmarks/correlation.py", held=arguments.held, width=arguments.width)
    setting = Setting.start(arguments)
    priced = setting.run(setting.program, ScaleChannels(), AnnotateSalience())
    bench = Bench.of(setting, priced, arguments.held, arguments.check)
    for budget in arguments.budgets:
        even = Decisions.read(setting.run(priced, AssignPrecision(Budget(budget), (), "uniform")))
        widths = torch.cat([even.sites[s.name].widths for s in bench.shop.sites])
        uniform = torch.searchsorted(torch.tensor(WIDTHS, dtype=torch.uint8), widths)
        draw = partial(lambda budget, what: setting.context.generator("correlation", f"{budget} {what}"), budget)
        for name, plan in plans(bench.shop, uniform, budget, arguments.each, draw):
            results.make({"plan": name, "budget": budget}, partial(bench.row, plan))
    for name, names in groups_of(bench.shop.sites).items():
        results.make({"single": name}, partial(bench.single, names, WIDTHS.index(arguments.width)))
    for budget in arguments.budgets:
        for name, factor in corrections(bench.shop, results.rows).items():
            results.make({"check": name, "budget": budget}, partial(bench.checked, budget, factor))
    results.head["summary"] = summary(results.rows)
    results.write()
    results.finish()


if __name__ == "__main__":
    main()
