"""Calibration: exactly the windows that were promised, from anything sensible; bad input is named (C01-C04)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import build
from mixcomp import data
from mixcomp.calibration import Calibration, more_text, resolve, written
from mixcomp.errors import CalibrationError
from mixcomp.protocol import Context

VOCABULARY = 1000


def counting_tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
    """Token i of any text is i, so that tokens say where they were."""
    assert options == {"add_special_tokens": False, "verbose": False}
    return {"input_ids": list(range(len(text)))}


class Stub(torch.nn.Module):
    """Something with a vocabulary and positions, and no forward."""

    def __init__(self, vocabulary: int = VOCABULARY, positions: int | None = 64) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.embed = torch.nn.Embedding(vocabulary, 2)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed


class Successor(Stub):
    """A language model that is sure of the next token: this one plus one."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        following = (input_ids + 1) % self.embed.num_embeddings
        return SimpleNamespace(logits=1e4 * torch.nn.functional.one_hot(following, self.embed.num_embeddings).float())


def tokens_of(calibration: Calibration) -> list[list[list[int]]]:
    assert all(b.dtype == torch.long for b in calibration.batches)
    assert calibration.tokens == sum(b.numel() for b in calibration.batches)
    return [b.tolist() for b in calibration.batches]


@given(st.integers(1, 150), st.integers(0, 3))
def test_some_windows_are_kept_back(count: int, others: int) -> None:
    windows, short = torch.arange(3 * count).view(count, 3), torch.full((others, 2), -1)
    given_batches = (windows[: count // 2], short, windows[count // 2 :])
    learn, held = Calibration(tuple(b for b in given_batches if len(b)), "").split()
    firsts = [row[0] for batch in (*learn, *held) for row in batch.tolist() if row[0] >= 0]
    kept = [row[0] // 3 for batch in held for row in batch.tolist()]
    assert sorted(firsts) == list(range(0, 3 * count, 3)), "every window is on one side"
    assert sum(len(b) for b in learn if b.shape[1] == 2) == others or count * 3 < others * 2
    if 3 * count > 2 * others:
        assert len(kept) == 0 if count == 1 else 1 <= len(kept) <= min(8, max(1, count // 4))
        assert count < 32 or len(kept) >= 6
    assert all(len(batch) for batch in (*learn, *held))


def test_texts_that_come_in_turns_are_all_kept_back() -> None:
    """Two texts, window by window, as `benchmarks/accuracy.py` has them: a stride of 16 would keep one of them back."""
    _, held = Calibration((torch.arange(128)[:, None].expand(128, 4),), "").split()
    odd = int((torch.cat(held)[:, 0] % 2).sum())
    assert len(torch.cat(held)) == 8
    assert 2 <= odd <= 6


@given(st.integers(1, 12), st.integers(2, 30), st.integers(0, 300))
def test_windows_are_disjoint_and_evenly_spread(samples: int, length: int, spare: int) -> None:
    total = samples * length + spare
    found = resolve(["x" * total], tokenizer=counting_tokenizer, model=Stub(), samples=samples, length=length)
    (batch,) = found.batches
    assert batch.shape == (samples, length)
    starts = batch[:, 0].tolist()
    assert torch.equal(batch, torch.tensor(starts)[:, None] + torch.arange(length)), "windows are slices of the text"
    gaps = [b - a for a, b in zip(starts, [*starts[1:], total], strict=True)]
    assert starts[0] == 0
    assert min(gaps) >= length, "windows overlap"
    assert max(gaps) - min(gaps) <= 1, "windows are not evenly spread"


def test_texts_are_joined_and_a_file_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc\r\n\n\ndef", encoding="utf-8", newline="")
    seen: list[str] = []

    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        seen.append(text)
        return counting_tokenizer(text, **options)

    for source in (["abc\r\n", "def"], (t for t in ["abc\r\n", "def"]), path, str(path)):
        resolve(source, tokenizer=tokenizer, model=Stub(), samples=2, length=3)
    assert set(seen) == {"abc\r\n\n\ndef"}


def test_tokens_are_used_as_they_are() -> None:
    expected = [[[1, 2, 3], [4, 5, 6]], [[7, 8]]]
    forms: list[Any] = [
        [torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([7, 8])],
        [[1, 2, 3], [4, 5, 6], [7, 8]],
        (row for row in [np.array([1, 2, 3], dtype=np.int32), (4, 5, 6), torch.tensor([7, 8], dtype=torch.uint8)]),
        [{"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": None}, {"input_ids": [7, 8]}],
    ]
    for form in forms:
        assert tokens_of(resolve(form, model=Stub())) == expected
    for single in (torch.tensor([7, 8]), [7, 8], {"input_ids": [7, 8]}, np.array([[7, 8]])):
        assert tokens_of(resolve(single, model=Stub())) == [[[7, 8]]]


def test_padding_is_taken_out() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 0], [0, 4, 5, 6], [1, 2, 3, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]]),
    }
    assert tokens_of(resolve([batch], model=Stub())) == [[[1, 2, 3], [4, 5, 6]], [[1, 2, 3, 4]]]


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ([], ["no samples", "generator"]),
        (iter(()), ["no samples", "generator"]),
        (torch.zeros(0, 5, dtype=torch.long), ["sample 0", "empty"]),
        ([[1, 2], []], ["sample 1", "empty"]),
        ([[1, 2], [3]], ["sample 1", "1 tokens", "at least 2"]),
        ([{"input_ids": [[1, 2]], "attention_mask": [[1, 0]]}], ["sample 0", "1 tokens"]),
        ([[1, 2], torch.tensor([1.0, 2.0])], ["sample 1", "torch.float32", "integers"]),
        ([[1, 2], [0.5, 1]], ["sample 1", "torch.float32"]),
        ([[True, False]], ["sample 0", "torch.bool"]),
        ([[1, 2], [3, VOCABULARY]], ["sample 1", "1000", "0..999", "tokenizer"]),
        ([[1, -1]], ["sample 0", "-1", "0..999"]),
        ([torch.zeros(2, 2, 2, dtype=torch.long)], ["sample 0", "3 dimensions"]),
        ([torch.tensor(3)], ["sample 0", "0 dimensions"]),
        ([[1] * 65], ["sample 0", "65", "64 positions"]),
        ([{"text": "hello"}], ["sample 0", "text", "input_ids"]),
        ([{"input_ids": [1, 2], "pixel_values": 0}], ["sample 0", "pixel_values"]),
        ([{"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]}], ["sample 0", "(1, 2)", "(1, 3)"]),
        ([[1, 2], "words"], ["sample 1", "text among tokens"]),
        ([object()], ["sample 0", "object"]),
        ([["a", "b"]], ["sample 0", "list"]),
        (3, ["int", "give texts"]),
        ("no/such/file.txt", ["no/such/file.txt", "list of texts"]),
        (Path("."), ["no text file"]),
    ],
)
def test_unusable_calibration_is_named(calibration: Any, words: list[str]) -> None:
    with pytest.raises(CalibrationError) as caught:
        resolve(calibration, model=Stub(), tokenizer=counting_tokenizer)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize(
    ("calibration", "options", "words"),
    [
        (["x" * 100], {}, ["100 tokens", "48 samples of 64", "3,072"]),
        (["x" * 100], {"samples": 10, "length": 11}, ["100 tokens", "10 samples of 11", "110"]),
        (["x" * 100], {"samples": 1, "length": 65}, ["65", "64 positions", "length"]),
        (["x" * 1001], {"samples": 1, "length": 2}, ["1000", "0..999"]),
        ([[1, 2]], {"samples": 1}, ["samples=", "tokens"]),
        ([[1, 2]], {"length": 2}, ["length=", "tokens"]),
        (["x" * 100], {"tokenizer": None}, ["no tokenizer", "tokenizer="]),
    ],
)
def test_text_that_does_not_fit_is_named(calibration: Any, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CalibrationError) as caught:
        resolve(calibration, **{"tokenizer": counting_tokenizer, "model": Stub(), **options})
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_a_binary_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CalibrationError, match=r"weights\.bin.*UTF-8"):
        resolve(path, model=Stub(), tokenizer=counting_tokenizer)


@pytest.mark.parametrize(
    ("device", "positions", "shape"),
    [
        ("cpu", None, (48, 512)),
        ("cpu", 4096, (48, 512)),
        ("cpu", 100, (48, 100)),
        ("cuda", None, (128, 2048)),
        ("cuda:0", 64, (128, 64)),
    ],
)
def test_default_windows_follow_device_and_positions(
    device: str, positions: int | None, shape: tuple[int, int]
) -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * len(text)}

    found = resolve(["x" * 300_000], tokenizer=tokenizer, model=Stub(positions=positions), device=device)
    assert found.batches[0].shape == shape


