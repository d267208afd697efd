"""Options of the gradient passes: what other rates and steps would give, on validation text, which is how they are chosen.

    python benchmarks/tuning.py MODEL --calibration calib_c4.txt calib_wikipedia.txt --text wikitext2_raw_valid.txt \
        --limit 48 --budgets 4.4 3.35 2.6 --out benchmarks/tuning_h100.json

A row is a pass and, after a colon, the options that differ from its defaults:

    fast                            joint, before anything is learned
    blocks:place_rate=0.0015        tune-blocks, from there
    model:group_rate=0.005          tune-model, from what ``blocks`` with its defaults left

Passes learn from the given text, with ``--written`` also from as much that the model writes itself, as in the product.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from functools import partial
from typing import Any

from common import Results, Setting, parser

from mixcomp.calibration import more_text
from mixcomp.config import Budget
from mixcomp.passes import AnnotateSalience, AssignPrecision, ScaleChannels, TuneBlocks, TuneModel
from mixcomp.passes.distill import Texts
from mixcomp.program import Program

PASSES = {"blocks": TuneBlocks, "model": TuneModel}
ROWS = (
    "fast", "blocks", "blocks:place_rate=0.0015", "blocks:place_rate=0.006", "blocks:group_rate=0.04", "model",
    "model:norm_rate=0", "model:branch_rate=0", "model:norm_rate=0.003", "model:group_rate=0.005", "model:ratio_rate=0.001",
    "model:steps=150",
)  # fmt: skip


def tuning(row: str) -> TuneBlocks | TuneModel:
    """The pass that a row names."""
    name, _, text = row.partition(":")
    made = PASSES.get(name)
    if made is None:
        raise SystemExit(f"row {row!r}: {name!r} is none of fast, {', '.join(PASSES)}")
    kinds = {f.name: type(f.default) for f in fields(made)}
    given = dict(part.split("=", 1) for part in text.split(",") if part)
    odd = sorted(given.keys() - kinds.keys())
    if odd:
        raise SystemExit(f"row {row!r}: {name} has no options {odd}; it has {sorted(kinds)}")
    return made(**{option: kinds[option](value) for option, value in given.items()})


class Bench:
    """What rows of a budget start from."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.priced = setting.run(setting.program, ScaleChannels(), AnnotateSalience())
        self.starts: dict[tuple[str, float], Program] = {}

    def start(self, name: str, budget: float) -> Program:
        if (name, budget) not in self.starts:
            if name == "blocks":
                made = self.setting.quantize(self.setting.run(self.priced, AssignPrecision(Budget(budget))))
            else:
                made = self.setting.run(self.start("blocks", budget), TuneBlocks())
            self.starts[name, budget] = made
        return self.starts[name, budget]

    def row(self, row: str, budget: float) -> dict[str, Any]:
        if row == "fast":
            return self.setting.judged(self.start("blocks", budget))
        made = tuning(row)
        program = self.start(row.partition(":")[0], budget)
        self.setting.stages.clear()
        found = self.setting.judged(self.setting.run(program, made))
        return {**found, "stages": dict(self.setting.stages)}


def main(given: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--budgets", type=float, nargs="+", default=[4.4, 3.35, 2.6])
    made.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW")
    made.add_argument("--written", action="store_true", help="learn from text that the model writes, too")
    arguments: argparse.Namespace = made.parse_args(given)
    for row in arguments.rows:
        if row != "fast":
            tuning(row)
    results = Results(arguments, "python benchmarks/tuning.py", written=arguments.written)
    setting = Setting.start(arguments)
    if arguments.written:
        own = more_text(setting.model, Texts.of(setting.context).learn, setting.context)
        setting.context = replace(setting.context, written=(own,))
    bench = Bench(setting)
    for row in arguments.rows:
        for budget in arguments.budgets:
            results.make({"row": row, "budget": budget}, partial(bench.row, row, budget))
    results.finish()


if __name__ == "__main__":
    main()
