"""Turns whatever is given as calibration into checked batches of tokens.  Nothing is ever downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixcomp import data
from mixcomp.errors import CalibrationError
from mixcomp.protocol import Context

#: (samples, length) of calibration windows where none are asked for
DEFAULT_SHAPE = {"cpu": (48, 512), "gpu": (128, 2048)}
#: windows kept back, at most
HELD = 8
#: of keys and values, while a model writes
CACHE_BYTES = 16 << 30
#: what a model writes to learn from: as many times the text given, in texts of about so many tokens
WRITTEN_TIMES, WRITTEN_LENGTH = 3, 512
#: keys a batch may hold besides ``input_ids``: none of them changes what the model computes
HARMLESS_KEYS = frozenset({"input_ids", "attention_mask", "labels", "token_type_ids"})
_FORMS = "give texts, token tensors, batches with input_ids, or the path of a text file"


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Checked tokens.  ``batches`` are int64[samples, length] on the CPU; ``source`` says where they are from."""

    batches: tuple[torch.Tensor, ...]
    source: str

    @property
    def tokens(self) -> int:
        """Tokens of all batches together."""
        return sum(b.numel() for b in self.batches)

    def split(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Batches to measure and learn from, and those kept back to judge.

        Of the windows of the commonest length (by tokens) some are kept back, always the same of equally many: a quarter,
        one at least and eight at most; a single window is not.  They are drawn at random, as texts often come in turns.
        """
        lengths = Counter(b.shape[1] for b in self.batches for _ in b)
        common = max(lengths, key=lambda n: (lengths[n] * n, n))
        count = lengths[common]
        places = torch.zeros(count, dtype=torch.bool)
        kept_back = min(HELD, max(count > 1, count // 4))
        places[torch.randperm(count, generator=torch.Generator().manual_seed(count))[:kept_back]] = True
        learn, held = [], []
        for batch in self.batches:
            kept = torch.zeros(len(batch), dtype=torch.bool)
            if batch.shape[1] == common:
                kept, places = places.tensor_split([len(batch)])
            learn.append(batch[~kept])
            held.append(batch[kept])
        return tuple(b for b in learn if len(b)), tuple(b for b in held if len(b))


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """What a model can read: token ids below ``vocabulary``, samples of at most ``positions`` (None: not known)."""

    vocabulary: int | None
    positions: int | None

    @classmethod
    def of(cls, model: Any) -> TokenLimits:
        """Limits of a language model, from its input embedding and its config."""
        config: Any = getattr(model, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        try:
            vocabulary = model.get_input_embeddings().num_embeddings
        except (AttributeError, NotImplementedError):
            vocabulary = getattr(config, "vocab_size", None)
        return cls(vocabulary, getattr(config, "max_position_embeddings", None))

    def check_ids(self, ids: torch.Tensor, where: str) -> None:
        """Raise ``CalibrationError`` naming ``where`` unless every id (integers, at least one) is in the vocabulary."""
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
            last = "" if self.vocabulary is None else self.vocabulary - 1
            raise CalibrationError(
                f"{where} holds token id {low if low < 0 else high}, the model knows 0..{last}; "
                f"tokenize with the model's own tokenizer"
            )

    def check_length(self, length: int, where: str) -> None:
        """Raise ``CalibrationError`` naming ``where`` if ``length`` tokens are more than the model has positions."""
        if self.positions is not None and length > self.positions:
            raise CalibrationError(
                f"{where} is {length:,} tokens long, the model has {self.positions:,} positions; make it shorter"
            )


def resolve(
    calibration: object,
    *,
    tokenizer: Any = None,
    model: Any,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Calibration:
    """Calibration tokens from what was given.

    Texts, or a text file, are tokenized without special tokens as one text, and ``samples`` non-overlapping windows of
    ``length`` tokens are taken, evenly spread.  Tokens that are given are used as they are, all of them, with padding
    (``attention_mask`` 0) taken out.  ``None`` stands for the bundled books, or, where no tokenizer can be had, for
    samples drawn from the model itself.  ``samples`` and ``length`` default by ``device``: 48 x 512 on a CPU,
    128 x 2048 elsewhere, no longer than the model's positions.

    Raises:
        CalibrationError: nothing usable in it; the message names the sample.
    """
    limits = TokenLimits.of(model)
    shape = _shape(samples, length, device, limits)
    if calibration is None:
        tokenizer = tokenizer or find_tokenizer(model)
        if tokenizer is None:
            return _from_model(model, shape, limits, seed)
        return _from_text(data.read(data.CALIBRATION), "bundled books", tokenizer, shape, limits)
    if isinstance(calibration, (str, Path)):
        path = Path(calibration)
        return _from_text(_read(path), f"text file {path.name}", _need(tokenizer, model), shape, limits)
    given = list(_items(calibration))
    if not given:
        raise CalibrationError(
            f"calibration holds no samples (an empty list, or a generator already used up); {_FORMS}"
        )
    if all(isinstance(item, str) for item in given):
        return _from_text("\n\n".join(given), f"{len(given)} given texts", _need(tokenizer, model), shape, limits)
    if samples is not None or length is not None:
        raise CalibrationError("samples= and length= cut text into windows; calibration is tokens: leave them out")
    rows = [row for index, item in enumerate(given) for row in _rows(item, index, limits)]
    return Calibration(_grouped(rows), f"{len(rows)} given token samples")


def tokenize(tokenizer: Callable[..., Any], text: str) -> torch.Tensor:
    """Token ids of a text as int64[tokens], without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long).reshape(-1)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode; every module's own mode comes back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def find_tokenizer(model: Any) -> Any:
    """The tokenizer that lies beside the model's own files on this machine, or None."""
    name = getattr(model, "name_or_path", "") or ""
    if not name:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return None


