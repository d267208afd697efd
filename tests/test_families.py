"""Families of models are captured whole, or refused for their stacked experts.  ``test_capture`` has three more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families import build
from mixcomp import verify
from mixcomp.capture import capture
from mixcomp.errors import CaptureError

#: family -> layers: one, or two where they alternate.  Of families that build the same graph one stands for all.
DISTINCT = {
    "bloom": 1,  # ALiBi, fused q/k/v, baddbmm
    "cohere": 1,  # attention and MLP side by side, scaled logits
    "gemma3": 2,  # full and sliding attention
    "glm4": 1,  # fused gate and up, four norms
    "gpt_neox": 1,  # fused q/k/v split inside every head
    "olmo2": 1,  # sizes no group of 32 divides
    "opt": 1,  # learned positions
    "phi3": 1,  # fused q/k/v and gate/up, cut apart
    "qwen3": 1,  # norms inside every head
}


@pytest.mark.parametrize("family", DISTINCT)
def test_captured_whole(family: str) -> None:
    model = build(family, num_hidden_layers=DISTINCT[family])
    program = capture(model)
    verify.check(program)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {s.name for s in program.sites} == linears
    assert {s.name for s in program.sites if not s.open} == {"lm_head"}
    tokens = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = model(tokens).logits, program.graph_module(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_mixture_is_refused_for_its_stacked_experts() -> None:
    with pytest.raises(CaptureError, match=r"experts\.gate_up_proj .* a stacked weight"):
        capture(build("qwen3_moe", num_hidden_layers=1))
