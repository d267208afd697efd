"""A program with every decision made by hand, no pass involved: what the verifier and the printer are tested on.

Base: ``up`` and ``gate`` share an absorbed order that ``down`` takes over; ``proj`` is scattered and has a side branch;
``flat`` has one width and nothing else; the head is out of scope.  ``mixed`` is the same where ``proj`` has everything
that the default format has not.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from formats import draw
from mixcomp.format import WIDTHS, Scales, SiteFormat, runs
from mixcomp.packed import PackedWeight, pack_codes, pack_scales
from mixcomp.profiles import profiles
from mixcomp.program import Fact, Program, Site
from programs import Blueprint, Kind, Layer, Values, build

UP, GATE, DOWN, PROJ, FLAT = "layers.0.up", "layers.0.gate", "layers.0.down", "layers.1.proj", "layers.2.proj"
BLUEPRINT = Blueprint(
    (Layer(Kind.GATED, 8), Layer(Kind.PLAIN, 12, bias=True), Layer(Kind.REUSED, 12)),
    width=34,
    values=Values.DYADIC,
)
PLANNED = frozenset(Fact) - {Fact.LOWERED}

#: width of every row, original order
ROW_WIDTHS = {
    UP: [4, 2, 4, 2, 4, 2, 4, 2],
    GATE: [4, 2, 4, 2, 4, 2, 4, 2],
    DOWN: [3] * 20 + [5] * 14,
    PROJ: [8, 2, 6, 2, 6, 2, 6, 2, 6, 2, 6, 8],
    FLAT: [4] * 12,
}
ABSORBED = (UP, GATE)


def decided() -> Program:
    """All facts but ``LOWERED`` hold."""
    program = build(BLUEPRINT)
    tensors: dict[str, torch.Tensor] = {}
    sites: dict[str, Site] = {}
    for number, site in enumerate(program.open_sites()):
        tensors.update(_measured(site, number))
        order = _order(site)
        if order is not None:
            tensors[f"{site.name}/row_order"] = order
        if site.name in ABSORBED:
            tensors[f"{site.name}/absorbed"] = torch.tensor(True)
        fmt, stored = _packed(site, order, number)
        sites[site.name] = replace(site, format=fmt)
        tensors.update({f"{site.name}/{name}": t for name, t in stored.items()})
        tensors[f"{site.name}/widths"] = torch.tensor(ROW_WIDTHS[site.name], dtype=torch.uint8)
        tensors[f"{site.name}/planned_bits"] = torch.tensor(fmt.stored_bits())
    tensors[f"{DOWN}/column_order"] = tensors[f"{UP}/row_order"]
    tensors[f"{PROJ}/loss_before_branch"] = torch.tensor(2.0, dtype=torch.float64)
    tensors[f"{PROJ}/loss_after_branch"] = torch.tensor(1.5, dtype=torch.float64)
    tensors["budget/bits"] = torch.tensor(sum(s.format.stored_bits() for s in sites.values() if s.format))
    return replace(program.with_sites(sites).with_tensors(tensors), facts=PLANNED)


#: rows of ``proj`` in ``mixed``: a digit a group
PROFILES = ("82", "44", "18")


def mixed() -> Program:
    """``decided`` with rows of ``proj`` that mix widths, scattered, under float-group scales."""
    program = decided()
    site = program.site(PROJ)
    rows = [[int(digit) for digit in PROFILES[row % 3]] for row in range(site.rows)]
    widths = torch.tensor(rows, dtype=torch.uint8)
    order = torch.argsort(profiles(widths), stable=True)
    weight = draw(widths[order], site.columns, scales=Scales.FLOAT_GROUP, scatter=True, rank=1).weight
    fmt, stored = weight.fmt, {**weight.tensors(), "row_index": order.to(weight.fmt.index_dtype)}
    more = fmt.stored_bits() - site.layout.stored_bits()
    tensors = {f"{PROJ}/{name}": tensor for name, tensor in stored.items()}
    tensors |= {f"{PROJ}/widths": widths, f"{PROJ}/row_order": order, f"{PROJ}/scale_kind": torch.tensor(1)}
    tensors |= {key: program.tensors[key] + more for key in (f"{PROJ}/planned_bits", "budget/bits")}
    dropped = frozenset({f"{PROJ}/scales"})
    return program.with_sites({PROJ: replace(site, format=fmt)}).with_tensors(tensors, drop=dropped)


def _measured(site: Site, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (5, site.columns), generator=draw).float()
    loss = torch.randint(1, 9, (site.rows, 1), generator=draw) * 4.0 ** -torch.arange(len(WIDTHS))
    gamma = torch.randint(0, 5, (site.rows,), generator=draw).float()
    return {f"{site.input}/sigma": x.T @ x, f"{site.name}/gamma": gamma, f"{site.name}/salience": loss}


def _order(site: Site) -> torch.Tensor | None:
    widths = ROW_WIDTHS[site.name]
    order = torch.argsort(torch.tensor(widths), stable=True)
    return None if sorted(widths) == widths else order


def _packed(site: Site, order: torch.Tensor | None, seed: int) -> tuple[SiteFormat, dict[str, torch.Tensor]]:
    """Random codes and scales in the site's format; stored rows lie in ``order``."""
    draw = torch.Generator().manual_seed(seed)
    widths = torch.tensor(ROW_WIDTHS[site.name])
    stored = widths if order is None else widths[order]
    scatter = order is not None and site.name not in ABSORBED
    fmt = SiteFormat(site.rows, site.columns, runs(stored.tolist()), scatter, rank=int(site.name == PROJ))
    codes = torch.randint(0, 256, (site.rows, fmt.padded_columns), generator=draw) % 2 ** stored[:, None]
    codes[:, site.columns :] = 0
    m = torch.randint(1, 17, (site.rows, fmt.groups), generator=draw, dtype=torch.uint8)
    tensors = {
        "codes": pack_codes(codes.to(torch.uint8), fmt),
        "scales": pack_scales(m),
        "factors": torch.exp2(torch.randint(-8, -2, (site.rows,), generator=draw).float()).half(),
    }
    if scatter and order is not None:
        tensors["row_index"] = order.to(fmt.index_dtype)
    if fmt.rank:
        tensors["branch_a"] = torch.randint(-3, 4, (site.rows, 1), generator=draw, dtype=torch.int8)
        tensors["branch_b"] = torch.randint(-3, 4, (1, site.columns), generator=draw, dtype=torch.int8)
        tensors["branch_scale"] = torch.tensor([2.0**-6])
    return fmt, PackedWeight.from_tensors(fmt, tensors).tensors()
