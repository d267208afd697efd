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

from artifacts import BUILDERS, LLAMA, PLAN, TOKENS, as_on_gpu, compiled, content, logits, new
from mixcomp import artifact, files, skeleton
from mixcomp.artifact import check_folder, load, save
from mixcomp.errors import ArtifactError, InputError, StorageError
from mixcomp.lowering.module import MixedLinear
from mixcomp.manifest import MANIFEST
from mixcomp.plans import Compiled

pytest_plugins = ["artifacts"]

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


@pytest.mark.parametrize("name", BUILDERS)
def test_models_that_hold_fragments_are_stored_the_same(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wanted = logits(load(shelf / name))
    as_on_gpu(monkeypatch)
    model = load(shelf / name)
    layers = [m for m in model.modules() if isinstance(m, MixedLinear) and not m.fmt.departure]
    assert {m.codes.dtype for m in layers} == ({torch.int32} if name != "llama-forms" else set())
    assert torch.equal(logits(model), wanted)
    save(model, tmp_path / "out")
    assert content(tmp_path / "out") == content(shelf / name)


def test_two_paths_to_one_layer_of_fragments_are_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_gpu(monkeypatch)
    test_two_paths_to_one_layer_are_stored_once(tmp_path)


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
