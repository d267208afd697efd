"""Time and peak memory of the verbs on a Llama of 8 billion random weights on one GPU, by stage.

    python benchmarks/large.py --verbs compile
    python benchmarks/large.py --verbs measure plan apply --out benchmarks/large_verbs_h100.json

The shapes are Llama-3.1-8B's; the weights are random, so only time, memory and bits mean anything here.  Effort fast.
Each command takes less than ten minutes.  There is one model: ``measure`` leaves it as it is, ``apply`` and ``compile``
change it, so the two cannot be asked for together.  ``plan`` runs in a process of its own, which sees neither model nor
second moments; its host memory is that process's peak, of which ``host_imports_bytes`` is there before it plans.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from common import machine

import mixcomp
from mixcomp.measurement import Moments

VERBS = ("compile", "measure", "plan", "apply")


def random_llama(layers: int, hidden: int, device: str) -> Any:
    """Llama-3.1-8B's shapes at hidden size 4096; smaller ones keep its proportions."""
    config = transformers.LlamaConfig(
        vocab_size=128256 * hidden // 4096, hidden_size=hidden, intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers, num_attention_heads=hidden // 128, num_key_value_heads=max(1, hidden // 512),
        max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def own_peak() -> int:
    """Bytes; ``ru_maxrss`` would do, but a process inherits it from the one that started it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plan_alone(bare: mixcomp.Measurement, prices: dict[str, Any], budget: float, answer: Any) -> None:
    """In a new process: sends the plan's file, seconds and memory; ``prices`` are the measurement's tensors as arrays."""
    measurement = replace(bare, tensors={name: torch.from_numpy(array) for name, array in prices.items()})
    before, start = own_peak(), time.perf_counter()
    made = mixcomp.plan(measurement, budget)
    seconds = round(time.perf_counter() - start, 2)
    answer.send((made.to_json(), seconds, before, own_peak()))
    answer.close()


class Verbs:
    """The verbs one after another on one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model = random_llama(arguments.layers, arguments.hidden, arguments.device)
        draw = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        self.tokens = torch.randint(vocabulary, (arguments.samples, arguments.length), generator=draw)
        self.measured: Any = None
        self.planned: Any = None
        self.peaks: dict[str, int] = {}
        self.stage = ""
        self.start = time.perf_counter()

    def show(self, stage: str, done: int, total: int) -> None:
        """Progress, and the GPU's peak up to now under the name of the stage."""
        if torch.cuda.is_available():
            self.peaks[stage] = max(self.peaks.get(stage, 0), torch.cuda.max_memory_allocated())
        if total and done % max(1, total // 4) == 0:
            print(f"{time.perf_counter() - self.start:7.1f} s  {stage} {done}/{total}", flush=True)

    def compile(self) -> dict[str, Any]:
        given = {"calibration": [self.tokens], "effort": "fast", "progress": self.show}
        self.model = mixcomp.compile(self.model, self.arguments.budget, **given)
        return self._compiled()

    def measure(self) -> dict[str, Any]:
        self.measured = mixcomp.measure(self.model, [self.tokens], progress=self.show)
        moments = sum(t.nbytes for t in self.measured.moments.tensors.values())
        return {"moments_bytes": moments, "gpu_peaks_by_stage": dict(self.peaks)}

    def plan(self) -> dict[str, Any]:
        """Without the second moments, which planning does not read."""
        couplings = replace(self.measured.couplings, scattered=dict(self.measured.couplings.scattered))
        bare = replace(self.measured, couplings=couplings, tensors={}, moments=Moments())
        prices = {name: t.numpy() for name, t in self.measured.tensors.items()}  # torch would share memory, not send it
        here, there = multiprocessing.Pipe(duplex=False)
        # spawned: a fork would share this process's pages and count them
        child = multiprocessing.get_context("spawn").Process(
            target=plan_alone, args=(bare, prices, self.arguments.budget, there)
        )
        child.start()
        there.close()
        text, seconds, before, peak = here.recv()
        child.join()
        self.planned = replace(mixcomp.Plan.from_json(text), measurement=self.measured)
        rows = sum(t.shape[0] for name, t in self.measured.tensors.items() if name.endswith("/salience"))
        return {"rows": rows, "planning_seconds": seconds, "host_imports_bytes": before, "host_peak_bytes": peak}

    def apply(self) -> dict[str, Any]:
        self.model = mixcomp.apply(self.model, self.planned, measurement=self.measured, progress=self.show)
        return self._compiled()

    def _compiled(self) -> dict[str, Any]:
        report, totals = self.model.mixcomp.report, self.model.mixcomp.plan.totals
        with torch.no_grad():
            logits = self.model(self.tokens[:1, :64].to(self.arguments.device)).logits
        return {
            "stored_bits_per_weight": totals["stored_bits"] / totals["weights"],
            "logits_finite": bool(torch.isfinite(logits).all()),
            "gate": report.get("gate"),
            "stages": report["stages"],
        }


def timed(verb: str, run: Callable[[], dict[str, Any]], peaks: dict[str, int]) -> dict[str, Any]:
    """What a verb found, its seconds, and memory peaks: the GPU's highest over its stages, the host's of the process."""
    peaks.clear()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = run()
    seconds = round(time.perf_counter() - start, 1)
    gpu = [torch.cuda.max_memory_allocated()] if torch.cuda.is_available() else [0]
    gpu += [stage.get("gpu_bytes", 0) for stage in found.get("stages", ())] + list(peaks.values())
    memory = {"peak_gpu_gib": round(max(gpu) / 2**30, 2), "process_host_gib": round(own_peak() / 2**30, 2)}
    return {"verb": verb, "seconds": seconds, **memory, **found}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=["compile"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=4.4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(given)
    if "compile" in arguments.verbs and len(arguments.verbs) > 1:
        parser.error("compile changes the model, so it runs alone")
    if arguments.verbs not in (["compile"], *(list(VERBS[1 : i + 1]) for i in range(1, 4))):
        parser.error("plan needs measure before it, and apply needs plan")
    verbs = Verbs(arguments)
    shape = {what: getattr(arguments, what) for what in ("layers", "hidden", "budget")}
    result = {**machine(), **shape, "calibration_tokens": verbs.tokens.numel(), "verbs": []}
    for verb in arguments.verbs:
        result["verbs"].append(timed(verb, getattr(verbs, verb), verbs.peaks))
        print(json.dumps(result["verbs"][-1]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
