"""Time and peak memory of compiling a Llama of 8 billion random weights on one GPU, by stage.

    python benchmarks/large.py [--layers 32] [--samples 128] [--length 2048] [--out FILE.json]

The shapes are Llama-3.1-8B's; the weights are random, so only time, memory and bits mean anything here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import mixcomp


def random_llama(layers: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=4.4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = random_llama(arguments.layers)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(128256, (arguments.samples, arguments.length), generator=draw)
    start = time.perf_counter()

    def show(stage: str, done: int, total: int) -> None:
        if total and done % max(1, total // 4) == 0:
            print(f"{time.perf_counter() - start:7.1f} s  {stage} {done}/{total}", flush=True)

    model = mixcomp.compile(model, arguments.budget, calibration=[tokens], progress=show)
    seconds = time.perf_counter() - start
    totals = model.mixcomp.plan.totals
    with torch.no_grad():
        finite = bool(torch.isfinite(model(tokens[:1, :64].cuda()).logits).all())
    result = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "layers": arguments.layers,
        "calibration_tokens": tokens.numel(),
        "seconds": round(seconds, 1),
        "peak_gpu_gib": round(max(s["gpu_bytes"] for s in model.mixcomp.report["stages"]) / 2**30, 2),
        "stored_bits_per_weight": totals["stored_bits"] / totals["weights"],
        "logits_finite": finite,
        "stages": model.mixcomp.report["stages"],
    }
    print(json.dumps(result), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
