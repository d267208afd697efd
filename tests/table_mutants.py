"""Planted bugs in decisions and stored tensors (I09-I16); importing this adds them to ``mutants.MUTANTS``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from decisions import DOWN, FLAT, GATE, PLANNED, PROJ, UP
from mixcomp.program import Fact, Program, Site
from mixcomp.snapshot import arguments
from mutants import MUTANTS, changed, insert_after, mutant, recompiled, with_site, with_tensor, without

__all__ = ["MUTANTS"]


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


@mutant("I11", base="mixed")
def widths_of_other_groups(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/widths", lambda t: torch.cat((t, t), 1))


@mutant("I11", base="mixed")
def width_seven_in_one_group(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/widths", lambda t: changed(t, (3, 1), 7))


@mutant("I11", base="mixed")
def groups_of_48(program: Program) -> Program:
    return program.with_tensors({f"{FLAT}/group": torch.tensor(48)})


@mutant("I11", base="mixed")
def scales_of_no_kind(program: Program) -> Program:
    return program.with_tensors({f"{PROJ}/scale_kind": torch.tensor(5)})


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


@mutant("I12", base="mixed")
def group_index_for_free(program: Program) -> Program:
    """What the promise leaves out is little, and has to show."""
    index = program.tensors[f"{PROJ}/group_index"]
    return with_tensor(program, f"{PROJ}/planned_bits", lambda t: t - 8 * index.nbytes)


@mutant("I12", base="mixed")
def payload_over_budget(program: Program) -> Program:
    """Counted by columns of every group: 2 rows of ``proj`` in three are wider than their first group."""
    payload = sum(s.format.payload_bits() for s in program.sites if s.format is not None)
    return program.with_tensors({"budget/payload_bits": torch.tensor(payload - 1)})


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


@mutant("I13", base="mixed")
def order_not_stable_inside_a_profile(program: Program) -> Program:
    return with_tensor(program, f"{PROJ}/row_order", lambda t: t[[1, 0, *range(2, 12)]])


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
