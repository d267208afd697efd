from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import prod
from operator import mul

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import families
from features import Chain, Model, attention, heads, merged, shuffle
from mixcomp.capture import capture
from mixcomp.passes import axes, flows
from mixcomp.passes.axes import Layout, Part
from mixcomp.passes.coupling import Absorption, Couplings, analyse
from mixcomp.program import Program
from programs import Blueprint, Kind, Layer, build

aten = torch.ops.aten
EXACT = {"rtol": 0.0, "atol": 1e-10}

MLP = "gate_proj up_proj > down_proj 128 1"
#: family -> options of its one-layer model, and what it can absorb: producers > consumers, block, repeats
EXPECTED: dict[str, tuple[dict[str, int], set[str]]] = {
    "llama": ({"num_hidden_layers": 1}, {MLP, "v_proj > o_proj 16 2"}),
    "qwen2": ({"num_hidden_layers": 1, "num_key_value_heads": 1}, {MLP, "v_proj > o_proj 16 4"}),
    "gpt2": ({"n_layer": 1}, {"c_fc > c_proj 256 1"}),
    "opt": ({"num_hidden_layers": 1}, {"fc1 > fc2 128 1", "v_proj > out_proj 16 1"}),
}


def text(absorption: Absorption) -> str:
    """``"gate_proj up_proj > down_proj 128 1"``"""
    producers, consumers = (
        " ".join(name.split(".")[-1] for name in names) for names in (absorption.producers, absorption.consumers)
    )
    return f"{producers} > {consumers} {absorption.block} {absorption.repeats}"


def keeps_outputs(program: Program, absorption: Absorption, order: torch.Tensor) -> bool:
    return torch.allclose(Model(program).absorb(absorption, order).outputs(), Model(program).outputs(), **EXACT)


def assert_oracle_agrees(program: Program, couplings: Couplings) -> None:
    """Permute real weights: absorbed orders change nothing, any order of a scattered site alone does."""
    for absorption in couplings.absorptions:
        for seed in range(2):
            assert keeps_outputs(program, absorption, shuffle(absorption.rows, absorption.block, seed)), absorption
    expected = Model(program).outputs()
    for name, reason in couplings.scattered.items():
        site = program.site(name)
        if site.rows > 1:
            changed = Model(program).permute_rows(site, shuffle(site.rows, site.rows)).outputs()
            assert not torch.allclose(changed, expected, **EXACT), (name, reason)


@pytest.mark.parametrize("family", EXPECTED)
def test_real_architectures(family: str) -> None:
    options, expected = EXPECTED[family]
    program = capture(families.build(family, **options))
    couplings = analyse(program)
    assert {text(a) for a in couplings.absorptions} == expected
    producers = [name for a in couplings.absorptions for name in a.producers]
    assert sorted([*producers, *couplings.scattered]) == sorted(s.name for s in program.open_sites())
    assert_oracle_agrees(program, couplings)


def chain_of(between: Callable[[Chain, fx.Node], fx.Node]) -> Program:
    chain = Chain()
    return chain.finish(between(chain, chain.site(chain.x, "a")))


def repeated(c: Chain, x: fx.Node, at: int) -> fx.Node:
    """[B, T, 12] -> [B, T, 24], every feature, every group of four or the whole twice in a row"""
    split = c.call(aten.view.default, x, [2, 5, 3, 4])
    sizes = [2, 5, 3, 4]
    sizes.insert(at, 2)
    return merged(c, c.call(aten.expand.default, c.call(aten.unsqueeze.default, split, at), sizes))


