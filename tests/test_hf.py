"""``AutoModelForCausalLM.from_pretrained`` reads what ``save`` wrote, as exactly as ``load`` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from artifacts import BUILDERS, SHARD, TOKENS, as_on_gpu, content, logits, reseal
from mixcomp import artifact, hf, hook
from mixcomp.errors import ArtifactError, ConfigError
from mixcomp.lowering.module import MixedLinear
from mixcomp.manifest import INDEX


@pytest.fixture(autouse=True)
def _registered() -> None:
    hf.register()
    hf.register()


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Save one of the models in several shards; returns the folder."""
    monkeypatch.setattr(artifact, "SHARD_BYTES", 60_000)

    def saved(name: str) -> Path:
        artifact.save(BUILDERS[name](), tmp_path / name)
        return tmp_path / name

    return saved


@pytest.mark.parametrize("name", BUILDERS)
def test_from_pretrained_gives_the_saved_model(save: Callable[[str], Path], name: str) -> None:
    folder, before = save(name), BUILDERS[name]()
    after, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert type(after) is type(before)
    state = after.state_dict()
    for key, tensor in before.state_dict().items():
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key
    assert torch.equal(logits(after), logits(before))
    assert after.mixcomp.plan == before.mixcomp.plan
    assert after.generate(TOKENS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 10)
    artifact.save(after, folder.parent / "again")
    assert content(folder.parent / "again") == content(folder)


def test_from_pretrained_leaves_the_form_of_the_device(
    save: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = save("llama"), BUILDERS["llama"]()
    as_on_gpu(monkeypatch)
    after = AutoModelForCausalLM.from_pretrained(folder)
    assert {m.codes.dtype for m in after.modules() if isinstance(m, MixedLinear)} == {torch.int32}
    assert torch.equal(logits(after), logits(before))


def test_save_pretrained_refuses(save: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(save("llama"))
    with pytest.raises(ValueError, match="mixcomp and is not serializable"):
        model.save_pretrained(Path("never"))


def test_another_dtype_is_refused(save: Callable[[str], Path]) -> None:
    folder = save("llama")
    with pytest.raises(ConfigError, match=r"dtype torch\.float16: the folder holds torch\.float32"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


def test_damage_is_found(save: Callable[[str], Path]) -> None:
    folder = save("llama")
    shard = folder / SHARD
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"tensor '.*': transformers did not load what is stored"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_index_that_leads_elsewhere_is_refused(save: Callable[[str], Path]) -> None:
    folder, other = save("llama"), save("llama-tied")
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = f"../{other.name}/{SHARD}"
    reseal(folder, INDEX, json.dumps(index).encode())
    with pytest.raises((ArtifactError, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_plain_models_cannot_be_given_the_method(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(BUILDERS["llama"]().config).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=hf.MixCompConfig())


def test_the_hook_registers_at_once_where_transformers_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    finders = list(sys.meta_path)
    calls = []
    monkeypatch.setattr(hf, "register", lambda: calls.append(1))
    hook.register_when_imported()
    assert calls == [1]
    assert sys.meta_path == finders


def test_a_failing_registration_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("moved")

    monkeypatch.setattr(hf, "register", fail)
    with pytest.warns(UserWarning, match=r"moved.*mixcomp\.load"):
        hook.register_when_imported()
