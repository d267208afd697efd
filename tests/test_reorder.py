from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features import Chain, Model, attention, shuffle
from mixcomp.errors import ConfigError, PassError
from mixcomp.format import WIDTHS
from mixcomp.passes.coupling import Absorption, analyse, needs_index, segments_bound, taken
from mixcomp.passes.orders import segments, sorted_order
from mixcomp.passes.reorder import ReorderFeatures
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context
from programs import EVERYTHING, GATED, Blueprint, Kind, Layer, build

aten = torch.ops.aten
BLUEPRINTS = [GATED, EVERYTHING, Blueprint((Layer(Kind.GATED, 64, bias=True), Layer(Kind.TRANSPOSED, 40, bias=True)))]


def with_widths(program: Program, widths: dict[str, list[int]] | int) -> Program:
    """The program with widths assigned, drawn with the given seed or as listed."""
    if isinstance(widths, int):
        draw = torch.Generator().manual_seed(widths)
        offered = torch.tensor(WIDTHS)[torch.rand(len(WIDTHS), generator=draw) < 0.6].tolist() or [4]
        widths = {
            s.name: [offered[i] for i in torch.randint(0, len(offered), (s.rows,), generator=draw).tolist()]
            for s in program.open_sites()
        }
    tensors = {f"{name}/widths": torch.tensor(w, dtype=torch.uint8) for name, w in widths.items()}
    return replace(program.with_tensors(tensors), facts=frozenset({Fact.ASSIGNED}))


def reordered(program: Program, min_segment_rows: int = 1, shards: int = 1) -> Program:
    return ReorderFeatures(min_segment_rows, shards).run(program, Context())


def orders(program: Program) -> dict[str, list[int]]:
    kinds = ("row_order", "column_order")
    return {key: t.tolist() for key, t in program.tensors.items() if key.rsplit("/", 1)[1] in kinds}


def gate_up_down(rows: int, gate: list[int], up: list[int]) -> Program:
    chain = Chain(rows)
    a, c = chain.site(chain.x, "gate"), chain.site(chain.x, "up")
    program = chain.finish(chain.call(aten.mul.Tensor, chain.call(aten.silu.default, a), c))
    return with_widths(program, {"gate": gate, "up": up, "b": [4] * rows})


def test_the_picture_in_the_docstring() -> None:
    program = with_widths(gate_up_down(4, [4, 8, 4, 8], [8, 4, 4, 8]), {"b": [8, 4, 4, 8]})
    out = reordered(program, min_segment_rows=1)
    assert taken(analyse(program), 1) == ()  # too few rows: the rule looks at shapes
    assert orders(out)["b/row_order"] == [1, 2, 0, 3]
    assert sorted_order([program.tensor("gate", "widths"), program.tensor("up", "widths")], 4).tolist() == [2, 0, 3, 1]
    lines = [" ".join(line.split()) for line in (ReorderFeatures.__doc__ or "").splitlines()]
    assert any(line.startswith("gate 4 8 4 8 row_order 2 0 3 1 stored 4 4 8 8") for line in lines)
    assert any(line.startswith("up 8 4 4 8 row_order 2 0 3 1 stored 4 8 8 4") for line in lines)
    assert any(line.startswith("down columns 0 1 2 3 column_order 2 0 3 1") for line in lines)
    assert any(line.startswith("q 8 4 4 8 row_order 1 2 0 3 stored 4 4 8 8") for line in lines)


