"""What the accuracy benchmarks share: arguments, calibration windows, a captured model, scores, the file of results.

A model is captured and run over the calibration text once; every row of a benchmark starts from there, quantizes with
the product's own passes and is judged as weights: dequantized, rounded to the model's dtype and put into a copy of the
original, learned norms with them.  Stored bits are counted from the bytes of the packed tensors all the same.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers

from mixcomp import manager
from mixcomp.api import GRADIENT_TOKENS
from mixcomp.budget import original_bits
from mixcomp.calibration import Calibration, resolve
from mixcomp.capture import capture
from mixcomp.errors import MixCompError
from mixcomp.evaluate import evaluate, text_windows
from mixcomp.lowering.int8 import round_groups
from mixcomp.passes import CollectStatistics
from mixcomp.passes.directions import error_loss
from mixcomp.passes.strategies import quantizing_of
from mixcomp.passes.tunable import Settled
from mixcomp.program import Program, Site
from mixcomp.protocol import Context, Pass
from mixcomp.sources import load_original, load_tokenizer, pick_device

#: windows of a second text
SECOND_WINDOWS = 48


def parser(doc: str | None, samples: int = 128) -> argparse.ArgumentParser:
    """The arguments that every accuracy benchmark takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="folder of the original")
    made.add_argument("--calibration", required=True, nargs="+", help="texts; windows come in equal numbers from each")
    made.add_argument("--text", required=True, help="text to judge on")
    made.add_argument("--second", help=f"another text, of which {SECOND_WINDOWS} windows are scored")
    made.add_argument("--window", type=int, default=2048, help="tokens of a window that is judged")
    made.add_argument("--limit", type=int, help="windows of --text, from its start; all by default")
    made.add_argument("--samples", type=int, default=samples, help="calibration windows in all")
    made.add_argument("--length", type=int, default=2048, help="tokens of a calibration window")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device")
    made.add_argument("--out", type=Path, help="results; rows that the file holds already are not made again")
    return made


def machine() -> dict[str, Any]:
    """Date, device and versions."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def calibration_tokens(arguments: argparse.Namespace, tokenizer: Any, model: Any, draws: int = 1) -> torch.Tensor:
    """int64[draws * samples, length], windows of the texts in turn."""
    share = draws * arguments.samples // len(arguments.calibration)
    parts = [
        torch.cat(resolve(text, tokenizer=tokenizer, model=model, samples=share, length=arguments.length).batches)
        for text in arguments.calibration
    ]
    return torch.stack(parts, 1).flatten(0, 1)


def judged_windows(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Name of a text -> int64[n, window]."""
    limits = {arguments.text: arguments.limit}
    limits |= {arguments.second: SECOND_WINDOWS} if arguments.second else {}
    return {
        Path(name).name: text_windows(tokenizer, Path(name).read_text(encoding="utf-8"), arguments.window, limit)
        for name, limit in limits.items()
    }


class Results:
    """Rows of a benchmark in a file that is written anew after each of them.

    A row has a key; one that is there already is not made again, so a run that was cut off goes on where it stopped.
    Rows of other arguments or another kind of machine are never mixed in: that is an error.
    """

    def __init__(self, arguments: argparse.Namespace, command: str, **more: Any) -> None:
        self.out = arguments.out
        self.head = {
            "command": command,
            **machine(),
            "model": Path(arguments.model).name,
            "calibration": [Path(text).name for text in arguments.calibration],
            "calibration_windows": [arguments.samples, arguments.length],
            "text": [Path(text).name for text in (arguments.text, arguments.second) if text],
            "window": arguments.window,
            "limit": arguments.limit,
            "seed": arguments.seed,
            **more,
        }
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        if self.out and self.out.exists():
            held = json.loads(self.out.read_text(encoding="utf-8"))
            odd = [k for k, v in self.head.items() if k not in ("date", "command") and held.get(k) != v]
            if odd:
                raise SystemExit(f"{self.out} holds rows of other {', '.join(odd)}; give another --out")
            self.head, self.rows = {k: v for k, v in held.items() if k != "rows"}, held["rows"]

    def missing(self, **key: Any) -> bool:
        return not any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        shown = {k: v for k, v in row.items() if not isinstance(v, (list, dict)) or k == "scores"}
        print(json.dumps(shown)[:1000], flush=True)
        self.write()

    def make(self, key: Mapping[str, Any], row: Callable[[], Mapping[str, Any]]) -> None:
        """Add ``row()`` under ``key`` unless it is there; what the product refuses is a result, anything else is told.

        A row that breaks does not keep the others from being made; ``finish`` says so at last.
        """
        if not self.missing(**key):
            return
        start = time.perf_counter()
        try:
            found = row()
        except MixCompError as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        except Exception:
            traceback.print_exc()
            self.failed.append(dict(key))
            return
        self.add(**key, **found, seconds=round(time.perf_counter() - start, 1))

    def finish(self) -> None:
        if self.failed:
            raise SystemExit(f"rows that broke: {self.failed}")

    def write(self) -> None:
        if self.out:
            self.out.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")


