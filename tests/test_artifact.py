"""A saved model comes back bit for bit, or not at all and with the damage named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from formats import draw
from mixcomp import artifact, files, records, shards, skeleton
from mixcomp.artifact import check_folder, load, save
from mixcomp.errors import ArtifactError, ConfigError, FormatError, InputError, MixCompError, StorageError
from mixcomp.format import Scales, Segment, SiteFormat
from mixcomp.lowering.module import MixedLinear
from mixcomp.manifest import MANIFEST, Manifest
from mixcomp.packed import PackedWeight
from mixcomp.plans import Compiled, Plan
from mixcomp.report import describe

TOKENS = torch.arange(1, 17).view(2, 8)
SIZES: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1}
LLAMA: dict[str, Any] = {**SIZES, "hidden_size": 64, "intermediate_size": 80, "eos_token_id": 2}
GPT2: dict[str, Any] = {**SIZES, "hidden_size": 64, "n_positions": 64, "eos_token_id": 2}
PLAN = Plan({"budget": 4.4}, "books", {"weights": 1}, 0.25, 1e-9, 0.0, {"a": {"widths": "48"}}, {"lm_head": "excluded"})


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


# --- round trip ---


@pytest.mark.parametrize("name", BUILDERS)
def test_loaded_model_equals_the_saved_one(models: dict[str, PreTrainedModel], shelf: Path, name: str) -> None:
    before, after = models[name], load(shelf / name)
    assert type(after) is type(before)
    assert not after.training
    assert (after.dtype, after.config.dtype) == (before.dtype, before.dtype)
    state, wanted = after.state_dict(), before.state_dict()
    assert list(state) == list(wanted)
    for key, tensor in wanted.items():
        assert (state[key].dtype, state[key].stride()) == (tensor.dtype, tensor.stride()), key
        assert torch.equal(state[key], tensor), key
    assert torch.equal(logits(after), logits(before))
    for key, module in before.named_modules():
        if isinstance(module, MixedLinear):
            assert after.get_submodule(key).weight.dtype == module.weight.dtype == before.dtype
    assert after.mixcomp.plan == PLAN
    assert after.generation_config.to_dict() == before.generation_config.to_dict()
    head, embedding = after.get_output_embeddings(), after.get_input_embeddings()
    assert (getattr(head, "weight", None) is embedding.weight) == (name in ("llama-tied", "gpt2"))
    cached = after.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(cached, before.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0))


FRESH = """
import hashlib, sys
import mixcomp
assert not {"torch", "transformers"} & sys.modules.keys()
import torch
from mixcomp.artifact import load
from transformers import AutoModelForCausalLM