@given(st.sampled_from(BLUEPRINTS), st.integers(0, 99), st.sampled_from([1, 4]), st.sampled_from([1, 2, 8]))
def test_orders_are_stable_permutations_into_segments(shape: Blueprint, seed: int, least: int, shards: int) -> None:
    """R1, R4: bijections, equal widths together and in their order, absorbed orders shared."""
    program = with_widths(build(shape), seed)
    out = reordered(program, least, shards)
    absorptions = {name: a for a in taken(analyse(program), least, shards) for name in a.producers}
    for site in program.open_sites():
        order, widths = out.find(site.name, "row_order"), program.tensor(site.name, "widths")
        if order is None:
            continue
        assert torch.equal(order.sort().values, torch.arange(site.rows))
        stored = widths[order]
        absorbed = absorptions.get(site.name)
        assert (out.find(site.name, "absorbed") is not None) == (absorbed is not None)
        if absorbed is not None:
            assert segments(stored) <= site.rows / least
            for consumer in absorbed.consumers:
                assert torch.equal(out.tensor(consumer, "column_order"), order)
        if shards == 1 and absorbed is None:
            assert segments(stored) == len(widths.unique())
            assert segments(stored) < segments(widths)
            assert all(bool((order[stored == w].diff() > 0).all()) for w in widths.unique())


@given(st.sampled_from(BLUEPRINTS), st.integers(0, 99), st.sampled_from([1, 4]), st.sampled_from([1, 2]))
def test_permuted_weights_compute_the_same(shape: Blueprint, seed: int, least: int, shards: int) -> None:
    """R2, R7: rows with their biases in stored order, columns absorbed, scattered rows put back."""
    program = with_widths(
        build(replace(shape, layers=tuple(replace(x, dtype=torch.float32) for x in shape.layers))), seed
    )
    assert_same_outputs(program, reordered(program, least, shards))