def eight_bits(x: torch.Tensor) -> torch.Tensor:
    """Activations [..., columns] rounded as MixLLM does: int8 with an fp16 scale for a token and 128 columns."""
    return round_groups(x.flatten(0, -2)).view(x.shape).to(x.dtype)


@contextmanager
def eight_bit_inputs(model: Any, sites: Iterable[Site]) -> Iterator[None]:
    """Some linears of a model read ``eight_bits`` of their input."""
    modules = {id(m): m for m in (model.get_submodule(s.weight.key.rpartition(".")[0]) for s in sites)}
    hooks = [m.register_forward_pre_hook(lambda _, args: (eight_bits(args[0]), *args[1:])) for m in modules.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(slots=True, eq=False)
class Judge:
    """KL(original || weights put in their place), on windows of texts; ``base`` is the model that was captured."""

    original: Any
    base: Any
    windows: Mapping[str, torch.Tensor]
    student: Any = None

    def __post_init__(self) -> None:
        self.student = copy.deepcopy(self.base)

    @torch.no_grad()
    def install(
        self,
        sites: Iterable[Site],
        weights: Mapping[str, torch.Tensor],
        norms: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Weights [rows, columns] of some sites and norms into the copy, the base's own into it for all others."""
        own_norms = {path: p for path, p in self.base.named_parameters() if p.dim() == 1}
        for path, norm in (own_norms | {**norms}).items():
            self.student.get_parameter(path).copy_(norm)
        for site in sites:
            place = self.student.get_parameter(site.weight.key)
            own = weights.get(site.name)
            exact = self.base.get_parameter(site.weight.key)
            place.copy_(exact if own is None else own.t() if site.weight.transposed else own)

    def score(self, program: Program, weights: Mapping[str, torch.Tensor], eight_bit: bool = False) -> dict[str, Any]:
        """Name of a text -> perplexity, KL, agreement of the top token, with the program's norms."""
        self.install(program.sites, weights, program.norms())
        with eight_bit_inputs(self.student, program.open_sites() if eight_bit else ()):
            return self.score_model(self.student)

    def score_model(self, model: Any) -> dict[str, Any]:
        return {name: evaluate(model, text, self.original).to_json() for name, text in self.windows.items()}


@dataclass(slots=True, eq=False)
class Setting:
    """A captured model with statistics, and everything needed to judge what is made of it."""

    arguments: argparse.Namespace
    model: Any
    program: Program
    context: Context
    judge: Judge
    tokens: torch.Tensor
    tokenizer: Any = None
    stages: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, arguments: argparse.Namespace, model: Any = None, original: Any = None, draws: int = 1) -> Setting:
        """Load, capture and run over the calibration text; with ``draws`` the statistics are left to the caller.

        ``model`` (default: the folder's) is compiled, and judged against ``original`` (default: itself).
        """
        device = pick_device(arguments.device)
        tokenizer = load_tokenizer(arguments.model)
        model = load_original(arguments.model, device) if model is None else model
        tokens = calibration_tokens(arguments, tokenizer, model, draws)
        judge = Judge(model if original is None else original, model, judged_windows(arguments, tokenizer))
        batches, held = Calibration((tokens,), "").split()
        context = Context(torch.device(device), batches, arguments.seed, held=held)
        made = cls(arguments, model, capture(model), context, judge, tokens, tokenizer)
        if draws == 1:
            made.program = made.run(made.program, made.statistics)
        return made

    @property
    def statistics(self) -> Pass:
        """As ``mixcomp.compile`` runs it on this device."""
        return CollectStatistics(GRADIENT_TOKENS[self.context.device.type])

    def run(self, program: Program, *passes: Pass) -> Program:
        """Passes one after another, timed."""
        for one in passes:
            start = time.perf_counter()
            program = manager.run(program, (one,), self.context)
            self.stages[one.name] = round(time.perf_counter() - start, 2)
        return program

    def quantize(self, program: Program) -> Program:
        """From decisions to stored tensors, by the passes of scaled channels where they are."""
        scaled = any(key.endswith("/scale") for key in program.tensors)
        return self.run(program, *quantizing_of("joint" if scaled else "mixllm"))

    def judged(self, program: Program, *, eight_bit: bool = False) -> dict[str, Any]:
        """Bits, predicted loss, the same loss of the stored weights, and scores of a quantized program, if asked for with
        activations of 8 bits."""
        weights = dequantized(program, self.context.device)
        scales = {key: t for key, t in program.tensors.items() if key.endswith(("/scale", "/row_scale"))}
        total, bits = sum(s.rows * s.columns for s in program.sites if s.in_scope), stored_bits(program)
        return {
            "stored_bits_per_weight": bits / total,
            "payload_bits_per_weight": payload_bits(program) / total,
            "mean_width": mean_width(program),
            "predicted_loss": float(program.tensors["budget/loss"]),
            "second_order_loss": second_order(self.program.with_tensors(scales), weights, self.context.device),
            "scores": self.judge.score(program, weights, eight_bit),
        }


def dequantized(program: Program, device: torch.device) -> dict[str, torch.Tensor]:
    """What every compiled site multiplies with, [rows, columns] in the order of its features, in the model's dtype."""
    return {s.name: Settled.of(program, s, device).weight() for s in program.open_sites()}


def stored_bits(program: Program) -> int:
    """Bits of everything that is kept for the weights in scope, counted from bytes."""
    bits = 0
    for site in (s for s in program.sites if s.in_scope):
        if not site.open:
            bits += original_bits(site)
            continue
        held = sum(8 * program.tensor(site.name, name).nbytes for name in site.layout.tensors())
        if held != site.layout.stored_bits():
            raise SystemExit(
                f"{site.name}: the format counts {site.layout.stored_bits()} bits, its tensors hold {held}"
            )
        bits += held
    return bits


def mean_width(program: Program) -> dict[str, float]:
    """Last part of a site's name -> mean width of a code over the model: where a strategy puts its bits."""
    found: dict[str, list[float]] = {}
    for site in program.open_sites():
        found.setdefault(site.name.rpartition(".")[2], []).append(
            float(program.tensor(site.name, "widths").float().mean())
        )
    return {kind: round(sum(own) / len(own), 3) for kind, own in found.items()}


def payload_bits(program: Program) -> int:
    """Bits of codes alone."""
    scope = (s for s in program.sites if s.in_scope)
    return sum(s.layout.payload_bits() if s.open else original_bits(s) for s in scope)


def second_order(program: Program, weights: Mapping[str, torch.Tensor], device: torch.device) -> float:
    """``1/2 tr(G E S E^T)`` summed over sites for the weights as they are stored, side branches included; nats a token."""
    total = 0.0
    for site in program.open_sites():
        error = program.scaled_weight(site, device) - weights[site.name].float()
        sigma, gamma = program.sigma(site.input, device), program.gamma(site, device)
        total += float(error_loss(error, sigma, gamma))
    return total
