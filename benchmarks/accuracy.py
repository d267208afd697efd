"""Accuracy at equal stored bits: ours beside the uniform baseline, counted from the files that were saved.

    python benchmarks/accuracy.py MODEL --calibration TEXT [TEXT ...] --text TEST [--second BOOKS] [--out FILE.json]

Calibration windows come in equal numbers from every text given.  A method is STRATEGY or STRATEGY:EFFORT.

Every row is one compilation from the command line's own functions, saved to a temporary folder, its bits recounted from
the bytes of the tensors on disk, loaded again, and judged against the original: KL(original || compiled) in nats a token,
top-1 agreement and perplexity on non-overlapping windows of 2048 tokens, no BOS, the incomplete tail dropped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

import mixcomp
from mixcomp.calibration import resolve
from mixcomp.evaluate import evaluate, text_windows
from mixcomp.sources import load_original, load_tokenizer, pick_device

STORED = ("codes", "scales", "factors", "row_index", "branch_a", "branch_b", "branch_scale")


def stored_bits(folder: Path) -> int:
    """Bits of every tensor that a compiled site keeps, read from the files."""
    bits = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            bits += sum(8 * tensors.get_tensor(k).nbytes for k in tensors.keys() if k.rsplit(".", 1)[1] in STORED)  # noqa: SIM118
    return bits


def one(
    arguments: argparse.Namespace, budget: float, method: str, windows: dict[str, torch.Tensor], original: Any
) -> dict[str, Any]:
    tokenizer = load_tokenizer(arguments.model)
    model: Any = load_original(arguments.model, arguments.device)
    strategy, _, effort = method.partition(":")
    tokens = calibration_tokens(arguments, tokenizer, model)
    start = time.perf_counter()
    model = mixcomp.compile(
        model, budget, calibration=[tokens], tokenizer=tokenizer, strategy=strategy, effort=effort or "fast",
        seed=arguments.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    report, totals = model.mixcomp.report, model.mixcomp.plan.totals
    with tempfile.TemporaryDirectory() as folder:
        mixcomp.save(model, Path(folder) / "out", tokenizer=tokenizer)
        bits = stored_bits(Path(folder) / "out")
        model = mixcomp.load(Path(folder) / "out", device=arguments.device)
    if bits != totals["stored_bits"]:
        raise SystemExit(f"the plan counts {totals['stored_bits']} bits, the files hold {bits}")
    scores = {name: evaluate(model, text, original).to_json() for name, text in windows.items()}
    return {
        "budget": budget,
        "strategy": strategy,
        "effort": effort or "fast",
        "stored_bits_per_weight": bits / totals["weights"],
        "payload_bits_per_weight": totals["payload_bits"] / totals["weights"],
        "scores": scores,
        "compile_seconds": round(seconds, 1),
        "stages": report["stages"],
        "calibration_tokens": report["calibration"]["tokens"],
    }


def calibration_tokens(arguments: argparse.Namespace, tokenizer: Any, model: Any) -> torch.Tensor:
    """int64[samples, length], windows of the texts in turn."""
    share = arguments.samples // len(arguments.calibration)
    parts = [
        torch.cat(resolve(text, tokenizer=tokenizer, model=model, samples=share, length=arguments.length).batches)
        for text in arguments.calibration
    ]
    return torch.stack(parts, 1).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.4, 3.35, 2.6])
    parser.add_argument("--methods", nargs="+", default=["joint:fast", "joint:balanced", "joint:best", "uniform"])
    parser.add_argument("--second", help="another text, of which 48 windows are scored")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    original = load_original(arguments.model, arguments.device)
    text = Path(arguments.text).read_text(encoding="utf-8")
    tokenizer = load_tokenizer(arguments.model)
    windows = {Path(arguments.text).name: text_windows(tokenizer, text, arguments.window, arguments.limit)}
    if arguments.second:
        text = Path(arguments.second).read_text(encoding="utf-8")
        windows[Path(arguments.second).name] = text_windows(tokenizer, text, arguments.window, 48)
    rows = []
    for budget in arguments.budgets:
        for method in arguments.methods:
            rows.append(one(arguments, budget, method, windows, original))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if arguments.device != "cpu" else platform.processor() or "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": Path(arguments.model).name,
        "calibration": [Path(text).name for text in arguments.calibration],
        "window": arguments.window,
        "seed": arguments.seed,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
