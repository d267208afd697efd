"""Planted bugs in stored tensors (I14-I16); importing this adds them, and those in decisions, to ``mutants.MUTANTS``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

import decision_mutants  # noqa: F401
from decisions import DOWN, FLAT, PROJ
from mixcomp.program import Program, Site
from mixcomp.snapshot import arguments
from mutants import MUTANTS, changed, insert_after, mutant, recompiled, with_site, with_tensor, without

__all__ = ["MUTANTS"]


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
def format_of_fewer_columns(program: Program) -> Program:
    """Padding hides it from the number of stored bits."""
    fmt = program.site(FLAT).format
    assert fmt is not None
    return with_site(program, FLAT, format=replace(fmt, columns=11))


@mutant("I14")
def index_without_an_order(program: Program) -> Program:
    site = program.site(FLAT)
    assert site.format is not None
    fmt = replace(site.format, scatter=True)
    more = fmt.stored_bits() - site.format.stored_bits()
    tensors = {key: program.tensors[key] + more for key in (f"{FLAT}/planned_bits", "budget/bits")}
    tensors[f"{FLAT}/row_index"] = torch.arange(site.rows, dtype=torch.int16)
    return with_site(program, FLAT, format=fmt).with_tensors(tensors)


@mutant("I14")
def site_forgotten(program: Program) -> Program:
    return with_site(program, FLAT, format=None)


@mutant("I14")
def factors_of_another_type(program: Program) -> Program:
    return with_tensor(program, f"{FLAT}/factors", lambda t: t.bfloat16())


@mutant("I14", base="mixed")
def profile_of_other_groups(program: Program) -> Program:
    """As many groups of each width, in other places: the bits are the same."""
    return with_tensor(program, f"{PROJ}/widths", lambda t: t.flip(1))


@mutant("I14", base="mixed")
def groups_out_of_place(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/group_index", lambda t: t.flip(1))


@mutant("I14", base="mixed")
def scales_of_another_kind(program: Program) -> Program:
    return program.with_tensors({f"{PROJ}/scale_kind": torch.tensor(0)})


@mutant("I14", base="mixed")
def groups_of_another_size(program: Program) -> Program:
    return program.with_tensors({f"{FLAT}/group": torch.tensor(64)})


@mutant("I14", base="mixed")
def zero_beyond_its_code(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/zeros", lambda t: t | 240)


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
def index_of_another_site(program: Program) -> Program:
    set_argument(lowered_node(program, FLAT), "row_index", arguments(lowered_node(program, PROJ))["row_index"])
    return recompiled(program)


@mutant("I16", base="lowered")
def activations_of_another_site(program: Program) -> Program:
    set_argument(lowered_node(program, PROJ), "activations", "int8")
    return recompiled(program)


@mutant("I16", base="lowered")
def codes_computed(program: Program) -> Program:
    codes = arguments(lowered_node(program, PROJ))["codes"]
    set_argument(lowered_node(program, PROJ), "codes", insert_after(codes, torch.ops.aten.clone.default, codes))
    return recompiled(program)


@mutant("I16", base="lowered")
def codes_of_another_type_handed_in(program: Program) -> Program:
    """Where tensors are inputs of the graph, as Dynamo has it, at least their types can be told."""
    codes = arguments(lowered_node(program, PROJ))["codes"]
    graph = program.graph_module.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        handed = graph.placeholder("codes")
    handed.meta["val"] = codes.meta["val"].float()
    codes.replace_all_uses_with(handed)
    graph.erase_node(codes)
    program.graph_module.get_submodule(f"_packed.{PROJ}").codes = None
    return recompiled(program)


@mutant("I16", base="lowered")
def other_codes(program: Program) -> Program:
    return with_tensor(program, f"{FLAT}/codes", lambda t: t ^ 1)


@mutant("I16", base="lowered")
def row_written_twice(program: Program) -> Program:
    return _with_buffer(program, "row_index", changed(program.tensors[f"{PROJ}/row_index"], 0, 5))


@mutant("I16", base="mixed-lowered")
def another_kind_of_scales(program: Program) -> Program:
    set_argument(lowered_node(program, PROJ), "scale_kind", 0)
    return recompiled(program)


@mutant("I16", base="mixed-lowered")
def groups_of_another_site(program: Program) -> Program:
    set_argument(lowered_node(program, PROJ), "group", 64)
    return recompiled(program)


@mutant("I16", base="mixed-lowered")
def other_zeros_in_the_module(program: Program) -> Program:
    return _with_buffer(program, "zeros", program.tensors[f"{PROJ}/zeros"] ^ 1)


@mutant("I16", base="mixed-lowered")
def other_groups_in_the_module(program: Program) -> Program:
    return _with_buffer(program, "group_index", program.tensors[f"{PROJ}/group_index"].flip(0))


def _with_buffer(program: Program, name: str, broken: torch.Tensor) -> Program:
    folder, _, leaf = str(arguments(lowered_node(program, PROJ))[name].target).rpartition(".")
    setattr(program.graph_module.get_submodule(folder), leaf, broken)
    return program


@mutant("I16", base="lowered", level=2)
def padding_not_zero(program: Program) -> Program:
    """Written to the shared buffer, so graph and table agree; a kernel that trusts the padding would be wrong."""
    program.tensors[f"{FLAT}/codes"][-1] = 255
    return program