def show(model):
    with torch.no_grad():
        out = model(torch.arange(1, 17).view(2, 8)).logits
    print(hashlib.sha256(out.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())

for folder in sys.argv[1:]:
    show(load(folder))
print([name for name in sys.modules if name.startswith(("mixcomp.passes", "mixcomp.capture", "mixcomp.calibration"))])
show(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
"""


def test_a_fresh_process_computes_the_same_bits_without_any_pass(
    models: dict[str, PreTrainedModel], shelf: Path
) -> None:
    folders = [str(shelf / name) for name in BUILDERS]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *folders], check=True, capture_output=True, text=True, timeout=600
    )
    *digests, passes, pretrained = done.stdout.split("\n")[:-1]
    raw = [logits(model).contiguous().view(torch.uint8).numpy().tobytes() for model in models.values()]
    assert digests == [hashlib.sha256(r).hexdigest() for r in raw]
    assert passes == "[]"
    assert pretrained == digests[0]


@pytest.mark.parametrize("name", BUILDERS)
def test_same_model_same_bytes(models: dict[str, PreTrainedModel], shelf: Path, tmp_path: Path, name: str) -> None:
    save(models[name], tmp_path / "again")
    save(load(shelf / name), tmp_path / "loaded")
    assert content(tmp_path / "again") == content(shelf / name)
    assert content(tmp_path / "loaded") == content(shelf / name)


def test_saving_leaves_the_model_and_the_world_alone(
    models: dict[str, PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", lambda model, module: torch.rand(1))
    model = models["llama-bias-bf16"]
    config, state = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    world = torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device()
    save(model, tmp_path / "out")
    load(tmp_path / "out")
    assert model.config.to_dict() == config
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), world[0])
    assert (torch.get_default_dtype(), torch.get_default_device()) == world[1:]


def test_tensors_are_ordinary_safetensors(models: dict[str, PreTrainedModel], shelf: Path) -> None:
    found = {}
    for path in (shelf / "llama-tied").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    state = models["llama-tied"].state_dict()
    assert set(state) - set(found) == {"lm_head.weight"}  # the tied tensor is stored once
    for name, tensor in found.items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])


def test_no_original_weight_is_kept(shelf: Path) -> None:
    for name in BUILDERS:
        found = check_folder(shelf / name)
        for site in found.sites:
            assert f"{site}.weight" not in found.tensors


def test_manifest_counts_what_lies_on_the_disk(models: dict[str, PreTrainedModel], shelf: Path) -> None:
    found = check_folder(shelf / "gpt2")
    modules = [m for m in models["gpt2"].modules() if isinstance(m, MixedLinear)]
    assert len(found.sites) == len(modules) == 8
    assert found.stored_bits == sum(m.packed().stored_bits() for m in modules)
    assert found.payload_bits == sum(m.fmt.payload_bits() for m in modules)
    assert found.weights == sum(m.fmt.rows * m.fmt.columns for m in modules)
    sizes = {path.name: path.stat().st_size for path in (shelf / "gpt2").iterdir()}
    assert found.checkpoint_bytes == sum(size for name, size in sizes.items() if name != MANIFEST)


def test_many_shards_hold_what_one_holds(models: dict[str, PreTrainedModel], folder: Path) -> None:
    found = check_folder(folder)
    assert len([name for name in found.files if name.endswith(".safetensors")]) > 3
    assert torch.equal(logits(load(folder)), logits(models["llama-tied"]))


def test_buffers_that_a_fresh_model_lacks_are_stored(shelf: Path) -> None:
    assert check_folder(shelf / "llama").buffers == ()
    found = check_folder(shelf / "llama-bias-bf16")
    assert found.buffers == ("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq")
    assert load(shelf / "llama-bias-bf16").model.rotary_emb.inv_freq.dtype == torch.bfloat16


def test_attention_is_the_one_that_ran(tmp_path: Path) -> None:
    model = BUILDERS["llama"]()
    model.set_attn_implementation("eager")
    save(model, tmp_path / "out")
    assert load(tmp_path / "out").config._attn_implementation == "eager"
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_parameters_over_one_memory_are_stored_once_and_tied(tmp_path: Path) -> None:
    model = BUILDERS["llama"]()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    save(model, tmp_path / "out")
    assert check_folder(tmp_path / "out").ties == {"lm_head.weight": "model.embed_tokens.weight"}
    after = load(tmp_path / "out")
    assert after.lm_head.weight is after.model.embed_tokens.weight


def test_two_paths_to_one_layer_are_stored_once(tmp_path: Path) -> None:
    model = BUILDERS["llama"]()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    save(model, tmp_path / "out")
    after = load(tmp_path / "out")
    assert after.model.layers[1].mlp.up_proj is after.model.layers[0].mlp.up_proj
    assert torch.equal(logits(after), logits(model))
    stored = [name for name in check_folder(tmp_path / "out").tensors if "mlp.up_proj.codes" in name]
    assert stored == ["model.layers.0.mlp.up_proj.codes"]


def test_building_the_skeleton_touches_no_weight() -> None:
    config = json.loads(new("llama").config.to_json_string())
    config |= {"intermediate_size": 1 << 20, "hidden_size": 512, "num_hidden_layers": 1}  # three matrices of 2 GiB
    config["head_dim"] = 128
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = skeleton.build(config, "LlamaForCausalLM", None, 100)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_config_may_ask_for_as_many_parameters_as_are_stored() -> None:
    model = new("llama")
    config, count = json.loads(model.config.to_json_string()), len(list(model.parameters()))
    skeleton.build(config, "LlamaForCausalLM", None, count)
    with pytest.raises(ArtifactError, match=f"more than {count - 1} parameters"):
        skeleton.build(config, "LlamaForCausalLM", None, count - 1)


# --- the folder ---


def test_saving_again_replaces_a_mixcomp_folder_and_fills_an_empty_one(
    models: dict[str, PreTrainedModel], shelf: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for name in ("llama", "gpt2"):
        save(models[name], tmp_path / "out")
        assert content(tmp_path / "out") == content(shelf / name)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_folders_of_others_are_not_touched(models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    before = content(folder)
    with pytest.raises(ArtifactError, match=r"did not write: \['notes.txt'\]"):
        save(models["gpt2"], folder)
    assert content(folder) == before
    (folder / "notes.txt").unlink()
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError, match=r"cannot be read, so it is not replaced .*format_version"):
        save(models["gpt2"], folder)
    assert set(content(folder)) == set(before) - {"notes.txt"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"):
        save(models["gpt2"], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_at_any_write_leaves_the_old_version(
    models: dict[str, PreTrainedModel], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls, fatal = content(folder), 0, -1

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args)

        return watched

    monkeypatch.setattr(files.os, "fsync", counted(os.fsync))
    monkeypatch.setattr(files, "_exchange", counted(files._exchange))
    monkeypatch.setattr(artifact, "SHARD_BYTES", 60_000)
    save(models["gpt2"], folder.parent / "count")
    files_written = len(content(folder.parent / "count"))
    assert files_written >= 6
    assert calls == files_written + 2  # new folder, its parent
    shutil.rmtree(folder.parent / "count")
    for number in range(1, files_written + 3):
        calls, fatal = 0, number
        with pytest.raises(StorageError, match="No space left on device"):
            save(models["gpt2"], folder)
        assert content(folder) == before
        assert list(folder.parent.iterdir()) == [folder]


class Tokenizer:
    """Saves what it is told to."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def save_pretrained(self, where: str) -> None:
        for name in self.names:
            (Path(where) / name).write_text(f'{{"name": "{name}"}}')


def test_tokenizer_files_are_saved_and_verified(models: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    save(models["llama"], tmp_path / "out", tokenizer=Tokenizer("tokenizer.json", "tokenizer_config.json"))
    found = check_folder(tmp_path / "out")
    assert {"tokenizer.json", "tokenizer_config.json"} < set(found.files)
    (tmp_path / "out" / "tokenizer.json").write_text('{"name": "tokenizer.jsom"}')
    for check in (check_folder, load):
        with pytest.raises(ArtifactError, match=r"tokenizer\.json: damaged"):
            check(tmp_path / "out")


@pytest.mark.parametrize("name", ["custom.py", "weights.bin", "config.json", "mixcomp.json", "a b.json"])
def test_tokenizers_save_data_only(models: dict[str, PreTrainedModel], tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(name)):
        save(models["llama"], tmp_path / "out", tokenizer=Tokenizer(name))
    assert not (tmp_path / "out").exists()


# --- what cannot be saved ---


def test_only_compiled_transformers_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got Linear"):
        save(nn.Linear(2, 2), tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no compiled layer"):
        save(new("llama"), tmp_path / "out")
    with pytest.raises(InputError, match=r"meta device.*embed_tokens"):
        save(BUILDERS["llama"]().to("meta"), tmp_path / "out")
    model = BUILDERS["llama"]()
    model.model.norm.weight.data = model.model.norm.weight.to(torch.complex64)
    with pytest.raises(InputError, match=r"norm\.weight"):
        save(model, tmp_path / "out")
    model = BUILDERS["llama"]()
    model.model.layers[1].mlp.up_proj.factors[3] = torch.inf
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*finite"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_that_is_not_json_is_refused(tmp_path: Path) -> None:
    model = BUILDERS["llama"]()
    for value in (torch.zeros(1), float("nan")):
        model.mixcomp = Compiled(replace(PLAN, options={"budget": value}))
        with pytest.raises(InputError, match="plan cannot be written as JSON"):
            save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_its_config_does_not_build_is_not_saved(tmp_path: Path) -> None:
    model = BUILDERS["llama"]()
    model.model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ArtifactError, match=r"unexpected \['model\.extra'\]"):
        save(model, tmp_path / "out")

    class Mine(transformers.LlamaForCausalLM):
        pass

    mine = compiled(Mine(transformers.LlamaConfig(**LLAMA)))
    with pytest.raises(ArtifactError, match="'Mine' is not a model class"):
        save(mine, tmp_path / "out")
    model = BUILDERS["llama"]()
    model.config.auto_map = {"AutoModelForCausalLM": "modeling.Evil"}
    with pytest.raises(ArtifactError, match="auto_map"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- damage ---


def refused(folder: Path, names: str, checks: tuple[Callable[[Path], Any], ...] = (check_folder, load)) -> None:
    """Every check refuses the folder with an error of ours that matches ``names`` and says what to do."""
    for check in checks:
        with pytest.raises(MixCompError, match=names) as caught:
            check(folder)
        assert re.search(
            r"; (copy|save|compile|register|load|install|read|give|use)\b|mixcomp\.compile", str(caught.value)
        ), caught


def test_every_flipped_bit_is_found(folder: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    tried = 0
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        size = len(good)
        places = {0, 7, 8, size - 1, *torch.randint(size, (45,), generator=generator).tolist()}
        for number, place in enumerate(sorted(places)):
            bad = bytearray(good)
            bad[place] ^= 1 << int(torch.randint(8, (), generator=generator))
            path.write_bytes(bad)
            refused(folder, re.escape(path.name), (load,) if number % 8 == 0 else (check_folder,))
            tried += 1
        path.write_bytes(good)
    assert tried >= 300
    check_folder(folder)


def test_every_truncation_and_every_extra_byte_is_found(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for cut in sorted({0, 1, 7, 8, 9, len(good) // 3, len(good) // 2, len(good) - 8, len(good) - 1}):
            path.write_bytes(good[:cut])
            refused(folder, re.escape(path.name), (check_folder,))
        for extra in (b"\0", b" ", b"\n", good):
            path.write_bytes(good + extra)
            refused(folder, re.escape(path.name), (check_folder,))
        refused(folder, re.escape(path.name))
        path.write_bytes(good)


def test_a_missing_file_is_named(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        path.unlink()
        refused(folder, re.escape(path.name))
        path.write_bytes(good)


def test_a_damaged_tensor_is_named_with_its_bytes(folder: Path) -> None:
    shard = folder / "mixcomp-00002.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    listed = check_after_size(folder, shard.name)
    refused(folder, rf"mixcomp-00002\.safetensors.*{re.escape(listed)}.*bytes \d+ to {len(raw)} do not match", (load,))


def check_after_size(folder: Path, shard: str) -> str:
    """Name of the last tensor in a shard."""
    tensors = Manifest.from_bytes((folder / MANIFEST).read_bytes()).files[shard].tensors
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))[-1]


def test_swapped_shards_are_found(folder: Path) -> None:
    one, two = (folder / f"mixcomp-0000{i}.safetensors" for i in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    refused(folder, "mixcomp-0000")


def test_a_shard_from_another_save_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "SHARD_BYTES", 20_000)
    model = BUILDERS["llama-tied"]()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save(model, tmp_path / "other")
    last = sorted(folder.glob("*.safetensors"))[-1].name  # equal in size and header
    (folder / last).write_bytes((tmp_path / "other" / last).read_bytes())
    refused(folder, re.escape(last))
    refused(folder, r"model\.norm\.weight", (load,))


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    new("llama").save_pretrained(tmp_path / "plain")
    refused(tmp_path / "plain", r"has no mixcomp\.json.*mixcomp\.compile")
    refused(tmp_path / "absent", "is not a folder")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["mixcomp.json", "config.json", "mixcomp-00001.safetensors"])
def test_anything_but_regular_files_is_refused(folder: Path, tmp_path: Path, kind: str, name: str) -> None:
    path = folder / name
    path.rename(tmp_path / "aside")
    if kind == "link":
        path.symlink_to(tmp_path / "aside")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    refused(folder, re.escape(name))


# --- forgery: right digests, wrong meaning ---


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


DROP = object()
SHARD = "mixcomp-00001.safetensors"
SITE = "model.layers.0.self_attn.q_proj"
TENSOR = ("files", SHARD, "tensors", "model.embed_tokens.weight")


def repeat(data: dict[str, Any]) -> None:
    """List a tensor in a second file, which grows by it."""
    other = data["files"]["mixcomp-00002.safetensors"]
    other["tensors"][TENSOR[-1]] = data["files"][SHARD]["tensors"][TENSOR[-1]]
    listed = {
        name: shards.StoredTensor(shards.DTYPES[t["dtype"]], tuple(t["shape"])) for name, t in other["tensors"].items()
    }
    other["size"] = shards.file_size(listed)


FORGERIES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (put("format_version", 2), r"format version 2, this release reads version 1.*mixcomp '\d+\.\d+"),
    (put("format_version", 0), "format_version"),
    (put("format_version", "1"), "format_version"),
    (put("format_version", DROP), "format_version"),
    (put("surprise", 1), "surprise"),
    (put("ties", DROP), "ties"),
    (put("ties", []), "ties"),
    (put("versions", "torch", 5), "versions.torch"),
    (put("architecture", "os.system"), "architecture"),
    (put("architecture", "NoSuchModel"), "NoSuchModel"),
    (put("architecture", "GPT2LMHeadModel"), "GPT2LMHeadModel"),
    (put("architecture", "PreTrainedModel"), "PreTrainedModel"),
    (put("attention", "evil/kernel"), "attention"),
    (put("bits", "stored", 1), "bits"),
    (put("bits", "extra", 1), "bits"),
    (put("buffers", ["nowhere"]), "buffers"),
    (put("buffers", [3]), "buffers"),
    (put("ties", "lm_head.weight", "nowhere"), "ties.lm_head.weight"),
    (put("ties", "lm_head.weight", 3), "ties"),
    (put("ties", "model.norm.weight", "model.embed_tokens.weight"), "ties.model.norm.weight"),
    (put("ties", "extra.weight", "model.embed_tokens.weight"), "extra.weight"),
    (put("ties", {}), "lm_head.weight"),
    (put("files", "../config.json", {"size": 1, "sha256": "0" * 64}), r"\.\./config\.json"),
    (put("files", "/etc/passwd", {"size": 1, "sha256": "0" * 64}), "/etc/passwd"),
    (put("files", "a\\b", {"size": 1, "sha256": "0" * 64}), "plain name"),
    (put("files", "nul\0", {"size": 1, "sha256": "0" * 64}), "plain name"),
    (put("files", ".hidden", {"size": 1, "sha256": "0" * 64}), "plain name"),
    (put("files", "Config.json", {"size": 1, "sha256": "0" * 64}), "case"),
    (put("files", "mixcomp.json", {"size": 1, "sha256": "0" * 64}), "files"),
    (put("files", "config.json", DROP), "config.json"),
    (put("files", "config.json", "size", -1), "config.json"),
    (put("files", "config.json", "size", True), "config.json"),
    (put("files", "config.json", "size", 10**30), "config.json"),
    (put("files", "config.json", "sha256", "0" * 64), "config.json"),
    (put("files", "config.json", "sha256", "zz"), "config.json"),
    (put("files", "config.json", "tensors", {}), "config.json"),
    (put("files", SHARD, "tensors", {}), SHARD),
    (put("files", SHARD, "size", 3), SHARD),
    (put(*TENSOR, "dtype", "F32 "), "model.embed_tokens.weight"),
    (put(*TENSOR, "dtype", "I32"), SHARD),
    (put(*TENSOR, "shape", [-64, -64]), "model.embed_tokens.weight"),
    (put(*TENSOR, "shape", [2**63, 2**63]), "model.embed_tokens.weight"),
    (put(*TENSOR, "shape", [0, 2**63]), "model.embed_tokens.weight"),
    (put(*TENSOR, "shape", [64] * 9), "model.embed_tokens.weight"),
    (put(*TENSOR, "shape", [True, 4096]), "model.embed_tokens.weight"),
    (put(*TENSOR, "shape", [32, 128]), SHARD),
    (put(*TENSOR, "sha256", "0" * 64), SHARD),
    (repeat, "model.embed_tokens.weight.*one file only"),
    (put(*TENSOR, "sha256", "0"), "model.embed_tokens.weight"),
    (put("files", SHARD, "tensors", "n" * 1025, {}), "'tensors' is 'nnn.*1024 characters"),
    (put("sites", SITE, "format", "segments", [[64, 7]]), rf"{SITE}.*7"),
    (put("sites", SITE, "format", "segments", [[0, 4], [64, 4]]), SITE),
    (put("sites", SITE, "format", "segments", [[65, 4]]), SITE),
    (put("sites", SITE, "format", "rows", 10**18), SITE),
    (put("sites", SITE, "format", "rank", 65), SITE),
    (put("sites", SITE, "format", "rank", 0), SITE),
    (put("sites", SITE, "format", "scatter", 1), SITE),
    (put("sites", SITE, "format", "scatter", False), SITE),
    (put("sites", SITE, "format", "columns", 32), SITE),
    (put("sites", SITE, "format", "group", 32), SITE),
    (put("sites", SITE, "bias", "F32"), SITE),
    (put("sites", SITE, "bias", "I32"), SITE),
    (put("sites", SITE, "dtype", "U8"), SITE),
    (put("sites", SITE, "kernel", "x"), SITE),
    (put("sites", SITE, DROP), "bits"),
    (
        put(
            "sites",
            "model.norm",
            {"format": SiteFormat(1, 1, (Segment(1, 4),)).to_json(), "dtype": "F32", "bias": None},
        ),
        "model.norm",
    ),
    (put("sites", "", {"format": SiteFormat(1, 1, (Segment(1, 4),)).to_json(), "dtype": "F32", "bias": None}), "sites"),
]


@pytest.mark.parametrize(("change", "names"), FORGERIES, ids=range(len(FORGERIES)))
def test_forged_manifests_are_refused(folder: Path, change: Callable[[dict[str, Any]], None], names: str) -> None:
    forge(folder, change)
    refused(folder, names, (load,))


def test_the_forger_forges(folder: Path) -> None:
    """An unchanged manifest survives the forger, so the refusals above are not about its digest."""
    before = (folder / MANIFEST).read_bytes()
    forge(folder, lambda data: None)
    assert (folder / MANIFEST).read_bytes() == before
    load(folder)


def reseal(folder: Path, name: str, raw: bytes) -> None:
    """Replace a text file and list its new digest."""
    (folder / name).write_bytes(raw)
    forge(folder, put("files", name, {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}))


def edit(folder: Path, name: str, **fields: Any) -> None:
    reseal(folder, name, json.dumps(json.loads((folder / name).read_text()) | fields).encode())


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"text_config": {"deep": [{"auto_map": {}}]}}, "auto_map"),
        ({"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ({"_attn_implementation": "evil/kernel"}, "_attn_implementation"),
    ],
)
def test_configs_that_ask_for_code_are_refused(folder: Path, fields: dict[str, Any], names: str) -> None:
    edit(folder, "config.json", **fields)
    refused(folder, f"config.json.*{names}")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": None}, "model type None"),
        ({"model_type": "gpt2"}, "LlamaForCausalLM"),
        ({"hidden_size": 128}, "config.json"),
        ({"hidden_size": -64}, "config.json"),
        ({"hidden_size": "64"}, "config.json"),
        ({"intermediate_size": 10**12}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"intermediate_size": 96}, "stored as 64 x 80"),
        ({"num_hidden_layers": 1}, r"layers\.1\..*no linear there"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 10**9}, "more than"),
        ({"vocab_size": 65}, "model.embed_tokens.weight"),
        ({"hidden_act": "no-such-act"}, "config.json"),
    ],
)
def test_configs_of_other_models_are_refused(folder: Path, fields: dict[str, Any], names: str) -> None:
    edit(folder, "config.json", **fields)
    refused(folder, names, (load,))


