"""Accuracy at equal stored bits: ours beside the uniform baseline, counted from the files that were saved.

    python benchmarks/accuracy.py MODEL --calibration TEXT [TEXT ...] --text TEST [--second BOOKS] [--out FILE.json]

Calibration windows come in equal numbers from every text given.  A method is STRATEGY or STRATEGY:EFFORT.

Every row is one compilation from the command line's own functions, saved to a temporary folder, its bits recounted from
the bytes of the tensors on disk, loaded again, and judged against the original: KL(original || compiled) in nats a token,
top-1 agreement and perplexity on non-overlapping windows of 2048 tokens, no BOS, the incomplete tail dropped.
``scores_int8`` are those of the same model with ``activations="int8"``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Results, calibration_tokens, judged_windows, parser
from safetensors import safe_open

import mixcomp
from mixcomp.evaluate import evaluate
from mixcomp.format import NAMES
from mixcomp.lowering.module import MixedLinear
from mixcomp.sources import load_original, load_tokenizer, pick_device


def stored_bits(folder: Path) -> int:
    """Bits of every tensor that a compiled site keeps, read from the files."""
    bits = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            bits += sum(8 * tensors.get_tensor(k).nbytes for k in tensors.keys() if k.rsplit(".", 1)[1] in NAMES)  # noqa: SIM118
    return bits


def one(
    arguments: argparse.Namespace,
    budget: float,
    strategy: str,
    effort: str,
    windows: dict[str, torch.Tensor],
    original: Any,
) -> dict[str, Any]:
    tokenizer = load_tokenizer(arguments.model)
    model: Any = load_original(arguments.model, arguments.device)
    tokens = calibration_tokens(arguments, tokenizer, model)
    start = time.perf_counter()
    model = mixcomp.compile(
        model, budget, calibration=[tokens], tokenizer=tokenizer, strategy=strategy, effort=effort,
        seed=arguments.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    report, totals = model.mixcomp.report, model.mixcomp.plan.totals
    with tempfile.TemporaryDirectory() as folder:
        mixcomp.save(model, Path(folder) / "out", tokenizer=tokenizer)
        bits = stored_bits(Path(folder) / "out")
        model = mixcomp.load(Path(folder) / "out", device=arguments.device)
    if bits > totals["stored_bits"]:  # fewer where a planned side branch did not help
        raise RuntimeError(f"the plan counts {totals['stored_bits']} bits, the files hold {bits}")
    scores = {name: evaluate(model, text, original).to_json() for name, text in windows.items()}
    for module in model.modules():
        if isinstance(module, MixedLinear):
            module.activations = "int8"
    rounded = {name: evaluate(model, text, original).to_json() for name, text in windows.items()}
    return {
        "stored_bits_per_weight": bits / totals["weights"],
        "payload_bits_per_weight": totals["payload_bits"] / totals["weights"],
        "scores": scores,
        "scores_int8": rounded,
        "compile_seconds": round(seconds, 1),
        "stages": report["stages"],
        "gate": report.get("gate"),
        "calibration_tokens": report["calibration"]["tokens"],
    }


def main(given: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--budgets", type=float, nargs="+", default=[4.4, 3.35, 2.6])
    made.add_argument(
        "--methods", nargs="+", default=["joint:fast", "joint:balanced", "joint:best", "uniform", "uniform:best"]
    )
    arguments = made.parse_args(given)
    arguments.device = pick_device(arguments.device)
    original = load_original(arguments.model, arguments.device)
    windows = judged_windows(arguments, load_tokenizer(arguments.model))
    results = Results(arguments, "python benchmarks/accuracy.py")
    for budget in arguments.budgets:
        for method in arguments.methods:
            strategy, _, effort = method.partition(":")
            key = {"budget": budget, "strategy": strategy, "effort": effort or "fast"}
            results.make(key, partial(one, arguments, **key, windows=windows, original=original))
    results.finish()


if __name__ == "__main__":
    main()
