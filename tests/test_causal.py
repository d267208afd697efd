"""Attention that only hides the future is seen as such, anything else stays, and no function changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

import families
from mixcomp.capture import capture
from mixcomp.passes.causal import ATTENTION, causal_attention
from mixcomp.passes.stages import split
from mixcomp.program import Program

TOKENS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def causal(graph: fx.Graph) -> list[bool]:
    return [bool(n.kwargs.get("is_causal")) for n in graph.nodes if n.target is ATTENTION]


def logits(program: Program, tokens: torch.Tensor, length: int | None) -> torch.Tensor:
    stages = split(program, length=length)
    values = {stages.tokens: tokens}
    for part in stages.parts:
        values.update(part.run(values, {site.name: program.weight(site) for site in program.open_sites()}))
    return values[stages.logits]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
@torch.no_grad()
def test_masks_of_plain_decoders_go(family: str) -> None:
    program = capture(families.build(family))
    assert causal(program.graph_module.graph) == [False, False]
    graph = causal_attention(program.graph_module, 9)
    assert causal(graph) == [True, True]
    assert causal(program.graph_module.graph) == [False, False], "the program's graph stays"
    assert not [n for n in graph.nodes if getattr(n.meta.get("val"), "dtype", None) == torch.bool], (
        "nothing makes a mask"
    )
    torch.testing.assert_close(logits(program, TOKENS, 9), logits(program, TOKENS, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bloom"])  # position biases
@torch.no_grad()
def test_what_is_more_than_causal_stays(family: str) -> None:
    program = capture(families.build(family))
    assert not any(causal(causal_attention(program.graph_module, 9)))
    assert torch.equal(logits(program, TOKENS, 9), logits(program, TOKENS, None))


@torch.no_grad()
def test_a_window_that_slides_is_causal_until_it_does() -> None:
    model = families.build("mistral")
    size = model.config.sliding_window
    program = capture(model)
    for length, plain in ((size, True), (size + 1, False)):
        assert causal(causal_attention(program.graph_module, length)) == [plain, plain]
        tokens = torch.randint(0, 128, (2, length), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(logits(program, tokens, length), model(tokens).logits, rtol=1e-5, atol=1e-6)


def attending(mask: Callable[[torch.Tensor], Any], **options: Any) -> fx.GraphModule:
    """A graph of one attention whose mask is made of int64[batch, length] tokens."""

    class Attend(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = tokens[:, None, :, None].float().expand(-1, 1, -1, 4)
            return scaled_dot_product_attention(x, x, x, mask(tokens), **options)

    tokens, dynamic = torch.zeros(2, 5, dtype=torch.int64), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, at its export
        return torch.export.export(Attend(), (tokens,), dynamic_shapes=(dynamic,)).graph_module


def tril(tokens: torch.Tensor, diagonal: int = 0) -> torch.Tensor:
    at = torch.arange(tokens.shape[1])
    return at[None, :] <= at[:, None] + diagonal


LOWEST = torch.finfo(torch.float32).min
MASKS: dict[str, tuple[Callable[[torch.Tensor], Any], bool]] = {
    "bool": (tril, True),
    "added": (lambda t: torch.where(tril(t), 0.0, LOWEST), True),
    "added, infinite": (lambda t: torch.where(tril(t), 0.0, -torch.inf), True),
    "sees the next token": (lambda t: tril(t, 1), False),
    "does not see itself": (lambda t: tril(t, -1) | (tril(t) & ~tril(t, -1) & (torch.arange(t.shape[1]) != 4)), False),
    "a slope": (lambda t: torch.where(tril(t), torch.arange(t.shape[1]) * 0.1, LOWEST), False),
    "hides little": (lambda t: torch.where(tril(t), 0.0, -10.0), False),
    "reads tokens": (lambda t: tril(t)[None, None] & (t != 3)[:, None, None, :], False),
    "none": (lambda t: None, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_only_the_causal_mask_is_taken_for_it(name: str) -> None:
    mask, wanted = MASKS[name]
    module = attending(mask)
    graph = causal_attention(module, 7)
    assert causal(graph) == [wanted]
    tokens = torch.arange(14).view(2, 7)
    torch.testing.assert_close(fx.GraphModule(module, graph)(tokens), module(tokens))


def test_other_options_of_attention_stay() -> None:
    graph = causal_attention(attending(tril, scale=0.3), 7)
    (node,) = (n for n in graph.nodes if n.target is ATTENTION)
    assert node.kwargs == {"scale": 0.3, "is_causal": True}
    already = attending(lambda t: None, is_causal=True)
    assert [n.args[3:] for n in causal_attention(already, 7).nodes if n.target is ATTENTION] == [
        n.args[3:] for n in already.graph.nodes if n.target is ATTENTION
    ]