def _need(tokenizer: Any, model: Any) -> Any:
    tokenizer = tokenizer or find_tokenizer(model)
    if tokenizer is None:
        raise CalibrationError(
            "calibration is text and there is no tokenizer beside the model; pass tokenizer=, or tokens"
        )
    return tokenizer


def _shape(samples: int | None, length: int | None, device: torch.device | str, limits: TokenLimits) -> tuple[int, int]:
    default = DEFAULT_SHAPE["cpu" if torch.device(device).type == "cpu" else "gpu"]
    if length is None:
        length = min(default[1], limits.positions or default[1])
    limits.check_length(length, f"a calibration window (length={length})")
    return samples or default[0], length


def _read(path: Path) -> str:
    if not path.is_file():
        raise CalibrationError(f"calibration {str(path)!r:.200} is no text file; for text itself give a list of texts")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration file {str(path)!r} cannot be read as UTF-8 text: {error}") from None


def _items(calibration: object) -> Iterator[Any]:
    """Samples or batches of what was given; a lone tensor, batch or list of ids counts as one."""
    if isinstance(calibration, (torch.Tensor, Mapping)) or hasattr(calibration, "__array__"):
        return iter([calibration])
    if not isinstance(calibration, Iterable):
        raise CalibrationError(f"calibration is a {type(calibration).__name__}; {_FORMS}")
    if isinstance(calibration, (list, tuple)) and calibration and isinstance(calibration[0], int):
        return iter([calibration])
    return iter(calibration)


def _from_text(text: str, what: str, tokenizer: Any, shape: tuple[int, int], limits: TokenLimits) -> Calibration:
    samples, length = shape
    ids = tokenize(tokenizer, text)
    if len(ids) < samples * length:
        raise CalibrationError(
            f"calibration ({what}) has {len(ids):,} tokens, {samples} samples of {length} need {samples * length:,}; "
            f"give more text, or set samples= and length= lower"
        )
    limits.check_ids(ids, f"calibration ({what})")
    starts = [i * len(ids) // samples for i in range(samples)]
    batch = torch.stack([ids[start : start + length] for start in starts])
    return Calibration((batch,), f"{what}: {samples} windows of {length} tokens, evenly spread over {len(ids):,}")


def _rows(item: object, index: int, limits: TokenLimits) -> list[torch.Tensor]:
    """Samples int64[length] of one given item, padding removed."""
    where = f"calibration sample {index}"
    mask: Any = None
    if isinstance(item, Mapping):
        if "input_ids" not in item or not set(item) <= HARMLESS_KEYS:
            raise CalibrationError(f"{where} has keys {sorted(map(str, item))}; needed is input_ids, allowed {_keys()}")
        mask, item = item.get("attention_mask"), item["input_ids"]
    ids = _ids(item, where)
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).cpu().bool()
    keep = keep[None] if keep.ndim == 1 else keep
    if keep.shape != ids.shape:
        raise CalibrationError(
            f"{where} has input_ids {tuple(ids.shape)} and attention_mask {tuple(keep.shape)}; make them alike"
        )
    rows = [row[kept] for row, kept in zip(ids, keep, strict=True)]
    for row in rows:
        if len(row) < 2:
            raise CalibrationError(f"{where} holds a sequence of {len(row)} tokens; predicting one takes at least 2")
        limits.check_ids(row, where)
        limits.check_length(len(row), where)
    return rows


