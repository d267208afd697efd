"""Cutting a graph at its layers changes nothing that it computes."""

from __future__ import annotations

import pytest
import torch

import families
from mixcomp.capture import capture
from mixcomp.passes.stages import split
from programs import Blueprint, Kind, Layer, build

#: one of each way to wire a layer: plain, tied head, position table, parallel branches, alibi, post-norms, addmm
WIRED = ("llama", "llama-tied", "opt", "gpt_neox", "bloom", "gemma2", "gpt2")
TOKENS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", WIRED)
@torch.no_grad()
def test_stages_one_after_another_are_the_model(family: str) -> None:
    model = families.build(family)
    program = capture(model)
    stages = split(program)
    weights = {site.name: program.weight(site) for site in program.open_sites()}
    assert len(stages.layers) == model.config.num_hidden_layers
    values = {stages.tokens: TOKENS}
    for part in stages.parts:
        values.update(part.run(values, weights))
    assert torch.equal(values[stages.logits], model(TOKENS).logits)
    # every site is called in exactly one layer, and one hidden state leads from layer to layer
    assert sorted(name for part in stages.parts for name in part.sites) == sorted(weights)
    assert [len(stages.live(k + 1)) for k in stages.layers] == [1] * len(stages.layers)


@torch.no_grad()
def test_the_weights_handed_in_are_the_ones_used() -> None:
    program = capture(families.build("gpt2"))
    stages = split(program)
    zero = {site.name: torch.zeros(site.rows, site.columns) for site in program.open_sites()}
    own = {site.name: program.weight(site) for site in program.open_sites()}
    before, after = (stages.forward(lambda _, w=w: w, TOKENS) for w in (own, zero))
    (end,) = stages.live(len(stages.parts) - 1)
    assert len(before) == len(after) == len(TOKENS)
    assert not any(torch.equal(one[end], two[end]) for one, two in zip(before, after, strict=True))
    assert set(before[0]) == set(stages.parts[-1].inputs), "what nothing reads any more is dropped"


@torch.no_grad()
def test_a_graph_without_layers_is_one_layer() -> None:
    program = build(Blueprint((Layer(Kind.PLAIN, 24),), width=16))
    for node in program.graph_module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    stages = split(program)
    assert len(stages.parts) == 3
    values = {stages.tokens: torch.tensor([[1, 2]])}
    for part in stages.parts:
        values.update(part.run(values, {site.name: program.weight(site) for site in program.open_sites()}))
    assert torch.equal(values[stages.logits], program.graph_module(torch.tensor([[1, 2]])))
