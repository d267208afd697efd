"""Models by name or folder, as the command line takes them: originals through transformers, compiled through us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mixcomp.errors import ConfigError, InputError


def pick_device(asked: str | None) -> str:
    """The device asked for, or the GPU where there is one, or the CPU."""
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(asked).type
    except RuntimeError:
        raise ConfigError(f"device {asked!r} is unknown; give cpu, cuda or cuda:0") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {asked!r} is asked for and no GPU is to be had; give cpu")
    return asked


def load_original(name: str, device: str) -> Any:
    """A language model from a folder or a hub name, in its own dtype, from safetensors only; no remote code."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        load = AutoModelForCausalLM.from_pretrained
        model: Any = load(name, dtype="auto", use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model {name!r} cannot be loaded: {reason}; give the folder of a transformers model"
        ) from error
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or a hub name, or None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None


def is_compiled(name: str) -> bool:
    """Whether ``name`` is a folder whose config says that MixComp wrote it."""
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(settings, dict) and settings.get("quant_method") == "mixcomp"


def load_any(name: str, device: str) -> Any:
    """A compiled folder if it is one, an original model otherwise."""
    if not is_compiled(name):
        return load_original(name, device)
    from mixcomp import artifact

    return artifact.load(Path(name), device=device)
