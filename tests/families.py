"""Tiny random language models of many families, for capture and end-to-end tests.

Hidden size 64, two layers, 128 tokens, seeded; ``smollm3`` and ``olmo2`` have sizes that no group of 32 divides.
Every builder leaves the global random state as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
HEADS_OF_16 = {**GROUPED, "head_dim": 16}
RAGGED = {**GROUPED, "hidden_size": 72, "intermediate_size": 100}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROTATE_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

#: family -> (class name before "ForCausalLM" and "Config", options of the config)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama-tied": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "llama-bias": ("Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", HEADS_OF_16),
    "gemma2": ("Gemma2", {**HEADS_OF_16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {**HEADS_OF_16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi": ("Phi", COMMON),
    "phi3": ("Phi3", GROUPED),
    "olmo2": ("Olmo2", RAGGED),
    "smollm3": ("SmolLM3", RAGGED),
    "granite": ("Granite", GROUPED),
    "glm4": ("Glm4", {**HEADS_OF_16, "rope_parameters": ROTATE_HALF}),
    "starcoder2": ("Starcoder2", GROUPED),
    "stablelm": ("StableLm", GROUPED),
    "cohere": ("Cohere", GROUPED),
    "nemotron": ("Nemotron", {**GROUPED, "head_dim": 16}),
    "gpt2": ("GPT2", COMMON),
    "gpt_neox": ("GPTNeoX", COMMON),
    "opt": ("OPT", {**COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bloom": ("Bloom", COMMON),
    "falcon": ("Falcon", {**COMMON, "bias": True, "new_decoder_architecture": False, "alibi": False}),
    "mixtral": ("Mixtral", {**GROUPED, **EXPERTS}),
    "qwen3_moe": ("Qwen3Moe", {**HEADS_OF_16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
}


def build(family: str, **options: Any) -> PreTrainedModel:
    """A seeded random model of ``family`` in eval mode; ``options`` override fields of its config."""
    name, defaults = CONFIGS[family]
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = config_class(**{"tie_word_embeddings": False, **defaults, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _model_class(name)(config).eval()


def _model_class(name: str) -> type[PreTrainedModel]:
    return getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")


def _builder(family: str) -> Callable[[], PreTrainedModel]:
    return lambda: build(family)


#: family -> zero-argument builder
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {family: _builder(family) for family in CONFIGS}