FREE = 12
Between = Callable[[Chain, fx.Node], fx.Node]
ABSORBED: dict[str, tuple[Between, int, int]] = {
    "nothing": (lambda c, x: x, FREE, 1),
    "activation": (lambda c, x: c.call(aten.silu.default, x), FREE, 1),
    "untagged activation": (lambda c, x: c.call(aten.hardswish.default, x), FREE, 1),
    "scalar": (lambda c, x: c.call(aten.add.Tensor, c.call(aten.mul.Tensor, x, 0.5), 1.0), FREE, 1),
    "one number from a parameter": (lambda c, x: c.call(aten.mul.Tensor, x, c.vector("s", 1)), FREE, 1),
    "itself": (lambda c, x: c.call(aten.mul.Tensor, x, c.call(aten.sigmoid.default, x)), FREE, 1),
    "threshold": (lambda c, x: c.call(aten.where.ScalarOther, c.call(aten.gt.Scalar, x, 0.1), x, 0.0), FREE, 1),
    "another's type": (lambda c, x: c.call(aten.type_as.default, x, c.x), FREE, 1),
    "copies": (lambda c, x: c.call(aten.contiguous.default, c.call(aten.clone.default, x)), FREE, 1),
    "heads and back": (lambda c, x: merged(c, c.call(aten.transpose.int, heads(c, x), 1, 2)), FREE, 1),
    "tokens flattened": (lambda c, x: merged(c, c.call(aten.view.default, x, [-1, 12])), FREE, 1),
    "whole slice": (lambda c, x: c.call(aten.slice.Tensor, x, 2, 0, 2**63 - 1), FREE, 1),
    "last tokens": (lambda c, x: c.call(aten.slice.Tensor, x, 1, 1, 2**63 - 1), FREE, 1),
    "a factor for each head": (
        lambda c, x: merged(
            c, c.call(aten.mul.Tensor, c.call(aten.view.default, x, [2, 5, 3, 4]), c.vector("s", 3, 1))
        ),
        4,
        1,
    ),
    "heads repeated one by one": (lambda c, x: repeated(c, x, 3), 4, 2),
    "all repeated": (lambda c, x: repeated(c, x, 2), FREE, 2),
    "attention weights": (
        lambda c, x: merged(
            c, c.call(aten.transpose.int, c.call(aten.matmul.default, c.vector("p", 2, 3, 5, 5), heads(c, x)), 1, 2)
        ),
        4,
        1,
    ),
}


@pytest.mark.parametrize("case", ABSORBED)
def test_operations_that_let_an_order_pass(case: str) -> None:
    between, block, repeats = ABSORBED[case]
    program = chain_of(between)
    couplings = analyse(program)
    assert couplings.absorptions == (Absorption(("a",), ("b",), block, repeats, 12),), couplings.scattered
    assert_oracle_agrees(program, couplings)


FIXED: dict[str, Between] = {
    "softmax": lambda c, x: c.call(aten.softmax.int, c.call(aten.mul.Tensor, x, c.vector("s", 12)), -1),
    "a factor for each feature": lambda c, x: c.call(aten.mul.Tensor, x, c.vector("s", 12)),
    "a factor for each feature of a head": lambda c, x: merged(
        c, c.call(aten.mul.Tensor, c.call(aten.view.default, x, [2, 5, 3, 4]), c.vector("s", 4))
    ),
    "norm": lambda c, x: c.call(aten.layer_norm.default, x, [12], c.vector("s", 12)),
    "rotation": lambda c, x: c.call(
        aten.cat.default, [c.call(aten.slice.Tensor, x, 2, 6), c.call(aten.slice.Tensor, x, 2, 0, 6)], -1
    ),
    "cumulative sum": lambda c, x: c.call(aten.cumsum.default, x, -1),
    "part of the features": lambda c, x: c.call(aten.slice.Tensor, x, 2, 1, 12),
    "in-place write": lambda c, x: c.call(aten.mul_.Tensor, x, 2.0),
    "training dropout": lambda c, x: c.call(aten.dropout.default, x, 0.0, True),
    "every feature repeated": lambda c, x: repeated(c, x, 4),
    "heads turned": lambda c, x: merged(
        c, c.call(aten.permute.default, c.call(aten.view.default, x, [2, 5, 3, 4]), [0, 1, 3, 2])
    ),
    "groups of heads turned": lambda c, x: merged(
        c, c.call(aten.permute.default, c.call(aten.view.default, x, [2, 5, 2, 2, 3]), [0, 1, 3, 2, 4])
    ),
    "itself, turned": lambda c, x: c.call(
        aten.add.Tensor,
        x,
        merged(c, c.call(aten.permute.default, c.call(aten.view.default, x, [2, 5, 3, 4]), [0, 1, 3, 2])),
    ),
    "features averaged": lambda c, x: merged(
        c,
        c.call(
            aten.matmul.default,
            c.vector("p", 2, 3, 4, 4),
            c.call(aten.permute.default, c.call(aten.view.default, x, [2, 5, 3, 4]), [0, 2, 3, 1]),
        ),
    ),
    "a vector summed": lambda c, x: c.call(
        aten.mul.Tensor, c.x, c.call(aten.matmul.default, c.vector("p", 120), c.call(aten.view.default, x, [120]))
    ),
    "weights of a sum": lambda c, x: c.call(aten.matmul.default, x, c.vector("p", 2, 12, 12)),
}


