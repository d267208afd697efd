"""Perplexity, KL divergence and top-1 agreement of a model, against a text and against the model it came from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mixcomp.calibration import TokenLimits, evaluating, tokenize
from mixcomp.errors import InputError
from mixcomp.protocol import Progress, silent

#: bytes of fp32 log-probabilities held at once
CHUNK_BYTES = 64 << 20
#: values of logits of one forward pass (the model's own memory; both models' are alive together)
FORWARD_VALUES = 256 << 20
LARGEST_BATCH = 8
DEFAULT_WINDOW = 2048


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over ``tokens`` scored tokens: every window scores all of its tokens but the first.

    ``nll`` is in nats per token and ``ppl`` its exponential.  Against a reference: ``kl`` is KL(reference || model) in
    nats per token, ``top1`` the share of tokens where both rank the same token first.
    """

    ppl: float
    nll: float
    tokens: int
    window: int
    kl: float | None = None
    top1: float | None = None
    reference_ppl: float | None = None

    def to_json(self) -> dict[str, Any]:
        scores = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value if math.isfinite(value) else None for name, value in scores.items()}

    def lines(self) -> Iterator[str]:
        """The scores for people."""
        windows = self.tokens // (self.window - 1)
        yield f"perplexity  {self.ppl:.4f} over {self.tokens:,} tokens ({windows} windows of {self.window})"
        if self.kl is not None and self.top1 is not None:
            yield f"original    {self.reference_ppl:.4f}"
            yield f"KL          {self.kl:.5f} nats per token"
            yield f"top-1       {100 * self.top1:.2f} % of tokens agree"


def text_windows(tokenizer: Any, text: str, window: int = DEFAULT_WINDOW, limit: int | None = None) -> torch.Tensor:
    """Non-overlapping windows of a text from its start, int64[n, window]; no special tokens, the tail is dropped."""
    if window < 2:
        raise InputError(f"window {window} is too short; predicting a token takes at least 2 tokens")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} leaves no window to score; give at least 1, or none for all")
    ids = tokenize(tokenizer, text)
    count = min(len(ids) // window, limit if limit is not None else len(ids))
    if count < 1:
        raise InputError(
            f"the text has {len(ids):,} tokens, one window takes {window:,}; give more text or a shorter window"
        )
    return ids[: count * window].view(count, window)


def default_window(model: Any) -> int:
    """2048 tokens, or as many as the model has positions."""
    return min(DEFAULT_WINDOW, TokenLimits.of(model).positions or DEFAULT_WINDOW)


def evaluate(
    model: Any,
    windows: torch.Tensor,
    reference: Any = None,
    *,
    batch: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Score ``model`` on windows int64[n, window], and against ``reference`` where one is given.

    Log-softmax and everything after it are fp32, a few tokens at a time; sums are fp64.  ``batch`` windows go through a
    model at once (None: as many as keep the logits small).  Both models stay on their own devices.

    Raises:
        InputError: windows the model cannot read, or logits with NaN or infinity; nothing is skipped.
    """
    _check(model, windows)
    step = batch if batch is not None else _batch(model, windows.shape[1])
    totals = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad(), evaluating(model), evaluating(reference if reference is not None else model):
        for start in range(0, len(windows), step):
            progress("evaluate", start, len(windows))
            tokens = windows[start : start + step]
            logits = _logits(model, tokens)
            other = _logits(reference, tokens) if reference is not None else None
            totals += _score(logits, tokens, other, start)
    progress("evaluate", len(windows), len(windows))
    return _result(totals.tolist(), windows, reference is not None)


def _check(model: Any, windows: torch.Tensor) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2 or windows.is_floating_point():
        raise InputError(f"windows are {windows.dtype}{tuple(windows.shape)}; give int64[n >= 1, window >= 2]")
    limits = TokenLimits.of(model)
    limits.check_ids(windows, "the text to score")
    limits.check_length(windows.shape[1], "a window")


def _batch(model: Any, window: int) -> int:
    vocabulary = TokenLimits.of(model).vocabulary or 1
    return max(1, min(LARGEST_BATCH, FORWARD_VALUES // (window * vocabulary)))


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    device = next(iter(model.parameters())).device
    out: torch.Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return out


def _score(logits: torch.Tensor, tokens: torch.Tensor, other: torch.Tensor | None, first: int) -> torch.Tensor:
    """Sums of (nll, kl, agreements, reference nll) over a batch of windows, fp64[4]."""
    sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
    for b, chunk in _chunks(logits):
        target = tokens[b, chunk.start + 1 : chunk.stop + 1, None].to(logits.device)
        mine = torch.log_softmax(logits[b, chunk].float(), -1)
        part = torch.zeros_like(sums)
        part[0] = -mine.gather(-1, target).double().sum()
        if other is not None:
            theirs = torch.log_softmax(other[b, chunk].to(logits.device).float(), -1)
            part[1] = (theirs.exp() * (theirs - mine)).sum(-1).double().sum()
            part[2] = (theirs.argmax(-1) == mine.argmax(-1)).sum()
            part[3] = -theirs.gather(-1, target).double().sum()
        if not torch.isfinite(part).all():
            raise InputError(
                f"NaN or infinity in the logits of window {first + b}, tokens {chunk.start}..{chunk.stop - 1}; "
                f"no score is given: check the weights, or evaluate in a wider dtype"
            )
        sums += part
    return sums.cpu()


def _chunks(logits: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(window, positions whose next token is scored), a bounded number of positions at a time."""
    windows, length, vocabulary = logits.shape
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    for b in range(windows):
        for start in range(0, length - 1, step):
            yield b, slice(start, min(start + step, length - 1))


def _result(totals: list[float], windows: torch.Tensor, against: bool) -> Evaluation:
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    nll, kl, agree, reference_nll = (total / tokens for total in totals)
    scores = Evaluation(_exp(nll), nll, tokens, windows.shape[1])
    if not against:
        return scores
    return Evaluation(scores.ppl, nll, tokens, scores.window, kl, agree, _exp(reference_nll))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
