"""The demonstration: compile a real language model, score it, let both versions write, say where it all lies."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixcomp.errors import InputError
from mixcomp.report import gate_lines

if TYPE_CHECKING:
    from mixcomp.evaluate import Evaluation
    from mixcomp.protocol import Progress
    from mixcomp.report import Report

PROMPT = "The old lighthouse keeper opened the door and"
NEW_TOKENS = 24
GRID_NOTE = (
    "note: this release's linear weights already sit on a 4-bit grid (GGUF Q4_1), which flatters any 4-bit quantizer; "
    "give the folder of a 16-bit model for a fair picture"
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much work a demonstration is: calibration windows and evaluation windows, each (count, tokens)."""

    calibration: tuple[int, int]
    evaluation: tuple[int, int]


#: small enough that a 135M model takes a few minutes on two CPU cores
SIZES = {"cpu": Size((16, 256), (4, 512)), "gpu": Size((128, 1024), (16, 2048))}


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What the demonstration found."""

    model: str
    note: str | None
    report: Report
    run: dict[str, Any]
    scores: Evaluation
    sentences: tuple[str, str]
    folder: Path
    report_file: Path

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "note": self.note,
            "sizes": self.report.to_json()["totals"],
            "gate": self.run["gate"],
            "evaluation": self.scores.to_json(),
            "sentence_before": self.sentences[0],
            "sentence_after": self.sentences[1],
            "compile_seconds": self.run["seconds"],
            "folder": str(self.folder),
            "report": str(self.report_file),
        }

    def lines(self) -> Iterator[str]:
        """The result for people."""
        scores = self.scores
        yield f"model       {self.model}"
        if self.note:
            yield self.note
        yield from self.report.summary()
        yield from gate_lines(self.run)
        yield f"compiled    in {self.run['seconds']:.0f} s"
        yield f"perplexity  {scores.reference_ppl:.3f} before, {scores.ppl:.3f} after"
        yield f"            {scores.tokens:,} tokens of the bundled evaluation text, windows of {scores.window}"
        yield f"KL          {scores.kl:.4f} nats per token; top-1 agreement {100 * (scores.top1 or 0):.1f} %"
        yield f"before      {self.sentences[0]}"
        yield f"after       {self.sentences[1]}"
        yield f"folder      {self.folder}"
        yield f"report      {self.report_file}"


def run(name: str | None, budget: float | str, out: Path, device: str, progress: Progress) -> Demonstration:
    """Compile ``name`` (None: the SmolLM2 release) to ``budget``; model and report are left under ``out``.

    Raises:
        MixCompError: no model could be had, or the budget is impossible.
    """
    from mixcomp import api, artifact, data, evaluate, report, sources
    from mixcomp.calibration import TokenLimits
    from mixcomp.files import write_atomic

    artifact.check_replaceable(out / "model")
    folder = name or str(_release(out, progress))
    original, tokenizer = sources.load_original(folder, device), sources.load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"model {folder!r} has no tokenizer beside it; the demonstration writes text, so it needs one")
    size = SIZES["cpu" if device == "cpu" else "gpu"]
    longest = TokenLimits.of(original).positions or sys.maxsize
    count, length = size.calibration
    compiled: Any = api.compile(
        original, budget, tokenizer=tokenizer, samples=count, length=min(length, longest), copy=True, progress=progress
    )
    facts = report.describe(compiled)
    limit, window = size.evaluation
    windows = evaluate.text_windows(tokenizer, data.read(data.EVALUATION), min(window, longest), limit)
    scores = evaluate.evaluate(compiled, windows, original, progress=progress)
    sentences = (_write(original, tokenizer), _write(compiled, tokenizer))
    target, report_file = out / "model", out / "report.json"
    artifact.save(compiled, target, tokenizer=tokenizer)
    note = GRID_NOTE if name is None else None
    found = dict(compiled.mixcomp.report)
    result = Demonstration(name or "SmolLM2-135M-Instruct", note, facts, found, scores, sentences, target, report_file)
    write_atomic(report_file, json.dumps(result.to_json() | {"details": facts.to_json()}, indent=1) + "\n")
    return result


def _release(out: Path, progress: Progress) -> Path:
    from mixcomp import release

    progress("fetch the model", 0, 1)
    folder = release.fetch(out / "release")
    progress("fetch the model", 1, 1)
    return folder


def _write(model: Any, tokenizer: Any) -> str:
    """A greedy continuation of the prompt, prompt included, on one line."""
    tokens = tokenizer(PROMPT, return_tensors="pt")
    tokens = {key: tokens[key].to(model.device) for key in ("input_ids", "attention_mask")}
    end = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    out = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=end)
    return " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())