def _keys() -> str:
    return ", ".join(sorted(HARMLESS_KEYS - {"input_ids"}))


def _ids(item: object, where: str) -> torch.Tensor:
    """One item as int64[samples, length]."""
    if isinstance(item, str):
        raise CalibrationError(f"{where} is text among tokens; give texts only, or tokens only")
    try:
        ids = torch.as_tensor(item).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(f"{where} is a {type(item).__name__} that is no tensor of token ids; {_FORMS}") from None
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise CalibrationError(f"{where} is {ids.dtype}; token ids are integers, convert them where they are made")
    if ids.ndim not in (1, 2):
        raise CalibrationError(f"{where} has {ids.ndim} dimensions; give [length] or [samples, length]")
    if ids.numel() == 0:
        raise CalibrationError(f"{where} is empty (shape {tuple(ids.shape)}); leave it out, or give at least 2 tokens")
    return ids.to(torch.long).reshape(-1, ids.shape[-1])


def _grouped(rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Neighbours of one length as one batch."""
    groups: list[list[torch.Tensor]] = []
    for row in rows:
        if groups and len(groups[-1][0]) == len(row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return tuple(torch.stack(group) for group in groups)


def _from_model(model: Any, shape: tuple[int, int], limits: TokenLimits, seed: int) -> Calibration:
    samples, length = shape
    if limits.vocabulary is None:
        raise CalibrationError(f"there is no tokenizer and the model names no vocabulary size to sample from; {_FORMS}")
    context = Context(seed=seed)
    starts = torch.randint(limits.vocabulary, (samples, 1), generator=context.generator("calibration"))
    source = f"no tokenizer was found: {samples} samples of {length} tokens drawn from the model itself (seed {seed})"
    return Calibration((written(model, starts, length, context),), source)


def more_text(model: Any, windows: torch.Tensor, context: Context) -> torch.Tensor:
    """Windows like ``windows`` int64[n, length] that the model writes itself, int64[3 n, length].

    One of 2048 tokens is four texts end to end, as those that people calibrate on often are.  Tokens come one after
    another but texts side by side, so four short texts take a quarter of the time of a long one, and three times as many
    little more than as many.
    """
    count, length = windows.shape
    pieces = -(-length // WRITTEN_LENGTH)
    starts = torch.arange(WRITTEN_TIMES * pieces) * length // (WRITTEN_TIMES * pieces)
    text = written(model, windows[:, starts].reshape(-1, 1), -(-length // pieces), context)
    return text.view(WRITTEN_TIMES * count, -1)[:, :length].contiguous()


@torch.no_grad()
def written(model: Any, starts: torch.Tensor, length: int, context: Context) -> torch.Tensor:
    """What the model writes itself: ancestral samples at temperature 1, int64[n, length], after ``starts`` int64[n, 1].

    Raises:
        CalibrationError: its logits are not finite.
    """
    device = next(model.parameters()).device
    own = torch.Generator(device).manual_seed(context.generator("writing").initial_seed())
    finite = torch.ones((), dtype=torch.bool, device=device)
    done = []
    # cuDNN's attention plans anew for every length: 2.4 ms of the host per layer and token
    with evaluating(model), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        for rows in starts.to(device).split(_at_once(model, length)):
            tokens, cache = rows, None
            for _ in context.track("tokens", range(length - 1)):
                fed = tokens if cache is None else tokens[:, -1:]
                out = model(input_ids=fed, past_key_values=cache, use_cache=True)
                cache = getattr(out, "past_key_values", None)
                p = torch.softmax(out.logits[:, -1, : TokenLimits.of(model).vocabulary].float(), -1)
                finite &= torch.isfinite(p).all()
                # the first of racing exponential clocks; multinomial would bring the device down at a NaN
                drawn = (p / torch.empty_like(p).exponential_(generator=own)).argmax(-1, keepdim=True)
                tokens = torch.cat((tokens, drawn), 1)
            done.append(tokens.cpu())
    if not finite:
        raise CalibrationError(
            "the model's own logits hold NaN or infinity; check its weights, or give calibration text"
        )
    return torch.cat(done)


def _at_once(model: Any, length: int) -> int:
    """Samples whose keys and values fit into ``CACHE_BYTES``; if the config tells no more, as if every head had its own."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, hidden = (getattr(config, name, None) or 64**2 for name in ("num_hidden_layers", "hidden_size"))
    heads, size = (getattr(config, name, None) for name in ("num_key_value_heads", "head_dim"))
    width = heads * size if heads and size else hidden
    window: int = 2 * layers * width * length * next(model.parameters()).element_size()
    return max(1, CACHE_BYTES // window)
