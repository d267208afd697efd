"""Families of models compiled near losslessly: logits stay those of the original, on the fast path and on the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mixcomp
from families import build
from mixcomp.lowering import ops
from mixcomp.lowering.module import MixedLinear
from mixcomp.lowering.select import Path

#: family -> layers, as few as show what is its own: one, or two where they alternate
WHOLE = {
    "llama": 2,
    "mistral": 1,
    "qwen2": 1,
    "qwen3": 1,
    "gemma2": 2,
    "phi": 1,
    "phi3": 1,
    "olmo2": 1,
    "starcoder2": 1,
    "gpt2": 2,
    "gpt_neox": 1,
    "opt": 1,
    "falcon": 1,
    "bloom": 1,
}


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("family", WHOLE)
def test_compiled_near_losslessly(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build(family, num_hidden_layers=WHOLE[family])
    draw = torch.Generator().manual_seed(0)
    text, tokens = torch.randint(3, 128, (8, 32), generator=draw), torch.randint(3, 128, (2, 21), generator=draw)
    wanted = logits(original, tokens)
    model = mixcomp.compile(original, 8.0, calibration=[text], copy=True)
    linears = sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in original.modules())
    compiled = [m for m in model.modules() if isinstance(m, MixedLinear)]
    assert len(compiled) == linears - 1  # all but the head
    fast = logits(model, tokens)
    assert distance(fast, wanted) < 0.03
    monkeypatch.setattr(ops, "choose_path", lambda *_: Path.REFERENCE)
    assert distance(fast, logits(model, tokens)) < 1e-5
    assert model.generate(tokens[:1], max_new_tokens=2, do_sample=False).shape == (1, 23)  # type: ignore[operator]