@pytest.mark.parametrize("case", FIXED)
def test_operations_that_fix_the_order(case: str) -> None:
    couplings = analyse(chain_of(FIXED[case]))
    assert couplings.absorptions == ()
    assert "fixed by aten" in couplings.scattered["a"] or "fixed by mixcomp" in couplings.scattered["a"]


@pytest.mark.parametrize("copies", [1, 2])
def test_attention_confines_the_order_to_heads(copies: int) -> None:
    program = attention(copies)
    couplings = analyse(program)
    assert couplings.absorptions == (Absorption(("v",), ("b",), 4, copies, 12),)
    assert_oracle_agrees(program, couplings)


def test_an_order_across_heads_changes_the_outputs() -> None:
    across = Absorption(("v",), ("b",), 12, 1, 12)
    assert not keeps_outputs(attention(), across, shuffle(12, 12))


def query_for_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "_AVERAGES", {aten.scaled_dot_product_attention.default: 0})


def heads_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.Features, "_confine", lambda *_: None)


@pytest.mark.parametrize("bug", [query_for_value, heads_not_kept])
def test_the_oracle_finds_planted_bugs(
    bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="Absorption"):
        assert_oracle_agrees(attention(), analyse(attention()))


def test_three_producers_and_two_consumers_share_one_order() -> None:
    chain = Chain()
    a, c, d = (chain.site(chain.x, name) for name in "acd")
    inner = chain.call(aten.mul.Tensor, chain.call(aten.add.Tensor, a, c), chain.call(aten.tanh.default, d))
    other = chain.site(inner, "e")
    program = chain.finish(inner, other)
    couplings = analyse(program)
    assert couplings.absorptions == (Absorption(("a", "c", "d"), ("e", "b"), FREE, 1, 12),)
    assert_oracle_agrees(program, couplings)


def test_an_output_of_the_model_fixes_the_order() -> None:
    chain = Chain()
    a = chain.site(chain.x, "a")
    couplings = analyse(chain.finish(a, a))
    assert couplings.scattered["a"] == "has its order fixed by the model's output"


def test_reasons_name_the_site_that_is_in_the_way() -> None:
    chain = Chain()
    a, c = chain.site(chain.x, "a"), chain.site(chain.x, "c")
    normed = chain.call(aten.layer_norm.default, c, [12])
    couplings = analyse(chain.finish(chain.call(aten.add.Tensor, a, c), normed))
    assert couplings.scattered["a"].startswith("shares its order with c, which has its order fixed by aten.layer_norm")
    assert couplings.scattered["b"] == "feeds head, which is not compiled (out of scope)"


def test_all_calls_of_a_site_must_agree() -> None:
    reused = analyse(build(Blueprint((Layer(Kind.REUSED, 32), Layer(Kind.PLAIN, 8), Layer(Kind.PLAIN, 8)))))
    assert reused.scattered["layers.0.proj"].startswith("feeds layers.0.proj, which also reads other features")
    chain = Chain()
    a, c = chain.site(chain.x, "a"), chain.site(chain.x, "c")
    twice = chain.site(chain.call(aten.layer_norm.default, c, [12]), "b")
    couplings = analyse(chain.finish(a, twice))
    assert couplings.scattered["a"].startswith("feeds b, which also reads other features")
    chain = Chain()
    a, c = chain.site(chain.x, "a"), chain.site(chain.x, "c")
    program = chain.finish(a, chain.site(chain.call(aten.relu.default, c), "b"))
    couplings = analyse(program)
    assert couplings.absorptions == (Absorption(("a", "c"), ("b",), FREE, 1, 12),)
    assert_oracle_agrees(program, couplings)


