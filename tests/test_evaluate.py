"""Scores against an fp64 oracle written out token by token."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from families import build
from mixcomp import evaluate as module
from mixcomp.errors import CalibrationError, InputError
from mixcomp.evaluate import Evaluation, default_window, evaluate, text_windows

VOCABULARY = 37


class Table(torch.nn.Module):
    """A language model whose logits after token t are row t of a table."""

    def __init__(self, table: torch.Tensor, positions: int | None = None) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(len(table), 1)
        self.table = table
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.batches: list[int] = []

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches.append(len(input_ids))
        return SimpleNamespace(logits=self.table[input_ids])


def table(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(VOCABULARY, VOCABULARY, generator=draw)).to(dtype)


def windows(count: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(9))


def oracle(mine: torch.Tensor, theirs: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    """Means over tokens, each computed from exponentials in fp64."""
    nll = kl = top1 = reference_nll = tokens = 0.0
    for row in text.tolist():
        for now, following in pairwise(row):
            q, p = ((x := t[now].double().exp()) / x.sum() for t in (mine, theirs))
            nll -= math.log(q[following])
            reference_nll -= math.log(p[following])
            kl += sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
            top1 += int(p.argmax() == q.argmax())
            tokens += 1
    return {
        "nll": nll / tokens,
        "kl": kl / tokens,
        "top1": top1 / tokens,
        "reference_nll": reference_nll / tokens,
        "n": tokens,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("count", "length", "batch", "chunk"), [(1, 2, None, 64 << 20), (5, 11, 2, 4 * VOCABULARY * 3), (3, 4, 7, 1)]
)
def test_scores_equal_the_oracle(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int, length: int, batch: int | None, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    mine, theirs, text = table(1, dtype), table(2, dtype), windows(count, length)
    expected = oracle(mine, theirs, text)
    found = evaluate(Table(mine), text, Table(theirs), batch=batch)
    assert found.tokens == expected["n"] == count * (length - 1)
    assert found.window == length
    close = {"rel": 2e-6, "abs": 1e-7}
    assert found.nll == pytest.approx(expected["nll"], **close)
    assert found.ppl == pytest.approx(math.exp(expected["nll"]), **close)
    assert found.kl == pytest.approx(expected["kl"], **close)
    assert found.reference_ppl == pytest.approx(math.exp(expected["reference_nll"]), **close)
    assert found.top1 == expected["top1"]
    alone = evaluate(Table(mine), text, batch=batch)
    assert (alone.ppl, alone.nll) == (found.ppl, found.nll)
    assert alone.kl is alone.top1 is alone.reference_ppl is None


def test_a_model_is_at_no_distance_from_itself() -> None:
    model = build("llama")
    found = evaluate(model, torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(1)), model)
    assert found.kl == 0
    assert found.top1 == 1
    assert found.ppl == found.reference_ppl


def test_a_transformers_model_scores_as_its_own_loss_says() -> None:
    model = build("qwen3")
    text = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        loss = model(input_ids=text, labels=text).loss
    assert evaluate(model, text).nll == pytest.approx(float(loss), rel=1e-6)


def test_batches_keep_the_logits_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORWARD_VALUES", 2 * 10 * VOCABULARY)
    model = Table(table(1))
    steps: list[tuple[str, int, int]] = []
    evaluate(model, windows(5, 10), progress=lambda *step: steps.append(step))
    assert model.batches == [2, 2, 1]
    assert steps == [("evaluate", done, 5) for done in (0, 2, 4, 5)]


def test_modes_come_back_module_by_module() -> None:
    model = build("llama").train()
    frozen = next(model.model.layers.children())
    frozen.eval()
    before = [m.training for m in model.modules()]
    evaluate(model, torch.zeros(1, 4, dtype=torch.long))
    assert [m.training for m in model.modules()] == before
    assert len(set(before)) == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("broken", ["model", "reference"])
def test_nan_is_an_error_that_names_the_window(monkeypatch: pytest.MonkeyPatch, value: float, broken: str) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * VOCABULARY * 4)
    text = torch.zeros(3, 10, dtype=torch.long)
    text[2, 5] = 7
    bad = table(1)
    bad[7, 3] = value
    pair = {"model": table(2), "reference": table(3), broken: bad}
    with pytest.raises(InputError, match=r"window 2, tokens 4\.\.7"):
        evaluate(Table(pair["model"]), text, Table(pair["reference"]), batch=2)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (torch.zeros(3, dtype=torch.long), InputError, "window >= 2"),
        (torch.zeros(3, 1, dtype=torch.long), InputError, "window >= 2"),
        (torch.zeros(0, 4, dtype=torch.long), InputError, "n >= 1"),
        (torch.zeros(1, 4), InputError, "torch.float32"),
        (torch.full((1, 4), VOCABULARY), CalibrationError, "token id 37, the model knows 0..36"),
        (torch.zeros(1, 9, dtype=torch.long), CalibrationError, "9 tokens long, the model has 8 positions"),
    ],
)
def test_windows_a_model_cannot_read(text: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        evaluate(Table(table(1), positions=8), text)
    assert words in str(caught.value)


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(c) for c in text]}


def test_windows_start_at_the_start_and_drop_the_tail() -> None:
    text = "".join(map(chr, range(23)))
    assert torch.equal(text_windows(tokenizer, text, 5), torch.arange(20).view(4, 5))
    assert torch.equal(text_windows(tokenizer, text, 5, limit=2), torch.arange(10).view(2, 5))
    assert torch.equal(text_windows(tokenizer, text, 23, limit=9), torch.arange(23).view(1, 23))


@pytest.mark.parametrize(
    ("window", "limit", "words"),
    [(24, None, "23 tokens, one window takes 24"), (1, None, "window 1"), (5, 0, "limit 0")],
)
def test_text_without_a_window(window: int, limit: int | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        text_windows(tokenizer, "x" * 23, window, limit)


@pytest.mark.parametrize(("positions", "window"), [(None, 2048), (8192, 2048), (64, 64)])
def test_default_window(positions: int | None, window: int) -> None:
    assert default_window(Table(table(1), positions)) == window


def test_json_has_no_holes_and_no_infinity() -> None:
    assert Evaluation(2.0, 0.7, 10, 6).to_json() == {"ppl": 2.0, "nll": 0.7, "tokens": 10, "window": 6}
    assert Evaluation(math.inf, 800.0, 10, 6).to_json()["ppl"] is None
    found = Evaluation(2.0, 0.7, 10, 6, 0.1, 0.9, 1.9)
    assert found.to_json()["kl"] == 0.1
    assert "0.10000 nats" in "\n".join(found.lines())
