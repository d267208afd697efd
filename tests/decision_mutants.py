"""Planted bugs in statistics, decisions and orders (I09-I13); importing this adds them to ``mutants.MUTANTS``."""

from __future__ import annotations

from dataclasses import replace

import torch

from decisions import DOWN, FLAT, GATE, PLANNED, PROJ, UP
from mixcomp.program import Fact, Program
from mutants import changed, mutant, with_site, with_tensor, without

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


@mutant("I10")
def scale_of_a_channel_negative(program: Program) -> Program:
    site = program.site(DOWN)
    return program.with_tensors({f"{site.input}/scale": changed(torch.ones(site.columns), 3, -1.0)})


@mutant("I10")
def scale_of_other_rows(program: Program) -> Program:
    return program.with_tensors({f"{UP}/row_scale": torch.ones(program.site(UP).rows + 1)})


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
