"""Random compiled models, saved in folders, and what damages them; a plugin for its fixtures."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from formats import draw
from mixcomp import artifact, records
from mixcomp.artifact import check_folder, load, save
from mixcomp.errors import MixCompError
from mixcomp.format import Scales, Segment, SiteFormat
from mixcomp.lowering import module as module_file
from mixcomp.lowering.module import MixedLinear
from mixcomp.manifest import MANIFEST
from mixcomp.packed import PackedWeight
from mixcomp.plans import Compiled, Plan

TOKENS = torch.arange(1, 17).view(2, 8)
SIZES: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1}
LLAMA: dict[str, Any] = {**SIZES, "hidden_size": 64, "intermediate_size": 80, "eos_token_id": 2}
GPT2: dict[str, Any] = {**SIZES, "hidden_size": 64, "n_positions": 64, "eos_token_id": 2}
PLAN = Plan({"budget": 4.4}, "books", {"weights": 1}, 0.25, 1e-9, 0.0, {"a": {"widths": "48"}}, {"lm_head": "excluded"})
#: marks a field to be taken out, see ``put``
DROP = object()
SHARD = "mixcomp-00001.safetensors"


def pack(rows: int, columns: int, number: int, generator: torch.Generator) -> PackedWeight:
    """A random stored weight; ``number`` decides whether rows are scattered and whether there is a side branch."""
    segments = (Segment(rows // 3, 8), Segment(rows - rows // 3, 3 + number % 3))
    fmt = SiteFormat(rows, columns, segments, scatter=number % 2 == 0, rank=(0, 3)[number % 3 == 0])
    out = {}
    for name, (dtype, shape) in fmt.tensors().items():
        if dtype in (torch.uint8, torch.int8):
            low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1
            out[name] = torch.randint(low, high, shape, dtype=dtype, generator=generator)
        elif name == "row_index":
            out[name] = torch.randperm(rows, generator=generator).to(dtype)
        else:
            out[name] = (torch.rand(shape, generator=generator) * 2**-14).to(dtype)
    return PackedWeight.from_tensors(fmt, out)


def form(rows: int, columns: int, number: int, _: torch.Generator) -> PackedWeight:
    """A random stored weight in one of the forms that depart from the default."""
    group = (32, 64, 128)[number % 3]
    table = torch.tensor([[1, 4, 8], [4, 2, 2], [8, 8, 8]], dtype=torch.uint8)
    widths = table[torch.arange(rows) * 3 // rows].repeat(1, -(-columns // group))[:, : -(-columns // group)]
    scales, scatter = (Scales.FLOAT_GROUP, Scales.TWO_LEVEL)[number % 2], number % 4 == 0
    return draw(widths, columns, group=group, scales=scales, scatter=scatter, rank=number % 3, seed=number).weight


Pack = Callable[[int, int, int, torch.Generator], PackedWeight]


def compiled(model: PreTrainedModel, skip: tuple[str, ...] = ("lm_head",), pack: Pack = pack) -> PreTrainedModel:
    """The model with every linear but ``skip`` replaced by a random compiled one that keeps the bias."""
    generator = torch.Generator().manual_seed(3)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | transformers.pytorch_utils.Conv1D)]
    for number, (name, module) in enumerate(linears):
        if name in skip:
            continue
        rows, columns = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        bias = None if module.bias is None else module.bias.detach().clone()
        model.set_submodule(name, MixedLinear(pack(rows, columns, number, generator), bias, module.weight.dtype))
    model.mixcomp = Compiled(PLAN)
    model.generation_config.max_new_tokens = 7
    return model.eval()


def new(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A seeded random model; the global generator is left alone."""
    config_class, model_class, sizes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, LLAMA),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, GPT2),
    }[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**{"tie_word_embeddings": False, **sizes, **options})).to(dtype).eval()


def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a CPU holds fragments, as a GPU does."""
    monkeypatch.setattr(module_file, "takes_fragments", lambda device, fmt: device == "cpu" and not fmt.departure)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: compiled(new("llama")),
    "llama-tied": lambda: compiled(new("llama", tie_word_embeddings=True)),
    "llama-bias-bf16": lambda: compiled(new("llama", torch.bfloat16, attention_bias=True, mlp_bias=True)),
    "llama-head-bf16": lambda: compiled(new("llama", torch.bfloat16, tie_word_embeddings=True), skip=()),
    "llama-forms": lambda: compiled(new("llama", torch.bfloat16, attention_bias=True), pack=form),
    "gpt2": lambda: compiled(new("gpt2", tie_word_embeddings=True)),
    "gpt2-half": lambda: compiled(new("gpt2", torch.float16)),
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: build() for name, build in BUILDERS.items()}


@pytest.fixture(scope="module")
def shelf(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One saved folder for every model; tests only read it."""
    base = tmp_path_factory.mktemp("saved")
    for name, model in models.items():
        save(model, base / name)
    return base


@pytest.fixture(scope="module")
def many_shards(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied llama in several shards; tests only read it."""
    target = tmp_path_factory.mktemp("shards") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "SHARD_BYTES", 20_000)
        save(models["llama-tied"], target)
    return target


@pytest.fixture
def folder(many_shards: Path, tmp_path: Path) -> Path:
    """A copy of ``many_shards``, to be damaged."""
    return Path(shutil.copytree(many_shards, tmp_path / "out"))


def refused(folder: Path, names: str, checks: tuple[Callable[[Path], Any], ...] = (check_folder, load)) -> None:
    """Every check refuses the folder with an error of ours that matches ``names`` and says what to do."""
    for check in checks:
        with pytest.raises(MixCompError, match=names) as caught:
            check(folder)
        assert re.search(
            r"; (copy|save|compile|register|load|install|read|give|use)\b|mixcomp\.compile", str(caught.value)
        ), caught


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it a right digest again."""
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    data.pop("digest", None)
    spell = records.spell
    path.write_bytes(spell(data | {"digest": hashlib.sha256(spell(data)).hexdigest()}))


def put(*path_and_value: Any) -> Callable[[dict[str, Any]], None]:
    """Set (or with ``DROP`` remove) one field of the manifest."""
    *path, value = path_and_value

    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is DROP:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return change


def reseal(folder: Path, name: str, raw: bytes) -> None:
    """Replace a text file and list its new digest."""
    (folder / name).write_bytes(raw)
    forge(folder, put("files", name, {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}))
