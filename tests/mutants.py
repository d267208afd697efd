"""Planted bugs: for every invariant at least two ways to break it, each of which must make exactly that one fire.

A mutant takes a sound program (a clone, so its graph may be edited) and returns a broken one.  ``base`` says what it
starts from: ``decided`` is canonical with all decisions made, ``lowered`` has gone through lower-linears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from decisions import DOWN, FLAT, GATE, PLANNED, PROJ, UP
from torch import fx, nn

from mixcomp.ops import LINEAR
from mixcomp.program import META, Fact, Program, Site
from mixcomp.snapshot import is_mixed

aten = torch.ops.aten
Break = Callable[[Program], Program]


@dataclass(frozen=True)
class Mutant:
    """``breaks`` violates the invariant ``id``; ``level`` is the least one that has to notice."""

    id: str
    breaks: Break
    base: str = "decided"
    level: int = 1

    @property
    def missing(self) -> bool:
        """Whether the mutant takes away what a row looks up, so that it fires through the error of the look-up."""
        return self.breaks.__name__ in ("sigma_missing", "branch_without_evidence")

    @property
    def name(self) -> str:
        return f"{self.id}-{self.breaks.__name__}"


MUTANTS: list[Mutant] = []


def mutant(id: str, base: str = "decided", level: int = 1) -> Callable[[Break], Break]:
    """Add a function to ``MUTANTS``."""

    def add(breaks: Break) -> Break:
        MUTANTS.append(Mutant(id, breaks, base, level))
        return breaks

    return add


# what mutants do


def node_of(program: Program, target: Any, which: int = 0) -> fx.Node:
    return [n for n in program.graph_module.graph.nodes if n.target is target][which]


def first(program: Program, op: str) -> fx.Node:
    return next(n for n in program.graph_module.graph.nodes if n.op == op)


def insert_after(node: fx.Node, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, args)
    new.meta["val"] = (like or node).meta["val"]
    return new


def recompiled(program: Program) -> Program:
    program.graph_module.recompile()
    return program


def with_site(program: Program, name: str, **changes: Any) -> Program:
    return program.with_sites({name: replace(program.site(name), **changes)})


def with_tensor(program: Program, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Program:
    return program.with_tensors({key: change(program.tensors[key])})


def without(program: Program, key: str) -> Program:
    return program.with_tensors({}, drop=frozenset({key}))


def set_parameter(program: Program, path: str, value: torch.Tensor) -> Program:
    folder, _, name = path.rpartition(".")
    setattr(program.graph_module.get_submodule(folder), name, nn.Parameter(value, requires_grad=False))
    return program


def changed(tensor: torch.Tensor, index: int | tuple[int, ...], value: float) -> torch.Tensor:
    out = tensor.clone()
    out[index] = value
    return out


# I01 the graph passes lint and its code is current


@mutant("I01")
def use_before_definition(program: Program) -> Program:
    relu = node_of(program, aten.relu.default)
    node_of(program, aten.silu.default).args = (relu,)
    return program


@mutant("I01")
def not_recompiled(program: Program) -> Program:
    node_of(program, aten.silu.default).target = aten.relu.default
    return program


@mutant("I01")
def missing_parameter(program: Program) -> Program:
    del program.graph_module.get_submodule("embed").weight
    return program


# I02 functional calls of this stage only


@mutant("I02")
def in_place_op(program: Program) -> Program:
    node_of(program, aten.relu.default).target = aten.relu_.default
    return recompiled(program)


@mutant("I02")
def call_module(program: Program) -> Program:
    program.graph_module.add_submodule("act", nn.ReLU())
    relu = node_of(program, aten.relu.default)
    with program.graph_module.graph.inserting_after(relu):
        new = program.graph_module.graph.call_module("act", relu.args)
    new.meta["val"] = relu.meta["val"]
    relu.replace_all_uses_with(new)
    program.graph_module.graph.erase_node(relu)
    return recompiled(program)


@mutant("I02")
def weight_read_elsewhere(program: Program) -> Program:
    """Compiling the site would not change this second reader."""
    call = program.node(program.site(FLAT).calls[-1])
    extra = insert_after(call, aten.add.Tensor, call, call)
    call.replace_all_uses_with(extra, delete_user_cb=lambda user: user is not extra)
    extra.args = (call, call.args[1])
    return recompiled(program)


@mutant("I02", base="lowered")
def canonical_after_lowering(program: Program) -> Program:
    lowered = next(n for n in program.graph_module.graph.nodes if is_mixed(n))
    weight = lowered.graph.find_nodes(op="get_attr", target="embed.weight")[0]
    lowered.target, lowered.args, lowered.kwargs = LINEAR, (lowered.args[0], weight, None, False), {}
    lowered.graph.eliminate_dead_code()
    return recompiled(program)


# I03 every value has a fake example of the right type


@mutant("I03")
def missing_value(program: Program) -> Program:
    del node_of(program, aten.relu.default).meta["val"]
    return program


@mutant("I03")
def stale_size(program: Program) -> Program:
    node = program.node(program.site(PROJ).calls[0])
    node.meta["val"] = node.args[0].meta["val"]  # type: ignore[union-attr]
    return program


@mutant("I03", level=2)
def stale_dtype(program: Program) -> Program:
    node = node_of(program, aten.silu.default)
    node.meta["val"] = node.meta["val"].to(torch.float16)
    return program


@mutant("I03", level=2)
def impossible_call(program: Program) -> Program:
    relu = node_of(program, aten.relu.default)
    relu.target, relu.args = aten.mm.default, (relu.args[0], relu.args[0])
    return recompiled(program)


# I04 inputs and outputs are unchanged


@mutant("I04")
def renamed_input(program: Program) -> Program:
    first(program, "placeholder").target = "tokens"
    return recompiled(program)


@mutant("I04")
def second_output(program: Program) -> Program:
    output = first(program, "output")
    output.args = ((output.args[0], output.args[0]),)
    return recompiled(program)


@mutant("I04")
def other_output_type(program: Program) -> Program:
    output = first(program, "output")
    new = insert_after(output.args[0], aten.to.dtype, output.args[0], torch.float16)  # type: ignore[arg-type]
    new.meta["val"] = new.meta["val"].to(torch.float16)
    output.args = (new,)
    return recompiled(program)


# I05 no dead node, no unread parameter or buffer


@mutant("I05")
def dead_node(program: Program) -> Program:
    relu = node_of(program, aten.relu.default)
    insert_after(relu, aten.relu.default, relu)
    return recompiled(program)


@mutant("I05")
def unread_buffer(program: Program) -> Program:
    program.graph_module.get_submodule("embed").register_buffer("left_over", torch.zeros(3))
    return program


# I06 linears and sites describe each other completely


@mutant("I06")
def site_lost(program: Program) -> Program:
    return replace(program, sites=program.sites[1:])


@mutant("I06")
def mark_lost(program: Program) -> Program:
    del program.node(program.site(PROJ).calls[0]).meta[META]
    return program


@mutant("I06")
def call_listed_twice(program: Program) -> Program:
    return with_site(program, FLAT, calls=(program.site(FLAT).calls[0],) * 2)


@mutant("I06")
def call_not_listed(program: Program) -> Program:
    return with_site(program, FLAT, calls=program.site(FLAT).calls[:1])


@mutant("I06")
def input_not_in_graph(program: Program) -> Program:
    return with_site(program, DOWN, input="nowhere")


@mutant("I06")
def bias_forgotten(program: Program) -> Program:
    return with_site(program, PROJ, bias=None)


@mutant("I06")
def shape_transposed(program: Program) -> Program:
    weight = program.site(PROJ).weight
    return with_site(program, PROJ, weight=replace(weight, shape=weight.shape[::-1]))


@mutant("I06")
def calls_with_two_weights(program: Program) -> Program:
    second = program.node(program.site(FLAT).calls[1])
    graph = program.graph_module.graph
    set_parameter(program, f"{FLAT}.other", torch.zeros(12, 12))
    with graph.inserting_before(second):
        other = graph.create_node("get_attr", f"{FLAT}.other")
    second.args = (second.args[0], other, *second.args[2:])
    return recompiled(program)


# I07 aliases share one storage


@mutant("I07", base="tied")
def tie_broken(program: Program) -> Program:
    return set_parameter(program, "lm_head.weight", program.graph_module.embed.weight.detach().clone())


@mutant("I07")
def alias_of_a_stranger(program: Program) -> Program:
    weight = program.site("lm_head").weight
    return with_site(program, "lm_head", weight=replace(weight, aliases=("embed.weight",)))


# I08 parameters are untouched or consumed once


@mutant("I08")
def written_in_place(program: Program) -> Program:
    with torch.no_grad():
        program.graph_module.embed.weight.add_(1)
    return program


@mutant("I08", level=2)
def written_behind_the_counter(program: Program) -> Program:
    program.graph_module.embed.weight.data[0, 0] += 1
    return program


@mutant("I08")
def replaced_by_a_copy(program: Program) -> Program:
    return set_parameter(program, f"{PROJ}.bias", program.graph_module.get_parameter(f"{PROJ}.bias").detach().clone())


@mutant("I08")
def layer_dropped(program: Program) -> Program:
    """Square layers can vanish without a trace in any shape."""
    node = program.node(program.site(FLAT).calls[1])
    other = program.node(program.site(FLAT).calls[0])
    for call in (node, other):
        call.replace_all_uses_with(call.args[0])  # type: ignore[arg-type]
    graph = program.graph_module.graph
    graph.eliminate_dead_code()
    program.graph_module.delete_all_unused_submodules()
    kept = tuple(s for s in program.sites if s.name != FLAT)
    calls = {s.name: s for s in kept}
    head = replace(calls["lm_head"], input=program.node(calls["lm_head"].calls[0]).args[0].name)  # type: ignore[union-attr]
    kept = tuple(head if s.name == "lm_head" else s for s in kept)
    return recompiled(replace(program, sites=kept, tensors={}, facts=frozenset()))


# I09 tensors are owned, finite, contiguous, immutable


@mutant("I09")
def not_finite(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/gamma", lambda t: changed(t, 3, float("nan")))


@mutant("I09")
def infinite(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/factors", lambda t: changed(t, 0, float("inf")))


@mutant("I09")
def not_contiguous(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/salience", lambda t: t.t().contiguous().t())


@mutant("I09")
def owner_unknown(program: Program) -> Program:
    return program.with_tensors({"layers.9.proj/gamma": torch.ones(3)})


@mutant("I09")
def table_written_in_place(program: Program) -> Program:
    program.tensors[f"{PROJ}/gamma"].mul_(2)
    return program


# I10 statistics and salience


@mutant("I10")
def sigma_not_symmetric(program: Program) -> Program:
    return with_tensor(program, f"{program.site(UP).input}/sigma", lambda t: changed(t, (0, 1), 1000.0))


@mutant("I10")
def sigma_negative(program: Program) -> Program:
    return with_tensor(program, f"{program.site(UP).input}/sigma", lambda t: changed(t, (2, 2), -1.0))


@mutant("I10")
def sigma_missing(program: Program) -> Program:
    return without(program, f"{program.site(DOWN).input}/sigma")


@mutant("I10")
def gamma_negative(program: Program) -> Program:
    return with_tensor(program, f"{DOWN}/gamma", lambda t: changed(t, 0, -1e-9))


@mutant("I10")
def gamma_of_other_rows(program: Program) -> Program:
    return with_tensor(program, f"{DOWN}/gamma", lambda t: t[1:].contiguous())


@mutant("I10")
def salience_negative(program: Program) -> Program:
    return with_tensor(program, f"{DOWN}/salience", lambda t: changed(t, (0, 5), -1.0))


@mutant("I10")
def salience_lacks_a_width(program: Program) -> Program:
    return with_tensor(program, f"{DOWN}/salience", lambda t: t[:, 1:].contiguous())


# I11 one allowed width per row


@mutant("I11")
def width_seven(program: Program) -> Program:
    return with_tensor(program, f"{FLAT}/widths", lambda t: changed(t, 0, 7))


@mutant("I11")
def widths_too_short(program: Program) -> Program:
    return with_tensor(program, f"{FLAT}/widths", lambda t: t[1:].clone())


@mutant("I11")
def widths_as_integers(program: Program) -> Program:
    return with_tensor(program, f"{FLAT}/widths", lambda t: t.long())


@mutant("I11")
def widths_out_of_scope(program: Program) -> Program:
    return program.with_tensors({"lm_head/widths": torch.full((13,), 4, dtype=torch.uint8)})


# I12 bits in scope within the budget


@mutant("I12")
def over_budget(program: Program) -> Program:
    return with_tensor(program, "budget/bits", lambda t: t - 1)


@mutant("I12")
def promise_broken(program: Program) -> Program:
    return with_tensor(program, f"{FLAT}/planned_bits", lambda t: t - 8)


@mutant("I12")
def budget_forgotten(program: Program) -> Program:
    return without(program, "budget/bits")


@mutant("I12")
def more_stored_than_planned(program: Program) -> Program:
    site = program.site(FLAT)
    assert site.format is not None
    return with_site(program, FLAT, format=replace(site.format, scatter=True)).with_tensors(
        {f"{FLAT}/row_index": torch.arange(site.rows, dtype=torch.int16)}
    )


@mutant("I12")
def left_alone_for_free(program: Program) -> Program:
    """A site in scope that is left alone counts at its own size."""
    return with_site(program, "lm_head", in_scope=True, reason="odd dtype")


# I13 orders are bijections, absorptions agree


@mutant("I13")
def row_lost(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/row_order", lambda t: changed(t, 0, int(t[1])))


@mutant("I13")
def order_of_other_type(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/row_order", lambda t: t.int())


@mutant("I13")
def order_not_stable(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/row_order", lambda t: t[[1, 0, *range(2, 12)]])


@mutant("I13")
def order_makes_segments(program: Program) -> Program:
    shuffled = torch.tensor([0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11])
    widths = torch.tensor([4] * 6 + [5] * 6, dtype=torch.uint8)
    unquantized = replace(with_site(program, FLAT, format=None), facts=PLANNED - {Fact.QUANTIZED, Fact.BRANCHED})
    return unquantized.with_tensors({f"{FLAT}/row_order": shuffled, f"{FLAT}/widths": widths})


@mutant("I13")
def absorbed_order_makes_segments(program: Program) -> Program:
    """One width for up and gate, in eight rows each: no order gives fewer segments, this one gives more."""
    sorted_widths = torch.tensor([2, 2, 2, 2, 4, 4, 4, 4], dtype=torch.uint8)
    changes = {f"{name}/widths": sorted_widths for name in (UP, GATE)}
    sites = {name: replace(program.site(name), format=None) for name in (UP, GATE)}
    unquantized = replace(program.with_sites(sites), facts=PLANNED - {Fact.QUANTIZED, Fact.BRANCHED})
    return unquantized.with_tensors(changes)


@mutant("I13")
def columns_forgotten(program: Program) -> Program:
    return without(program, f"{DOWN}/column_order")


@mutant("I13")
def columns_in_another_order(program: Program) -> Program:
    return with_tensor(program, f"{DOWN}/column_order", lambda t: t.flip(0))


@mutant("I13")
def producers_disagree(program: Program) -> Program:
    return with_tensor(program, f"{GATE}/row_order", lambda t: t.flip(0))


# I14 stored tensors share one row order


@mutant("I14")
def index_in_another_order(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/row_index", lambda t: t.flip(0))


@mutant("I14")
def index_with_a_repeat(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/row_index", lambda t: changed(t, 0, int(t[1])))


@mutant("I14")
def segments_in_another_order(program: Program) -> Program:
    fmt = program.site(PROJ).format
    assert fmt is not None
    return with_site(program, PROJ, format=replace(fmt, segments=fmt.segments[::-1]))


@mutant("I14")
def site_forgotten(program: Program) -> Program:
    return with_site(program, FLAT, format=None)


@mutant("I14")
def factors_of_another_type(program: Program) -> Program:
    return with_tensor(program, f"{FLAT}/factors", lambda t: t.bfloat16())


# I15 side branches are thin and pay


@mutant("I15")
def branch_raises_the_loss(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/loss_after_branch", lambda t: t * 2)


@mutant("I15")
def branch_without_evidence(program: Program) -> Program:
    return without(program, f"{PROJ}/loss_before_branch")


@mutant("I15")
def branch_as_thick_as_the_weight(program: Program) -> Program:
    site = program.site(DOWN)
    return _with_rank(program, site, min(site.rows, site.columns))


def _with_rank(program: Program, site: Site, rank: int) -> Program:
    assert site.format is not None
    fmt = replace(site.format, rank=rank)
    shapes = {k: v for k, v in fmt.tensors().items() if k.startswith("branch")}
    more = fmt.stored_bits() - site.format.stored_bits()
    tensors = {f"{site.name}/{k}": torch.ones(shape, dtype=dtype) for k, (dtype, shape) in shapes.items()}
    tensors |= {key: program.tensors[key] + more for key in (f"{site.name}/planned_bits", "budget/bits")}
    losses = {f"{site.name}/loss_{when}_branch": torch.tensor(1.0) for when in ("before", "after")}
    return with_site(program, site.name, format=fmt).with_tensors({**tensors, **losses})


# I16 lowered calls carry what is stored


def lowered_node(program: Program, name: str) -> fx.Node:
    return program.node(program.site(name).calls[0])


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


@mutant("I16", base="lowered")
def segments_of_another_site(program: Program) -> Program:
    set_argument(lowered_node(program, FLAT), "segments", [6, 4, 6, 4])
    return recompiled(program)


@mutant("I16", base="lowered")
def columns_of_another_site(program: Program) -> Program:
    set_argument(lowered_node(program, FLAT), "columns", 11)
    return recompiled(program)


@mutant("I16", base="lowered")
def other_codes(program: Program) -> Program:
    return with_tensor(program, f"{FLAT}/codes", lambda t: t ^ 1)


@mutant("I16", base="lowered")
def row_written_twice(program: Program) -> Program:
    node = lowered_node(program, PROJ)
    arguments = dict(zip([a.name for a in node.target._schema.arguments], node.args, strict=False)) | node.kwargs  # type: ignore[union-attr]
    path = str(arguments["row_index"].target)
    folder, _, name = path.rpartition(".")
    broken = changed(program.tensors[f"{PROJ}/row_index"], 0, 5)
    setattr(program.graph_module.get_submodule(folder), name, broken)
    return program


@mutant("I16", base="lowered", level=2)
def padding_not_zero(program: Program) -> Program:
    """Written to the shared buffer, so graph and table agree; a kernel that trusts the padding would be wrong."""
    program.tensors[f"{FLAT}/codes"][-1] = 255
    return program
