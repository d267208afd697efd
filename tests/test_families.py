"""Every family can be captured whole, or is refused for its stacked experts; families of ``test_capture`` left out."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build
from torch import nn

from mixcomp import verify
from mixcomp.capture import capture
from mixcomp.errors import CaptureError

MIXTURES = {"mixtral", "qwen3_moe"}
ELSEWHERE = {"llama-tied", "gpt2", "falcon", "mixtral"}
#: families whose layers alternate need two of them
LAYERS = {"gemma2": 2, "gemma3": 2}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - MIXTURES - ELSEWHERE))
def test_captured_whole(family: str) -> None:
    model = build(family, num_hidden_layers=LAYERS.get(family, 1))
    program = capture(model)
    verify.check(program)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {s.name for s in program.sites} == linears
    assert {s.name for s in program.sites if not s.open} == {"lm_head"}
    tokens = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = model(tokens).logits, program.graph_module(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(MIXTURES - ELSEWHERE))
def test_mixtures_are_refused(family: str) -> None:
    with pytest.raises(CaptureError, match="a stacked weight"):
        capture(build(family, num_hidden_layers=1))
