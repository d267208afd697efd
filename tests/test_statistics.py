"""Second moments and output sensitivity against direct fp64 sums and finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mixcomp import manager
from mixcomp.errors import CalibrationError
from mixcomp.ops import LINEAR
from mixcomp.passes.statistics import CollectStatistics
from mixcomp.passes.watch import sampled_residual
from mixcomp.program import META, Program
from mixcomp.protocol import Context
from programs import Blueprint, Kind, Layer, build

TWO = Blueprint((Layer(Kind.GATED, 24), Layer(Kind.PLAIN, 20, bias=True)), width=16, vocab=11)


def batch(samples: int = 6, length: int = 8, vocab: int = 11) -> torch.Tensor:
    return torch.randint(vocab, (samples, length), generator=torch.Generator().manual_seed(3))


def collect(program: Program, *batches: torch.Tensor, tokens: int = 10**6) -> Program:
    return CollectStatistics(tokens).run(program, Context(batches=batches))


def watched(program: Program, ids: torch.Tensor, number: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and gradients of every site, fp64[tokens, ...] each, read node by node from the graph of batch ``number``."""
    values: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    class Reader(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            y = super().run_node(n)
            if n.target is LINEAR:
                x = self.fetch_args_kwargs_from_env(n)[0][0]
                y.retain_grad()
                values[n.meta[META]] = (x, y)
            return y

    logits = Reader(program.graph_module).run(ids)
    logits.backward(sampled_residual(logits.detach(), Context().generator("collect-statistics", f"labels {number}")))
    program.graph_module.zero_grad()
    return {name: tuple(t.flatten(0, -2).detach().double() for t in (x, y.grad)) for name, (x, y) in values.items()}


@pytest.mark.parametrize("gradient_tokens", [10**6, 24])
def test_moments_are_means_of_outer_products_weighted_by_gradients(gradient_tokens: int) -> None:
    """Tokens that take no part in the backward pass (the second case) count once."""
    program, ids = build(TWO), batch()
    with_gradients, without = ids[: gradient_tokens // 8], ids[gradient_tokens // 8 :]
    found = collect(program, ids, tokens=gradient_tokens)
    sums: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, (x, g) in watched(program, with_gradients, 0).items():
        if name == "lm_head":
            continue
        torch.testing.assert_close(found.tensor(name, "gamma").double(), g.square().mean(0), rtol=1e-4, atol=1e-9)
        strength = g.norm(dim=1)
        sums.setdefault(program.site(name).input, []).append((x, strength / strength.mean()))
        if len(without):
            x, _ = watched(program, without, 1)[name]
            sums[program.site(name).input].append((x, torch.ones(len(x)).double()))
    for name, parts in sums.items():
        wanted = sum(x.T @ (x * w[:, None]) for x, w in parts) / sum(w.sum() for _, w in parts)
        torch.testing.assert_close(found.tensor(name, "sigma").double(), wanted, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(wanted, sum(x.T @ x for x, _ in parts) / sum(map(len, (x for x, _ in parts))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_large_moments_wait_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    program, context = build(TWO), Context(torch.device("cuda"), (batch().cuda(), batch(3).cuda()))
    program.graph_module.to("cuda")
    near = CollectStatistics(24).run(program, context)
    monkeypatch.setattr("mixcomp.passes.statistics.MOMENT_BYTES", 0)
    far = CollectStatistics(24).run(program, context)
    for key, tensor in near.tensors.items():
        assert torch.equal(far.tensors[key].cuda(), tensor)
        assert far.tensors[key].is_cuda != key.endswith("/sigma")
    manager.run(program, (CollectStatistics(24),), context)  # its laws hold there too


def test_labels_are_drawn_from_the_model() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(20000, 4).contiguous()
    found = sampled_residual(logits, torch.Generator().manual_seed(5))
    p = logits[0].softmax(0)
    assert torch.allclose((p - found).sum(1), torch.ones(20000), atol=1e-5)  # one label a token
    torch.testing.assert_close((p - found).mean(0), p, rtol=0, atol=0.02)
    again = sampled_residual(logits, torch.Generator().manual_seed(5))
    assert torch.equal(found, again)


def test_how_the_text_is_cut_into_batches_does_not_matter() -> None:
    ids = batch(8)
    whole, parts = collect(build(TWO), ids), collect(build(TWO), ids[:3], ids[3:])
    for key, tensor in whole.tensors.items():
        if key.endswith("sigma"):
            torch.testing.assert_close(parts.tensors[key], tensor, rtol=1e-5, atol=1e-7)


def test_gamma_predicts_the_loss_of_a_perturbed_output() -> None:
    """Adding e to output c of every token raises the KL by 1/2 gamma_c e^2 (Fisher), checked by finite differences."""
    program = build(Blueprint((Layer(Kind.PLAIN, 12, bias=True),), width=16, vocab=11, seed=1))
    ids = batch(512, 16)
    found = collect(program, ids).tensor("layers.0.proj", "gamma").double()
    bias = program.graph_module.get_parameter("layers.0.proj.bias")
    with torch.no_grad():
        base = torch.log_softmax(program.graph_module(ids).double(), -1)
    alive = [c for c in range(12) if float(found[c]) > 0.02 * float(found.max())]
    assert len(alive) >= 4
    for c in alive:
        kl = 0.0
        for sign in (1, -1):
            with torch.no_grad():
                bias[c] += sign * 0.02
                moved = torch.log_softmax(program.graph_module(ids).double(), -1)
                bias[c] -= sign * 0.02
            kl += float((base.exp() * (base - moved)).sum(-1).mean()) / 2
        assert kl == pytest.approx(float(found[c]) * 0.02**2 / 2, rel=0.2), c


def test_a_shared_activation_has_one_sigma_and_calls_add_up() -> None:
    program = build(Blueprint((Layer(Kind.GATED, 8), Layer(Kind.REUSED, 8)), width=16, vocab=11))
    found = collect(program, batch())
    assert program.site("layers.0.up").input == program.site("layers.0.gate").input
    assert sum(key.endswith("/sigma") for key in found.tensors) == len({s.input for s in program.open_sites()})


def test_parameters_get_no_gradients_and_nothing_is_left_behind() -> None:
    program = build(TWO)
    state = torch.random.get_rng_state()
    collect(program, batch())
    assert all(p.grad is None for p in program.graph_module.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_16_bit_model_is_measured_in_fp32() -> None:
    """bf16 weights on a CPU: the same numbers as an fp32 model that holds the same weights, to fp32 rounding."""
    layers = (Layer(Kind.GATED, 24, dtype=torch.bfloat16), Layer(Kind.PLAIN, 20, dtype=torch.bfloat16))
    narrow = build(Blueprint(layers, width=16, vocab=11))
    wide = build(
        replace(Blueprint(layers, width=16, vocab=11), layers=tuple(replace(x, dtype=torch.float32) for x in layers))
    )
    with torch.no_grad():
        for name, parameter in narrow.graph_module.named_parameters():
            wide.graph_module.get_parameter(name).copy_(parameter)
    one, two = collect(narrow, batch()), collect(wide, batch())
    for site in narrow.open_sites():
        other = two.tensor(wide.site(site.name).input, "sigma")
        torch.testing.assert_close(one.tensor(site.input, "sigma"), other, rtol=1e-5, atol=1e-6)


def test_nan_on_the_way_is_named() -> None:
    program = build(TWO)
    with torch.no_grad():
        nn.init.constant_(program.graph_module.embed.weight, torch.inf)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        collect(program, batch())
    with pytest.raises(CalibrationError, match="no calibration tokens"):
        collect(build(TWO))
