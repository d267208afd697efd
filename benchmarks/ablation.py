"""What every ingredient of ``joint`` is worth: KL with one of them removed, at equal stored bits.

    python benchmarks/ablation.py MODEL --calibration calib_c4.txt calib_wikipedia.txt --text wikitext2_raw_test.txt \
        --second books_eval.txt --budgets 4.4 3.35 --out benchmarks/ablation_h100.json

Rows are made one after another and written as they come; a run that is cut off goes on with the same command, and
``--rows`` picks some.  The model is captured and run over the calibration text once.  Every row meets the same ceiling;
``stored_bits_per_weight`` says how closely.  ``predicted_loss`` is the planner's, ``second_order_loss`` the same sum over
the weights that were stored.  ``--rows balanced best`` take minutes a budget, all
others seconds: give them a call of their own where calls are limited.

    joint                      widths per row, scaled channels, GPTQ, gamma, two-level scales in groups of 32 (effort fast)
    channels as they are       without scale-channels
    tokens count alike         second moments not weighted by gradients
    no coordinate descent      codes and group scales as GPTQ and the search left them
    one width per site         every site is bought as a whole
    side branches              *added*: ranks up to 8 by price, their bits taken from rows
    priced again               *added*: prices of the columns as reordered and scaled for the first plan, a second plan
    gamma: mean of site        output weights replaced by their mean over each site
    gamma: one constant        by their mean over the model
    two-level 64, ...          other forms of scales, priced and rounded in that form
    nearest rounding           the same grids, every weight to its nearest level, priced so
    columns by row / by site   column profiles added (benchmarks/columns.py)
    balanced, best             gradient stages on top of ``joint``, learned from the given text alone
    uniform, mixllm, ...       the baseline and the papers' strategies; ``slim balanced`` with tune-clipping
    mixllm float               as published: an fp16 scale for 128 columns, zeros below 8 bits
    mixllm float, 8 bits       ... and activations of 8 bits with such scales, as published too
    gate                       mixcomp.compile as it is, effort fast; the row says which strategy was taken
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from columns import assign_columns
from common import Results, Setting, parser
from variants import FORMS, AssignMenus, Form, Priced, menus_of, price

import mixcomp
from mixcomp.config import Budget
from mixcomp.lowering.module import MixedLinear
from mixcomp.passes import (
    AnnotateSalience,
    AssignPrecision,
    CollectStatistics,
    QuantizeWeights,
    ReorderFeatures,
    ScaleChannels,
    TuneBlocks,
    TuneClipping,
    TuneModel,
    refine,
)
from mixcomp.passes.directions import MAX_DIRECTIONS
from mixcomp.passes.strategies import passes_of
from mixcomp.program import Program

#: output weights of all sites, replaced
Gammas = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
#: forms besides the default
OTHER_FORMS = {form.label: form for form in FORMS[1:]}


@dataclass(slots=True, eq=False)
class Bench:
    """What rows share: prices are made once, plans of gradient stages start from each other."""

    setting: Setting
    priced: dict[str, Program] = field(default_factory=dict)
    tables: dict[str, Priced] = field(default_factory=dict)
    tuned: dict[tuple[str, float], Program] = field(default_factory=dict)

    def salience(self, name: str = "", gamma: Gammas = dict) -> Program:
        """The program priced by annotate-salience, with output weights replaced by ``gamma`` of them."""
        if name not in self.priced:
            program = self.setting.program
            own = {s.name: program.tensor(s.name, "gamma") for s in program.open_sites()}
            changed = program.with_tensors({f"{n}/gamma": value for n, value in gamma(own).items()})
            self.priced[name] = self.setting.run(changed, ScaleChannels(), AnnotateSalience())
        return self.priced[name]

    @property
    def scaled(self) -> Program:
        """Channels scaled, nothing priced."""
        if "scaled" not in self.priced:
            self.priced["scaled"] = self.setting.run(self.setting.program, ScaleChannels())
        return self.priced["scaled"]

    def table(self, name: str, **options: Any) -> Priced:
        if name not in self.tables:
            self.tables[name] = price(self.scaled, self.setting.context, **options)
        return self.tables[name]

    def joint(self, budget: float, program: Program | None = None, strategy: Any = "joint") -> Program:
        program = self.salience() if program is None else program
        return self.setting.run(program, AssignPrecision(Budget(budget), (), strategy))

    def menus(self, budget: float, priced: Priced, whole: bool = False) -> Program:
        """A plan from prices in any form."""
        menus = menus_of(self.setting.program, [priced], whole=whole)
        return self.setting.run(self.scaled, AssignMenus(Budget(budget), (), menus, priced.spectra))

    def gradients(self, name: str, budget: float) -> Program:
        """``joint``, then tune-blocks, then tune-model: as far as ``name`` goes."""
        if (name, budget) not in self.tuned:
            quantized = self.setting.quantize(self.joint(budget))
            blocks = ("balanced", budget)
            if blocks not in self.tuned:
                self.tuned[blocks] = self.setting.run(quantized, TuneBlocks())
            if name == "best":
                self.tuned[name, budget] = self.setting.run(self.tuned[blocks], TuneModel())
        return self.tuned[name, budget]

    def strategy(self, name: str, budget: float) -> Program:
        measuring, deciding = passes_of(name, Budget(budget), (), 65536)
        return self.setting.run(self.setting.program, *measuring, deciding)

    def published(self, budget: float) -> Program:
        """MixLLM in its own form."""
        measuring, deciding = passes_of("mixllm", Budget(budget), (), 65536, "int8")
        return self.setting.run(self.setting.program, *measuring, deciding)

    def nearest(self, budget: float) -> Program:
        """Rounding to nearest is GPTQ that knows of no correlations."""
        table = self.table("nearest", error_feedback=False)
        moved = self.setting.run(self.menus(budget, table), ReorderFeatures())
        sigma = {key: t for key, t in moved.tensors.items() if key.endswith("/sigma")}
        bare = moved.with_tensors({key: torch.diag(t.diagonal()) for key, t in sigma.items()})
        return self.setting.run(bare, QuantizeWeights()).with_tensors(sigma)

    def alike(self, budget: float) -> Program:
        """Second moments in which every token counts once: next to none takes part in a backward pass."""
        if "alike" not in self.priced:
            plain = self.setting.run(self.setting.program, CollectStatistics(gradient_tokens=1))
            sigma = {key: t for key, t in plain.tensors.items() if key.endswith("/sigma")}
            plain = self.setting.program.with_tensors(sigma)
            self.priced["alike"] = self.setting.run(plain, ScaleChannels(), AnnotateSalience())
        return self.setting.quantize(self.joint(budget, self.priced["alike"]))

    def unscaled(self, budget: float) -> Program:
        if "unscaled" not in self.priced:
            self.priced["unscaled"] = self.setting.run(self.setting.program, AnnotateSalience())
        return self.joint(budget, self.priced["unscaled"])

    def again(self, budget: float) -> Program:
        moved = self.setting.run(self.joint(budget), ReorderFeatures(), ScaleChannels(), AnnotateSalience())
        kinds = ("/salience", "/scale", "/row_scale", "/norm")
        found = {key: t for key, t in moved.tensors.items() if key.endswith(kinds)}
        return self.joint(budget, self.salience().with_tensors(found))

    def unrefined(self, budget: float) -> Program:
        with patch.object(refine, "ROUNDS", 0):
            return self.setting.quantize(self.joint(budget))

    def columns(self, budget: float, *, whole: bool) -> Program:
        return assign_columns(self.setting, self.scaled, self.table("columns", by_group=True), budget, whole=whole)

    def form(self, form: Form, budget: float) -> Program:
        return self.menus(budget, self.table(form.label, form=form))


def site_means(gamma: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {name: torch.full_like(own, float(own.mean())) for name, own in gamma.items()}


def model_mean(gamma: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    mean = float(torch.cat([own.double().cpu() for own in gamma.values()]).mean())
    return {name: torch.full_like(own, mean) for name, own in gamma.items()}


def rows_of(bench: Bench) -> dict[str, Callable[[float], Program]]:
    """Name of a row -> the quantized program at a budget."""
    quantize = bench.setting.quantize

    def after(decide: Callable[[float], Program]) -> Callable[[float], Program]:
        return lambda budget: quantize(decide(budget))

    def blocks(budget: float) -> Program:
        return bench.setting.run(quantize(bench.strategy("slim", budget)), TuneClipping())

    return {
        "joint": after(bench.joint),
        "channels as they are": after(bench.unscaled),
        "tokens count alike": bench.alike,
        "no coordinate descent": bench.unrefined,
        "one width per site": after(lambda b: bench.menus(b, bench.table("joint"), whole=True)),
        "side branches": after(lambda b: bench.menus(b, bench.table("branches", directions=MAX_DIRECTIONS))),
        "priced again": after(bench.again),
        "gamma: mean of site": after(lambda b: bench.joint(b, bench.salience("site", site_means))),
        "gamma: one constant": after(lambda b: bench.joint(b, bench.salience("model", model_mean))),
        **{label: after(partial(bench.form, form)) for label, form in OTHER_FORMS.items()},
        "uniform": after(lambda b: bench.joint(b, None, "uniform")),
        "mixllm": after(partial(bench.strategy, "mixllm")),
        "mixllm float": after(bench.published),
        "mixllm float, 8 bits": after(bench.published),
        "slim": after(partial(bench.strategy, "slim")),
        "amlq": after(partial(bench.strategy, "amlq")),
        "nearest rounding": bench.nearest,
        "columns by row": after(partial(bench.columns, whole=False)),
        "columns by site": after(partial(bench.columns, whole=True)),
        "slim balanced": blocks,
        "balanced": partial(bench.gradients, "balanced"),
        "best": partial(bench.gradients, "best"),
    }


def gated(setting: Setting, budget: float) -> dict[str, Any]:
    """``mixcomp.compile`` as users call it, and what its gate said."""
    model: Any = mixcomp.compile(
        setting.model, budget, calibration=[setting.tokens], tokenizer=setting.tokenizer, effort="fast",
        seed=setting.context.seed, copy=True,
    )  # fmt: skip
    plan, report = model.mixcomp.plan, model.mixcomp.report
    modules = {id(m): m for m in model.modules() if isinstance(m, MixedLinear)}.values()
    bits = sum(8 * t.nbytes for m in modules for t in m.packed().tensors().values())
    return {
        "gate": report.get("gate", "this version has none"),
        "strategy": plan.options["strategy"],
        "stored_bits_per_weight": bits / plan.totals["weights"],
        "predicted_loss": plan.predicted_loss,
        "scores": setting.judge.score_model(model),
    }


def one(setting: Setting, name: str, budget: float, rows: Mapping[str, Callable[[float], Program]]) -> dict[str, Any]:
    if name == "gate":
        return gated(setting, budget)
    setting.stages.clear()
    program = rows[name](budget)
    steps = [step.spec.partition("{")[0] for step in program.history if step.changed]
    return {
        **setting.judged(program, eight_bit=name.endswith("8 bits")),
        "stages": dict(setting.stages),
        "changed_by": steps,
    }


def main(given: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--budgets", type=float, nargs="+", default=[4.4, 3.35])
    made.add_argument("--rows", nargs="+", help="names of rows; all by default")
    arguments: argparse.Namespace = made.parse_args(given)
    results = Results(arguments, "python benchmarks/ablation.py")
    setting = Setting.start(arguments)
    rows = rows_of(Bench(setting))
    names = [*rows, "gate"]
    odd = sorted({*(arguments.rows or names)} - {*names})
    if odd:
        raise SystemExit(f"no rows are called {odd}; rows are {names}")
    for name in arguments.rows or names:
        for budget in arguments.budgets:
            results.make({"row": name, "budget": budget}, partial(one, setting, name, budget, rows))
    results.finish()


if __name__ == "__main__":
    main()
