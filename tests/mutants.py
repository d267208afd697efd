"""Planted bugs: for every invariant at least two ways to break it, each of which must make exactly that one fire.

Here are those of the graph (I01-I08); ``table_mutants`` adds those of decisions and stored tensors (I09-I16).

A mutant takes a sound program (a clone, so its graph may be edited) and returns a broken one.  ``base`` says what it
starts from: ``decided`` is canonical with all decisions made, ``lowered`` has gone through lower-linears.  ``alone``
mutants are judged without the program they were made from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from decisions import DOWN, FLAT, PROJ
from mixcomp.ops import LINEAR
from mixcomp.program import META, Fact, Program
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
    alone: bool = False

    @property
    def missing(self) -> bool:
        """Whether the mutant takes away what a row looks up, so that it fires through the error of the look-up."""
        return self.breaks.__name__ in ("sigma_missing", "branch_without_evidence")

    @property
    def name(self) -> str:
        return f"{self.id}-{self.breaks.__name__}"


MUTANTS: list[Mutant] = []


def mutant(id: str, base: str = "decided", level: int = 1, alone: bool = False) -> Callable[[Break], Break]:
    """Add a function to ``MUTANTS``."""

    def add(breaks: Break) -> Break:
        MUTANTS.append(Mutant(id, breaks, base, level, alone or base.endswith("lowered")))
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


@mutant("I02", base="lowered")
def lowered_too_early(program: Program) -> Program:
    return replace(program, facts=program.facts - {Fact.LOWERED})


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


@mutant("I03", level=2, alone=True)
def nothing_fake(program: Program) -> Program:
    for node in program.graph_module.graph.nodes:
        if "val" in node.meta:
            fake = node.meta["val"]
            sizes = [size if isinstance(size, int) else 2 for size in fake.shape]
            node.meta["val"] = torch.zeros(sizes, dtype=fake.dtype)
    return program


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
def site_twice(program: Program) -> Program:
    return replace(program, sites=(*program.sites, program.site(FLAT)))


@mutant("I06")
def site_without_calls(program: Program) -> Program:
    return with_site(program, PROJ, calls=())


@mutant("I06")
def call_of_another_op(program: Program) -> Program:
    return with_site(program, PROJ, calls=(*program.site(PROJ).calls, node_of(program, aten.silu.default).name))


@mutant("I06")
def left_alone_and_compiled(program: Program) -> Program:
    return with_site(program, PROJ, reason="its weight holds NaN")


@mutant("I06")
def weight_computed(program: Program) -> Program:
    node = program.node(program.site(PROJ).calls[0])
    weight = node.args[1]
    doubled = insert_after(weight, aten.mul.Tensor, weight, 2.0)  # type: ignore[arg-type]
    node.update_arg(1, doubled)
    return recompiled(program)


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