def assert_same_outputs(program: Program, out: Program) -> None:
    """Permute the real weights of what is absorbed; what is scattered comes out in its places anyway."""
    model = Model(out)
    for site in out.open_sites():
        rows, columns = out.find(site.name, "row_order"), out.find(site.name, "column_order")
        if rows is not None and out.find(site.name, "absorbed") is not None:
            model.permute_rows(site, rows)
        if columns is not None:
            model.permute_columns(site, columns)
    assert torch.allclose(model.outputs(), Model(program).outputs(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("copies", [1, 2])
def test_values_are_sorted_inside_their_heads(copies: int) -> None:
    program = with_widths(
        attention(copies, size=8), {"q": [4] * 24 * copies, "k": [4] * 24, "b": [4] * 24, "v": [4, 8] * 12}
    )
    out = reordered(program)
    order = out.tensor("v", "row_order")
    assert torch.equal(order // 8, torch.arange(24) // 8)
    assert program.tensor("v", "widths")[order].tolist() == [4] * 4 + [8] * 8 + [4] * 8 + [8] * 4
    assert len(out.tensor("b", "column_order")) == 24 * copies
    assert_same_outputs(program, out)


@given(st.sampled_from(BLUEPRINTS), st.integers(0, 99), st.sampled_from([1, 4, 16]), st.sampled_from([1, 2, 8]))
def test_bits_of_indices_are_known_before_widths(shape: Blueprint, seed: int, least: int, shards: int) -> None:
    """A site scatters only if ``needs_index`` said so, and then it does unless its widths need no sorting."""
    program = with_widths(build(shape), seed)
    out = reordered(program, least, shards)
    promised = needs_index(program.sites, analyse(program), least, shards)
    assert set(promised) == {s.name for s in program.open_sites()}
    for name, index in promised.items():
        moved = out.find(name, "row_order") is not None
        assert (moved and out.find(name, "absorbed") is None) <= index
        widths = program.tensor(name, "widths")
        assert moved or not index or shards > 1 or segments(widths) == len(widths.unique())


def test_the_default_rule() -> None:
    """31 segments at most for gate and up, 6 for an only producer: 16 rows each."""
    for rows, absorbed in ((495, False), (496, True)):
        program = gate_up_down(rows, [4] * rows, [4] * rows)
        assert bool(taken(analyse(program))) is absorbed
        assert needs_index(program.sites, analyse(program)) == {"gate": not absorbed, "up": not absorbed, "b": True}


@given(st.data())
def test_no_widths_make_more_segments_than_the_bound(data: st.DataObject) -> None:
    block = data.draw(st.sampled_from([1, 3, 8, 40]))
    blocks = data.draw(st.integers(1, 5))
    producers = data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 999))
    draw = torch.Generator().manual_seed(seed)
    offered = torch.tensor(WIDTHS, dtype=torch.uint8)
    widths = [offered[torch.randint(0, 6, (blocks * block,), generator=draw)] for _ in range(producers)]
    order = sorted_order(widths, block)
    assert torch.equal(order // block, torch.arange(blocks * block) // block)
    for own in widths:
        assert segments(own[order]) <= segments_bound(blocks, producers)
    classes = torch.stack([*widths, order // block])[:, order]
    same = (classes[:, 1:] == classes[:, :-1]).all(0) if blocks * block > 1 else torch.tensor([], dtype=torch.bool)
    assert bool((order.diff()[same] > 0).all())


def test_the_bound_is_reached() -> None:
    every = torch.tensor(WIDTHS, dtype=torch.uint8)
    gate, up = every.repeat_interleave(6), every.repeat(6)
    assert segments(up[sorted_order([gate, up], 36)]) == segments_bound(1, 2) == 31
    assert segments(every.repeat(4)[sorted_order([every.repeat(4)], 6)]) == segments_bound(4, 1) == 21


@pytest.mark.parametrize("width", WIDTHS)
def test_one_width_leaves_every_row_in_place(width: int) -> None:
    """R5."""
    program = build(EVERYTHING)
    flat = {s.name: [width] * s.rows for s in program.open_sites()}
    assert orders(reordered(with_widths(program, flat))) == {}


def test_rows_that_lie_in_segments_stay_in_place() -> None:
    program = build(GATED)
    falling = {s.name: [5] * 10 + [4] * (s.rows - 10) for s in program.open_sites()}
    assert orders(reordered(with_widths(program, falling))) == {}


@pytest.mark.parametrize("options", [(1, 1), (1, 2), (16, 1)])
def test_twice_is_once(options: tuple[int, int]) -> None:
    """R6, G4; a second run with other widths leaves nothing of the first."""
    program = with_widths(build(EVERYTHING), 3)
    once = reordered(program, *options)
    twice = reordered(once, *options)
    assert dict(once.tensors).keys() == dict(twice.tensors).keys()
    assert all(torch.equal(once.tensors[key], twice.tensors[key]) for key in once.tensors)
    flat = {s.name: [4] * s.rows for s in program.open_sites()}
    again = reordered(with_widths(once, flat), *options)
    assert dict(again.tensors).keys() == dict(program.tensors).keys()
    assert once.graph_module is program.graph_module


def test_shards_keep_rows_inside_their_slice() -> None:
    program = with_widths(build(Blueprint((Layer(Kind.PLAIN, 64),))), 1)
    order = reordered(program, shards=8).tensor("layers.0.proj", "row_order")
    assert torch.equal(order // 8, torch.arange(64) // 8)
    whole = reordered(program, shards=7).tensor("layers.0.proj", "row_order")
    assert torch.equal(whole, reordered(program).tensor("layers.0.proj", "row_order"))


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2, 8]), st.integers(0, 99))
def test_columns_follow_rows(heads: int, repeats: int, block: int, seed: int) -> None:
    """Tag every row with its number, repeat heads, and read the tags through the column order."""
    rows = heads * block
    order = shuffle(rows, block, seed) if block > 1 else torch.arange(rows)
    columns = Absorption((), (), block, repeats, rows).columns(order)
    wide = torch.arange(rows).view(heads, 1, block).expand(-1, repeats, -1).flatten()
    permuted = order.view(heads, 1, block).expand(-1, repeats, -1).flatten()
    assert torch.equal(wide[columns], permuted)
    assert torch.equal(columns.sort().values, torch.arange(rows * repeats))


def test_widths_must_be_there() -> None:
    with pytest.raises(PassError, match="widths"):
        reordered(build(GATED))


@pytest.mark.parametrize("options", [{"min_segment_rows": 0}, {"shards": 2.0}, {"shards": True}])
def test_bad_options_are_named(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ReorderFeatures(**options)