def forge_tensor(folder: Path, key: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change a stored tensor and make every digest right again."""
    found = Manifest.from_bytes((folder / MANIFEST).read_bytes())
    name = next(n for n, file in found.files.items() if key in file.tensors)
    listed = found.files[name]
    with (folder / name).open("rb", buffering=0) as file:
        tensors = dict(shards.read(file, name, listed.tensors, listed.size))
    change(tensors[key])
    (folder / name).unlink()
    new_file = shards.write_shard(folder / name, tensors)
    forge(folder, put("files", name, new_file.to_json()))


@pytest.mark.parametrize(
    ("tensor", "change", "names"),
    [
        ("factors", lambda t: t.fill_(torch.inf), "factors"),
        ("factors", lambda t: t[5:6].fill_(torch.nan), "factors"),
        ("row_index", lambda t: t[:1].copy_(t[1:2]), "permutation"),
        ("row_index", lambda t: t.neg_(), "permutation"),
        ("branch_scale", lambda t: t.fill_(torch.nan), "scales"),
    ],
)
def test_stored_values_without_meaning_are_refused(
    folder: Path, tensor: str, change: Callable[[torch.Tensor], None], names: str
) -> None:
    forge_tensor(folder, f"{SITE}.{tensor}", change)
    refused(folder, f"{SITE}.*{names}")


@pytest.mark.parametrize(
    ("tensor", "change", "names"),
    [
        ("group_index", lambda t: t[0].zero_(), "group index 0 is not a permutation"),
        ("group_index", lambda t: t[0].copy_(t[0].flip(0)), "groups|zeros|short last group"),
        ("zeros", lambda t: t.fill_(255), "zeros exceed"),
        ("offsets", lambda t: t.fill_(torch.inf), "offsets"),
        ("factors", lambda t: t[3].fill_(torch.nan), "factors"),
    ],
)
def test_stored_values_of_other_forms_are_judged_too(
    shelf: Path, tmp_path: Path, tensor: str, change: Callable[[torch.Tensor], None], names: str
) -> None:
    folder = Path(shutil.copytree(shelf / "llama-forms", tmp_path / "out"))
    found = Manifest.from_bytes((folder / MANIFEST).read_bytes())
    site = next(n for n, s in found.sites.items() if s.fmt.scales is Scales.FLOAT_GROUP and s.fmt.group == 32)
    forge_tensor(folder, f"{site}.{tensor}", change)
    refused(folder, f"{site}.*({names})")


def test_only_other_forms_say_what_they_are(shelf: Path) -> None:
    """Folders of today's format are spelled as they always were."""
    for name in ("llama", "llama-forms"):
        data = json.loads((shelf / name / MANIFEST).read_text())
        keys = {key for site in data["sites"].values() for key in site["format"]}
        assert data["format_version"] == 1
        assert keys - {"rows", "columns", "segments", "scatter", "rank"} == (
            set() if name == "llama" else {"group", "scales"}
        )


def test_a_report_tells_mixed_rows_from_others() -> None:
    model = compiled(new("llama"), pack=form)
    model.mixcomp = Compiled(replace(PLAN, totals={"weights": 1, "payload_bits": 1, "stored_bits": 1}))
    report = describe(model)
    widths = [tuple(site.widths) for site in report.sites]
    assert {("1+4", "2+4", "8"), ("1", "4", "8")} <= set(widths)
    assert sum(report.rows_by_width().values()) == sum(site.rows for site in report.sites)
    assert {path for site in report.sites for path in site.paths.values()} == {"reference"}
    assert report.sites[0].stored_bits == model.get_submodule(report.sites[0].name).fmt.stored_bits()


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (b"", "not JSON"),
        (b'{"format_version": 1, "format_version": 1}', "twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
        (b'{"format_version": NaN}', "NaN"),
        (b'{"format_version": -Infinity}', "Infinity"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": ' + nested(40) + b"}", "deep"),
        (b'{"a": ' + nested(100_000) + b"}", "not JSON|deep"),
        (b"[" + b"0," * ((1 << 22) + 1) + b"0]", "entries"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a": "\xed\xa0\x80"}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
    ],
    ids=range(12),
)
def test_hostile_json_is_refused(folder: Path, raw: bytes, names: str) -> None:
    (folder / MANIFEST).write_bytes(raw)
    refused(folder, rf"mixcomp\.json.*({names})")
    with pytest.raises(ArtifactError, match=rf"config\.json.*({names})"):
        records.read_json(raw, "config.json")


@pytest.mark.parametrize("raw", [b"null", b"[]", b"3", b'"x"'])
def test_a_manifest_that_is_no_object_is_refused(folder: Path, raw: bytes) -> None:
    (folder / MANIFEST).write_bytes(raw)
    refused(folder, r"mixcomp\.json.*the whole.*an object")


def test_a_manifest_in_another_spelling_is_refused(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    refused(folder, "digest does not match")


def test_a_manifest_too_large_is_not_read(folder: Path) -> None:
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)  # a hole: no disk is used
    refused(folder, r"mixcomp\.json: 1099511627776 bytes")


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "meta", 3.5])
def test_devices_that_cannot_be_used_are_refused(shelf: Path, device: Any) -> None:
    with pytest.raises(ConfigError, match=f"device {device!r}"):
        load(shelf / "llama", device=device)


def test_formats_are_format_errors(folder: Path) -> None:
    forge(folder, put("sites", SITE, "format", "segments", [[64, 7]]))
    with pytest.raises(FormatError):
        load(folder)