def test_the_bundled_text_is_the_default() -> None:
    text = data.read(data.CALIBRATION)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("18cc6174ebca4de7")
    expected = [ord(c) % VOCABULARY for c in text]

    def tokenizer(given_text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCABULARY for c in given_text]}

    found = resolve(None, tokenizer=tokenizer, model=Stub())
    assert found.source.startswith("bundled books: 48 windows of 64 tokens")
    second = len(text) // 48
    assert found.batches[0][1].tolist() == expected[second : second + 64]


def test_bundled_texts_do_not_overlap() -> None:
    def sequences(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return set(zip(*(words[i:] for i in range(13)), strict=False))

    calibration, evaluation = data.read(data.CALIBRATION), data.read(data.EVALUATION)
    assert len(calibration) > 1_100_000
    assert len(evaluation) > 140_000
    assert not sequences(calibration) & sequences(evaluation)


def test_without_a_tokenizer_the_model_speaks_for_itself() -> None:
    model = Successor(vocabulary=50)
    before = torch.get_rng_state()
    found = resolve(None, model=model, samples=6, length=9, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training, "the model's mode comes back"
    assert "drawn from the model itself (seed 3)" in found.source
    (batch,) = found.batches
    assert torch.equal(batch, (batch[:, :1] + torch.arange(9)) % 50)
    assert len(set(batch[:, 0].tolist())) > 1, "first tokens are random"
    assert torch.equal(batch, resolve(None, model=model, samples=6, length=9, seed=3).batches[0])
    assert not torch.equal(batch, resolve(None, model=model, samples=6, length=9, seed=4).batches[0])


def test_windows_that_do_not_fit_together_are_written_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, context = torch.tensor([[7], [3], [11], [49]]), Context()
    together = written(Successor(vocabulary=50), starts, 9, context)
    assert torch.equal(together, (starts + torch.arange(9)) % 50)
    monkeypatch.setattr("mixcomp.calibration.CACHE_BYTES", 1)
    assert torch.equal(written(Successor(vocabulary=50), starts, 9, context), together)


@pytest.mark.parametrize(("length", "each"), [(8, 4), (9, 3), (3, 3), (2, 2)])
def test_more_text_is_short_texts_end_to_end(length: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixcomp.calibration.WRITTEN_LENGTH", 4)
    windows = 10 * torch.arange(1, 3)[:, None] + torch.arange(length)
    found = more_text(Successor(vocabulary=50), windows, Context())
    assert found.shape == (6, length)
    texts = [part for row in found for part in row.split(each)]
    firsts = [int(part[0]) for part in texts]
    assert all(torch.equal(part, part[0] + torch.arange(len(part))) for part in texts), (
        "one text, one token after another"
    )
    assert set(firsts) <= set(windows.flatten().tolist())
    assert len(set(firsts)) >= min(len(texts), windows.numel()) // 2, "from all over the windows"


def test_sampling_with_a_cache_equals_sampling_without() -> None:
    model = build("llama")

    class Forgetful(Stub):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=model(input_ids=input_ids, use_cache=False).logits)

    cached = resolve(None, model=model, samples=4, length=16, seed=5).batches[0]
    assert torch.equal(cached, resolve(None, model=Forgetful(128), samples=4, length=16, seed=5).batches[0])


def test_a_broken_model_is_not_sampled() -> None:
    class Broken(Successor):
        def forward(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
            out = super().forward(input_ids, **options)
            out.logits[0, -1, 0] = torch.nan
            return out

    model = Broken(vocabulary=50)
    with pytest.raises(CalibrationError, match="NaN"):
        resolve(None, model=model, samples=2, length=4)
    assert model.training


def test_the_tokenizer_beside_the_model_is_found_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[tuple[str, dict[str, Any]]] = []

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append((name, options))
        if name == "nowhere":
            raise OSError(name)
        return counting_tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    model: Any = Stub()
    model.name_or_path = "folder"
    assert resolve(["x" * 10], model=model, samples=1, length=4).batches[0].tolist() == [[0, 1, 2, 3]]
    model.name_or_path = "nowhere"
    with pytest.raises(CalibrationError, match="no tokenizer"):
        resolve(["x" * 10], model=model, samples=1, length=4)
    assert asked == [("folder", {"local_files_only": True}), ("nowhere", {"local_files_only": True})]
