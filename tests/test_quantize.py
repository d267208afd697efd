"""quantize-weights for every form of plan: widths per row or per group, wide groups, both kinds of scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from mixcomp.config import Budget, CompileConfig
from mixcomp.errors import InvariantError, PassError
from mixcomp.format import ALL_WIDTHS, Scales
from mixcomp.lowering.lower import LowerLinears, packed_weight
from mixcomp.manager import run
from mixcomp.packed import PackedWeight
from mixcomp.passes.coupling import analyse
from mixcomp.passes.decision import Decisions
from mixcomp.passes.gptq import Task, feedback, gptq
from mixcomp.passes.quantize import QuantizeWeights
from mixcomp.passes.refine import refine
from mixcomp.passes.reorder import ReorderFeatures
from mixcomp.passes.side_branch import InsertSideBranch
from mixcomp.passes.statistics import CollectStatistics
from mixcomp.planning import record
from mixcomp.profiles import site_format
from mixcomp.program import Fact, Program, Site
from mixcomp.quant import Grid, dequantize
from mixcomp.verify import check
from programs import ABSORBING, GATED, Blueprint, Kind, Layer, build, context, tokens

#: many groups, the last one short
WIDE = Blueprint((Layer(Kind.PLAIN, 24), Layer(Kind.RESIDUAL, 150)), width=150)
FORMS = [(group, scales, kind) for group in (32, 64, 128) for scales in Scales for kind in ("rows", "shared", "mixed")]


@cache
def measured(blueprint: Blueprint) -> Program:
    return run(build(blueprint), [CollectStatistics()], context(blueprint))


def planned(program: Program, group: int, scales: Scales, kind: str, rank: int = 0) -> Program:
    """A plan made by hand: ``rows`` one width a row, ``shared`` one profile for all rows, ``mixed`` several."""
    tensors: dict[str, torch.Tensor] = {}
    total = 0
    for number, site in enumerate(program.open_sites()):
        draw = torch.Generator().manual_seed(number)
        groups = -(-site.columns // group)
        shape = {"rows": (site.rows,), "shared": (1, groups), "mixed": (6, groups)}[kind]
        widths = torch.tensor(ALL_WIDTHS, dtype=torch.uint8)[torch.randint(len(ALL_WIDTHS), shape, generator=draw)]
        if kind == "mixed":
            widths[0] = torch.tensor([1, 4]).repeat(groups)[:groups]  # several groups of 1 bit in several rows
        if kind != "rows":
            widths = widths[torch.randint(shape[0], (site.rows,), generator=draw)].contiguous()
        tensors |= {f"{site.name}/widths": widths, f"{site.name}/planned_rank": torch.tensor(rank)}
        tensors |= {f"{site.name}/group": torch.tensor(group), f"{site.name}/scale_kind": torch.tensor(int(scales))}
        scatter = len(widths.unique(dim=0)) > 1
        fmt = site_format(widths, site.columns, scatter=scatter, group=group, scales=scales)
        tensors[f"{site.name}/planned_bits"] = torch.tensor(fmt.stored_bits())
        total += fmt.stored_bits()
    tensors |= {"budget/bits": torch.tensor(10 * total)}
    tensors |= {f"budget/{n}": torch.tensor(0.0, dtype=torch.float64) for n in ("loss", "price", "gap")}
    return replace(program.with_tensors(tensors), facts=program.facts | {Fact.ASSIGNED})


def settle(program: Program) -> Program:
    """Planned bits with the orders that were found: absorbed rows store no index."""
    out = {}
    for site in program.open_sites():
        order = program.find(site.name, "row_order")
        scatter = order is not None and program.find(site.name, "absorbed") is None
        group, scales = program.stored_form(site)
        fmt = site_format(
            program.tensor(site.name, "widths"), site.columns, scatter=scatter, group=group, scales=scales
        )
        out[f"{site.name}/planned_bits"] = torch.tensor(fmt.stored_bits())
    return program.with_tensors(out)


def quantized(blueprint: Blueprint, group: int, scales: Scales, kind: str, rank: int = 0) -> Program:
    ctx = context(blueprint)
    program = run(planned(measured(blueprint), group, scales, kind, rank), [ReorderFeatures()], ctx, level=0)
    return run(settle(program), [QuantizeWeights(), InsertSideBranch()], ctx, level=2)


def weight_in_stored_order(program: Program, site: Site) -> torch.Tensor:
    weight = program.weight(site).detach().float()
    for name, dim in (("row_order", 0), ("column_order", 1)):
        order = program.find(site.name, name)
        weight = weight if order is None else weight.index_select(dim, order)
    return weight


@pytest.mark.parametrize(("group", "scales", "kind"), FORMS)
@pytest.mark.parametrize("blueprint", [GATED, ABSORBING], ids=["gated", "absorbing"])
def test_plans_are_stored_as_planned(blueprint: Blueprint, group: int, scales: Scales, kind: str) -> None:
    program = quantized(blueprint, group, scales, kind)
    check(program, level=2)
    for site in program.open_sites():
        stored = packed_weight(program, site)
        assert (stored.fmt.group, stored.fmt.scales) == (group, scales)
        widths = program.tensor(site.name, "widths")
        order = program.find(site.name, "row_order")
        widths = widths if order is None else widths[order]
        each = widths if widths.dim() == 2 else widths[:, None].expand(-1, stored.fmt.groups)
        assert torch.equal(stored.group_widths(), each)
        weight = weight_in_stored_order(program, site)
        error = (weight - stored.base()).square().mean(1) / weight.square().mean(1)
        least = each.amin(1)
        assert (error[least > 3] < 0.15).all()
        assert (error[least == 8] < 1e-2).all()  # GPTQ spreads what the inputs do not see


@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize("group", [32, 64])
def test_what_is_read_back_is_what_the_quantizer_thought_it_stored(group: int, scales: Scales) -> None:
    """At every width of a row."""
    from mixcomp.float_grid import fit_float
    from mixcomp.quant import fit_mixed

    program = quantized(WIDE, group, scales, "mixed")
    assert set(ALL_WIDTHS) == {
        w for s in program.open_sites() for w in program.tensor(s.name, "widths").unique().tolist()
    }
    for site in program.open_sites():
        stored, order = packed_weight(program, site), program.find(site.name, "row_order")
        if program.find(site.name, "column_order") is not None:
            continue
        weight = program.weight(site).detach().float()
        sigma, widths = program.tensor(site.input, "sigma"), program.tensor(site.name, "widths")
        grid = (fit_float, fit_mixed)[scales is Scales.TWO_LEVEL](weight, sigma.diagonal(), widths, "s", group)
        task = Task(weight, grid, feedback(sigma, "s"))
        ((codes, loss),) = gptq([task])
        scales_too = isinstance(grid, Grid) and group == 32
        ((codes, better),) = refine([task], [codes], [grid.scales if scales_too else None])
        wanted = dequantize(codes, replace(grid, scales=better) if scales_too else grid)
        wanted = wanted if order is None else wanted[order]
        torch.testing.assert_close(stored.base(), wanted, rtol=1e-6, atol=1e-7)
        assert torch.isfinite(loss).all()


@pytest.mark.parametrize(("scales", "kind"), [(s, k) for s in Scales for k in ("shared", "mixed")])
def test_lowered_programs_compute_what_is_stored(scales: Scales, kind: str) -> None:
    """Side branches, scattered and absorbed rows included; compared with plain linears on the stored weights."""
    program = quantized(ABSORBING, 64, scales, kind, rank=2)
    x = tokens(ABSORBING)
    lowered = run(program, [LowerLinears()], context(ABSORBING), level=2)
    plain = program.clone()
    for site in program.open_sites():
        stored: PackedWeight = packed_weight(program, site)
        weight = stored.dequantize()
        order = program.find(site.name, "row_order")
        if order is not None and not stored.fmt.scatter:
            weight = torch.empty_like(weight).index_copy_(0, order, weight)
        columns = program.find(site.name, "column_order")
        if columns is not None:
            weight = torch.empty_like(weight).index_copy_(1, columns, weight)
        parameter = plain.graph_module.get_parameter(plain.graph_key(site))
        moved = weight.T if site.weight.transposed else weight
        path, _, name = plain.graph_key(site).rpartition(".")
        module = plain.graph_module.get_submodule(path)
        setattr(module, name, torch.nn.Parameter(moved.to(parameter.dtype), requires_grad=False))
    torch.testing.assert_close(lowered.graph_module(x), plain.graph_module(x), rtol=1e-4, atol=1e-4)


def recorded(program: Program, name: str) -> Mapping[str, Any]:
    config = CompileConfig(budget=Budget(16.0))
    return record(program.sites, analyse(program), Decisions.read(program), config, "none", "").sites[name]


def test_a_plan_says_what_differs_from_the_default() -> None:
    program = quantized(GATED, 64, Scales.FLOAT_GROUP, "shared")
    site = program.open_sites()[0]
    row = "".join(map(str, program.tensor(site.name, "widths")[0].tolist()))
    decision = recorded(program, site.name)
    assert decision["widths"] == f"{site.rows}x{row}"
    assert (decision["group"], decision["scales"]) == (64, "float-group")
    default = recorded(quantized(GATED, 32, Scales.TWO_LEVEL, "rows"), site.name)
    assert set(default) == {"widths", "rank", "reorder"}
    assert len(default["widths"]) == site.rows


def test_groups_of_the_same_widths_in_other_places_are_noticed() -> None:
    program = quantized(WIDE, 32, Scales.TWO_LEVEL, "shared")
    site = program.open_sites()[0]
    widths = program.tensor(site.name, "widths").clone()
    first, other = next((i, j) for i in range(4) for j in range(i) if widths[0, i] != widths[0, j])
    widths[:, [first, other]] = widths[:, [other, first]]
    with pytest.raises(InvariantError, match=r"I14: .*group_index does not lead"):
        check(program.with_tensors({f"{site.name}/widths": widths}))


def test_a_kind_of_scales_that_does_not_exist_is_refused() -> None:
    program = planned(measured(GATED), 32, Scales.TWO_LEVEL, "rows")
    site = program.open_sites()[0]
    with pytest.raises(PassError, match="scale_kind 7"):
        program.with_tensors({f"{site.name}/scale_kind": torch.tensor(7)}).stored_form(site)
    with pytest.raises(InvariantError, match=r"I12: .*planned"):
        run(
            program.with_tensors({f"{site.name}/planned_bits": torch.tensor(1)}),
            [ReorderFeatures(), QuantizeWeights()],
            context(GATED),
        )
