"""Backward passes by parts reach every site with the gradients of the whole graph."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import families
from mixcomp.capture import capture
from mixcomp.passes import backward as module
from mixcomp.passes.backward import Backward
from mixcomp.passes.stages import Stage, Values
from mixcomp.passes.statistics import CollectStatistics
from mixcomp.passes.watch import FORWARD_TOKENS, Tap, sampled_residual
from mixcomp.program import Program
from mixcomp.protocol import Context
from nets import Net

CPU = torch.device("cpu")
#: plain, tied head, position table, parallel branches, alibi, post-norms, addmm
WIRED = ("llama", "llama-tied", "opt", "gpt_neox", "bloom", "gemma2", "gpt2")
TOKENS = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(0))


def by_layers(program: Program, monkeypatch: pytest.MonkeyPatch) -> Backward:
    """As for a model whose activations do not fit: one byte less than the whole graph takes."""
    whole = Backward.of(program, CPU)
    monkeypatch.setattr(
        module, "BACKWARD_BYTES", FORWARD_TOKENS["cpu"] * module._token_bytes(program, whole.stages) - 1
    )
    return Backward.of(program, CPU)


def gradients(backward: Backward) -> dict[str, list[torch.Tensor]]:
    """What every site reads and the gradients of what it makes, call by call."""
    found: dict[str, list[torch.Tensor]] = {}

    def see(name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        found.setdefault(name, []).extend((x, gradient))

    draw = Context().generator("labels", "0")
    backward.run(TOKENS, partial(sampled_residual, draw=draw), see)
    return found


@pytest.mark.parametrize("family", WIRED)
def test_gradients_are_those_of_the_whole_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(families.build(family))
    whole = Backward.of(program, CPU)
    parts = by_layers(program, monkeypatch)
    assert len(whole.stages.parts) == 1
    assert len(parts.stages.parts) > 3
    wanted, found = gradients(whole), gradients(parts)
    assert found.keys() == wanted.keys() == {s.name for s in program.open_sites()}
    for name, calls in wanted.items():
        assert all(torch.equal(a, b) for a, b in zip(calls, found[name], strict=True)), name


def test_only_one_part_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is run with gradients when all layers after it are through."""
    program = capture(families.build("llama", num_hidden_layers=4))
    backward = by_layers(program, monkeypatch)
    waiting: set[str] = set()
    begun: list[set[str]] = []
    run = Backward._watched

    def watched(self: Backward, part: Stage, values: Values, tap: Tap) -> Values:
        if torch.is_grad_enabled():
            assert not waiting, "an earlier layer's activations are still there"
            waiting.update(part.sites)
            begun.append(set(part.sites))
        return run(self, part, values, tap)

    monkeypatch.setattr(Backward, "_watched", watched)
    residual = partial(sampled_residual, draw=Context().generator("labels", "0"))
    backward.run(TOKENS, residual, lambda name, x, g: waiting.discard(name))
    assert not waiting
    assert [sites for sites in reversed(begun) if sites] == [set(part.sites) for part in backward.stages.parts[1:-1]]


def test_statistics_are_the_same_and_windows_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(families.build("llama"))
    context = Context(batches=(TOKENS,))
    wanted = CollectStatistics().run(program, context)
    assert by_layers(program, monkeypatch).tokens == FORWARD_TOKENS["cpu"]
    found = CollectStatistics().run(program, context)
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in wanted.tensors.items())


def test_what_no_part_can_hold_is_run_on_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(families.build("llama"))
    monkeypatch.setattr(module, "BACKWARD_BYTES", 1 << 16)
    backward = Backward.of(program, CPU)
    largest = module._token_bytes(program, backward.stages)
    assert 0 < backward.tokens < FORWARD_TOKENS["cpu"]
    assert backward.tokens * largest <= 1 << 16 < (backward.tokens + 1) * largest


class Skipping(Net):
    """Both later layers read what the first one makes."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        one, two, three, head = self.layers
        first = one(self.embed(ids))
        return head(three(two(first).relu() + first))


def test_gradients_of_a_value_that_two_layers_read_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (torch.nn.Sequential(torch.nn.Linear(32, 32)) for _ in range(4))
    program = capture(Skipping(*layers).eval())
    wanted = gradients(Backward.of(program, CPU))
    found = gradients(by_layers(program, monkeypatch))
    assert len(wanted) == 4
    for name, (_, gradient) in wanted.items():
        torch.testing.assert_close(found[name][1], gradient, rtol=1e-5, atol=1e-7)