@pytest.mark.parametrize("at", [2, 3])
def test_one_order_cannot_serve_different_repetitions(at: int) -> None:
    chain = Chain()
    a = chain.site(chain.x, "a")
    other = chain.site(repeated(chain, a, at), "c")
    assert analyse(chain.finish(a, other)).scattered["a"] == "is read in a way that no one order serves"


def test_copies_of_the_whole_keep_no_order_inside_heads() -> None:
    chain = Chain()
    split = chain.call(aten.view.default, chain.site(chain.x, "a"), [2, 5, 3, 4])
    scaled = merged(chain, chain.call(aten.mul.Tensor, split, chain.vector("s", 3, 1)))
    couplings = analyse(chain.finish(repeated(chain, scaled, 2)))
    assert couplings.scattered["a"] == "is read in a way that no one order serves"


def table(layout: Layout) -> torch.Tensor:
    """The row number at every position, int64, straight from the definition of strides."""
    dimensions = [
        torch.tensor(0)
        if not parts
        else sum(
            torch.arange(p.size).view(-1, *[1] * (len(parts) - 1 - i)) * p.stride for i, p in enumerate(parts)
        ).flatten()
        for parts in layout
    ]
    lengths = [prod(p.size for p in parts) for parts in layout]
    out = torch.zeros(lengths, dtype=torch.int64)
    for i, digits in enumerate(dimensions):
        out += digits.view([-1 if j == i else 1 for j in range(len(layout))])
    return out


def shapes(total: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Random factorizations of ``total``, ones included."""
    return st.lists(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]), max_size=4).map(
        lambda factors: tuple(_factorized(total, factors))
    )


def _factorized(total: int, factors: list[int]) -> list[int]:
    kept = [f for f, product in zip(factors, accumulate(factors, mul), strict=True) if total % product == 0]
    return [*kept, total // prod(kept)] if total % prod(kept) == 0 else [total]


@given(st.data())
def test_layouts_follow_real_tensors(data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from([1, 4, 12, 30]))
    real = torch.arange(rows).expand(2, 3, rows)
    layout = axes.output_layout((2, 3, rows))
    for _ in range(data.draw(st.integers(1, 6))):
        step = data.draw(st.sampled_from(["reshape", "permute", "repeat", "merge"]))
        if step == "permute":
            order = data.draw(st.permutations(range(real.dim())))
            real, layout = real.permute(*order), tuple(layout[i] for i in order)
        elif step == "repeat":
            at = data.draw(st.integers(0, real.dim()))
            sizes = [*real.shape[:at], 2, *real.shape[at:]]
            layout = axes.broadcast((*layout[:at], (), *layout[at:]), tuple(sizes))
            real = real.unsqueeze(at).expand(sizes)
        else:
            shape = data.draw(shapes(real.numel())) if step == "reshape" else (*real.shape[:1], real[0].numel())
            found = axes.reshape(layout, shape)
            if found is None:
                continue
            real, layout = real.reshape(shape), found
        assert torch.equal(table(layout), real)
        form = axes.column_blocks(layout, rows)
        if form is not None:
            order = shuffle(rows, form[0]) if form[0] > 1 else torch.arange(rows)
            columns = Absorption((), (), *form, rows).columns(order)
            flat = real.reshape(-1, real.shape[-1])
            assert torch.equal(order[flat], flat[:, columns])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 3, 4), ((Part(2, 0),), (Part(3, 4),), (Part(4, 1),))),
        ((6, 4), ((Part(2, 0), Part(3, 4)), (Part(4, 1),))),
        ((1, 2, 1, 12), ((), (Part(2, 0),), (), (Part(12, 1),))),
        ((8, 3), ((Part(2, 0), Part(4, 3)), (Part(3, 1),))),
        ((3, 8), None),
        ((2, 12, 2), None),
    ],
)
def test_reshape_cuts_parts_where_it_can(shape: tuple[int, ...], expected: Layout | None) -> None:
    assert axes.reshape(axes.output_layout((2, 12)), shape) == expected
