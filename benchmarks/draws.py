"""How far a plan is the model's and how far the calibration text's: disjoint draws of windows from the same texts.

    python benchmarks/draws.py MODEL --calibration calib_c4.txt calib_wikipedia.txt --text wikitext2_raw_test.txt \
        --second books_eval.txt --out benchmarks/draws_h100.json

``--samples`` (98) windows make a draw, in equal numbers from each text; the draws take turns along the texts, so no
window is in two.  (C4's 302,437 tokens hold 147 windows of 2048: three draws of 49.)  Each draw is a whole run: its own
statistics, prices, plan and rounding, effort fast.  ``pairs`` holds the Jaccard overlap of two plans (``mixcomp.overlap``:
rows wider than the commonest width), and what chance would give for plans that favour as many rows: over the whole
model, and within each site, which keeps what every draw knows of whole layers.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import combinations
from statistics import mean, stdev
from typing import Any

from common import Results, Setting, parser

import mixcomp
from mixcomp.config import CompileConfig
from mixcomp.fingerprint import Identity
from mixcomp.passes import AnnotateSalience, AssignPrecision, ScaleChannels
from mixcomp.passes.coupling import analyse
from mixcomp.passes.decision import Decisions
from mixcomp.planning import record
from mixcomp.plans import Plan
from mixcomp.protocol import Context


def one(setting: Setting, budget: float, draw: int, draws: int) -> dict[str, Any]:
    """A draw from statistics to KL, and its plan."""
    texts = len(setting.arguments.calibration)
    shape = setting.tokens.view(-1, texts, setting.tokens.shape[1])
    tokens = shape[draw::draws].flatten(0, 1)
    setting.context = Context(setting.context.device, (tokens,), setting.context.seed)
    setting.stages.clear()
    config = CompileConfig.from_kwargs(budget=budget, effort="fast", seed=setting.context.seed)
    program = setting.run(setting.program, setting.statistics)
    decided = setting.run(program, ScaleChannels(), AnnotateSalience(), AssignPrecision(config.budget))
    fingerprint = Identity.of(decided).fingerprint
    plan = record(
        decided.sites, analyse(decided), Decisions.read(decided), config, f"draw {draw} of {draws}", fingerprint
    )
    captured, setting.program = setting.program, program  # the second-order loss is by the draw's own moments
    try:
        found = setting.judged(setting.quantize(decided))
    finally:
        setting.program = captured
    return {**found, "windows": len(tokens), "plan": plan.to_json()["sites"], "stages": dict(setting.stages)}


def favoured(plan: Plan) -> dict[str, tuple[int, int]]:
    """Site -> (rows wider than the commonest width of the plan, rows)."""
    texts = {name: str(site["widths"]) for name, site in plan.sites.items()}
    common = int(Counter("".join(texts.values())).most_common(1)[0][0])
    return {name: (sum(int(width) > common for width in text), len(text)) for name, text in texts.items()}


def by_chance(first: Plan, second: Plan) -> tuple[float, float]:
    """Expected overlap of plans that favour as many rows, drawn at random from the model, and from each site."""
    one, two = favoured(first), favoured(second)
    counts = [(one[name][0], two[name][0], one[name][1]) for name in one]
    a, b, n = (sum(part) for part in zip(*counts, strict=True))
    both = sum(x * y / rows for x, y, rows in counts)
    return _jaccard(a * b / n, a, b), _jaccard(both, a, b)


def _jaccard(both: float, first: int, second: int) -> float:
    return both / (first + second - both) if first + second else 1.0


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of KL over the draws, overlaps of their plans."""
    plans = {row["draw"]: Plan({}, "", {}, 0.0, 0.0, 0.0, row["plan"]) for row in rows}
    pairs = []
    for a, b in combinations(sorted(plans), 2):
        model, site = by_chance(plans[a], plans[b])
        overlap = mixcomp.overlap(plans[a], plans[b])
        pairs.append({"draws": [a, b], "overlap": overlap, "by_chance": model, "by_chance_within_sites": site})
    scores = {}
    for text in rows[0]["scores"]:
        kl = [row["scores"][text]["kl"] for row in rows]
        spread = stdev(kl) if len(kl) > 1 else 0.0
        scores[text] = {"kl_mean": mean(kl), "kl_standard_deviation": spread, "kl_range": max(kl) - min(kl)}
    return {"scores": scores, "pairs": pairs}


def main(given: list[str] | None = None) -> None:
    made = parser(__doc__, samples=98)
    made.add_argument("--budget", type=float, default=4.4)
    made.add_argument("--draws", type=int, default=3)
    arguments = made.parse_args(given)
    results = Results(arguments, "python benchmarks/draws.py", budget=arguments.budget, draws=arguments.draws)
    setting = Setting.start(arguments, draws=arguments.draws)
    for draw in range(arguments.draws):
        results.make({"draw": draw}, partial(one, setting, arguments.budget, draw, arguments.draws))
    if not results.failed and all("plan" in row for row in results.rows):
        results.head["summary"] = summary(results.rows)
        for row in results.rows:
            del row["plan"]  # a digit for every row of the model; compared, it is not needed any more
        results.write()
        print(results.head["summary"])
    results.finish()


if __name__ == "__main__":
    main()
