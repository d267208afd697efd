"""Channels that can be scaled: found where they should be, and scaling them for real changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

import families
from features import Chain, Model, attention, heads, merged
from mixcomp.capture import capture
from mixcomp.passes.channels import Channels, scalable
from mixcomp.program import Program

aten = torch.ops.aten
EXACT = {torch.float64: 1e-9, torch.float32: 1e-4}
#: families whose graphs name fp32
ONLY_SINGLE = ("gemma2", "bloom")
#: most of a mixture's weights are experts, which stay as they are
COVERAGE = 0.1

#: family -> source > readers, block, repeats of its first layer
EXPECTED: dict[str, set[str]] = {
    "llama": {
        "input_layernorm > q_proj k_proj v_proj 64 1",
        "v_proj > o_proj 16 2",
        "post_attention_layernorm > gate_proj up_proj 64 1",
        "up_proj > down_proj 128 1",
    },
    # v has a bias
    "qwen2": {
        "input_layernorm > q_proj k_proj v_proj 64 1",
        "post_attention_layernorm > gate_proj up_proj 64 1",
        "up_proj > down_proj 128 1",
    },
    # norms after attention and MLP feed the residual stream; 1 + w
    "gemma2": {
        "input_layernorm+1 > q_proj k_proj v_proj 64 1",
        "v_proj > o_proj 16 2",
        "pre_feedforward_layernorm+1 > gate_proj up_proj 64 1",
        "up_proj > down_proj 128 1",
    },
    # gate and up are one linear, and so are q, k and v
    "phi3": {"input_layernorm > qkv_proj 64 1", "post_attention_layernorm > gate_up_proj 64 1"},
    # norms with a bias, and biases everywhere
    "gpt2": {"ln_1 > c_attn 64 1", "ln_2 > c_fc 64 1"},
    # one norm for both branches
    "phi": {"input_layernorm > q_proj k_proj v_proj fc1 64 1"},
    # norms come after the linears only
    "olmo2": {"v_proj > o_proj 18 2", "up_proj > down_proj 100 1"},
    # the router reads what the experts read, and stays as it is
    "mixtral": {"input_layernorm > q_proj k_proj v_proj 64 1", "v_proj > o_proj 16 2"},
}
FAMILIES = (*EXPECTED, "llama-tied", "gpt_neox", "bloom", "falcon", "glm4", "qwen3_moe")


def text(channels: Channels) -> str:
    """``"input_layernorm > q_proj k_proj v_proj 64 1"``"""
    source = channels.site or channels.norm[0].path.rpartition(".")[0]
    added = f"+{channels.norm[0].constant:g}" if channels.norm and channels.norm[0].constant else ""
    readers = " ".join(name.split(".")[-1] for name in channels.readers)
    return f"{source.split('.')[-1]}{added} > {readers} {channels.block} {channels.repeats}"


def scale(model: Model, channels: Channels, seed: int) -> None:
    """Scale real weights by factors between 1/4 and 4."""
    draw = torch.Generator().manual_seed(seed)
    dtype = next(w.dtype for w in model.weights.values() if w.is_floating_point())
    s = 4 ** (2 * torch.rand(channels.count, generator=draw, dtype=torch.float64) - 1).to(dtype)
    for vector in channels.norm:
        model.weights[vector.path] = (model.weights[vector.path] + vector.constant) / s - vector.constant
    for name, factors, axis in (
        *((reader, s[channels.columns()], 1) for reader in channels.readers),
        *([(channels.site, 1 / s, 0)] if channels.site else []),
    ):
        site = model.program.site(name)
        key = model.program.graph_key(site)
        shape = (-1, 1) if (axis == 0) != site.weight.transposed else (1, -1)
        model.weights[key] = model.weights[key] * factors.view(shape)


def assert_scaling_changes_nothing(
    program: Program, found: tuple[Channels, ...], dtype: torch.dtype = torch.float64
) -> None:
    model = Model(program, dtype)
    expected = model.outputs()
    for seed, channels in enumerate(found):
        scale(model, channels, seed)
    assert torch.allclose(model.outputs(), expected, rtol=0.0, atol=EXACT[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_real_architectures(family: str) -> None:
    program = capture(families.build(family), min_coverage=COVERAGE)
    found = scalable(program)
    first = {text(c) for c in found if any(".0." in name for name in c.readers)}
    assert first == EXPECTED.get(family, first)
    readers = [name for c in found for name in c.readers]
    assert len(set(readers)) == len(readers)
    assert_scaling_changes_nothing(program, found, torch.float32 if family in ONLY_SINGLE else torch.float64)


Between = Callable[[Chain, fx.Node], fx.Node]


def chain_of(between: Between) -> Program:
    chain = Chain()
    return chain.finish(between(chain, chain.site(chain.x, "a")))


PASSING: dict[str, Between] = {
    "nothing": lambda c, x: x,
    "a gate": lambda c, x: c.call(aten.mul.Tensor, c.call(aten.sigmoid.default, c.site(c.x, "gate")), x),
    "a number": lambda c, x: c.call(aten.mul.Tensor, x, 0.5),
    "divided": lambda c, x: c.call(aten.div.Tensor, x, 3.0),
    "negated": lambda c, x: c.call(aten.neg.default, x),
    "relu": lambda c, x: c.call(aten.relu.default, x),
    "a factor for each feature": lambda c, x: c.call(aten.mul.Tensor, x, c.vector("s", 12)),
    "heads and back": lambda c, x: merged(c, c.call(aten.transpose.int, heads(c, x), 1, 2)),
    "attention weights": lambda c, x: merged(
        c, c.call(aten.transpose.int, c.call(aten.matmul.default, c.vector("p", 2, 3, 5, 5), heads(c, x)), 1, 2)
    ),
}


@pytest.mark.parametrize("case", PASSING)
def test_factors_pass_what_is_linear_in_them(case: str) -> None:
    program = chain_of(PASSING[case])
    (found,) = scalable(program)
    assert (found.site, found.readers) == ("a", ("b",))
    assert_scaling_changes_nothing(program, (found,))


STOPPED: dict[str, Between] = {
    "an activation": lambda c, x: c.call(aten.silu.default, x),
    "a number added": lambda c, x: c.call(aten.add.Tensor, x, 1.0),
    "itself": lambda c, x: c.call(aten.mul.Tensor, x, x),
    "what follows from it": lambda c, x: c.call(aten.mul.Tensor, x, c.call(aten.sigmoid.default, x)),
    "divided by it": lambda c, x: c.call(aten.div.Tensor, c.vector("n", 12), x),
    "two sites": lambda c, x: c.call(aten.mul.Tensor, x, c.site(c.x, "other")),
    "a softmax": lambda c, x: c.call(aten.softmax.int, x, -1),
    "features mixed": lambda c, x: c.call(aten.cat.default, [x, x], -1),
    "only a part": lambda c, x: c.call(aten.slice.Tensor, x, 2, 0, 6),
}


@pytest.mark.parametrize("case", STOPPED)
def test_factors_stop_at_anything_else(case: str) -> None:
    assert not [c for c in scalable(chain_of(STOPPED[case])) if "b" in c.readers]


def test_whatever_else_reads_the_channels_holds_them() -> None:
    chain = Chain()
    made = chain.site(chain.x, "a")
    assert not scalable(chain.finish(made, made))
    chain = Chain()
    made = chain.site(chain.x, "a")
    chain.site(made, "aside", in_scope=False)
    assert not scalable(chain.finish(made))


@pytest.mark.parametrize("copies", [1, 2])
def test_heads_that_share_values_share_factors(copies: int) -> None:
    program = attention(copies)
    (found,) = scalable(program)
    assert (found.site, found.readers, found.block, found.repeats) == ("v", ("b",), 12 if copies == 1 else 4, copies)
    assert_scaling_changes_nothing(program, (found,))


def test_columns_say_which_channel_they_read() -> None:
    found = Channels(4, ("reader",), block=2, repeats=2).columns()
    assert found.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
