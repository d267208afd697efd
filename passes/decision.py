"""What every strategy decides and writes down: the decisions, how a budget is spent on them, and the base of its pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from mixcomp.budget import Limits, limits, row_span
from mixcomp.config import Budget
from mixcomp.errors import ConfigError
from mixcomp.format import GROUP, WIDTHS, Scales, Segment, SiteFormat
from mixcomp.passes.coupling import analyse, needs_index
from mixcomp.passes.orders import segments
from mixcomp.profiles import site_format
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context, Pass

#: fewest and most bits of a site; the flag says that rows in mixed order need a stored row index
Span = Callable[[Site, bool], tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """One site's: ``widths`` uint8[rows] or uint8[rows, groups] in original order, the ``rank`` of its side branch,
    columns of a group and kind of scales."""

    widths: torch.Tensor
    rank: int = 0
    group: int = GROUP
    scales: Scales = Scales.TWO_LEVEL

    def layout(self, site: Site, index: bool) -> SiteFormat:
        """Format of the sorted rows without the side branch, with a row index if they need both sorting and an index.

        Rows that already lie in as few segments as a sort would leave stay where they are.
        """
        if self.widths.dim() == 1:
            held = torch.bincount(self.widths.long().cpu(), minlength=WIDTHS[-1] + 1).tolist()
            sizes = tuple(Segment(rows, width) for width, rows in enumerate(held) if rows)
            fmt = SiteFormat(site.rows, site.columns, sizes, group=self.group, scales=self.scales)
            kinds = len(sizes)
        else:
            fmt = site_format(self.widths, site.columns, group=self.group, scales=self.scales)
            kinds = len(self.widths.unique(dim=0))
        return replace(fmt, scatter=index and segments(self.widths) > kinds)


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """All sites'.  ``loss`` is what they are predicted to cost, ``price`` the loss one more bit would save, ``gap`` how
    far the loss can be above the best, ``ceiling`` the bits that were there to spend."""

    sites: Mapping[str, Decision]
    loss: float = 0.0
    price: float = 0.0
    gap: float = 0.0
    ceiling: int = 0

    def table(self, sites: Iterable[Site], index: Mapping[str, bool], count: str) -> dict[str, torch.Tensor]:
        """The tensors that the passes document, for a program's table."""
        out = {"budget/bits" if count == "stored" else "budget/payload_bits": torch.tensor(self.ceiling)}
        for site in (s for s in sites if s.open):
            one = self.sites[site.name]
            out[f"{site.name}/widths"] = one.widths
            out[f"{site.name}/planned_bits"] = torch.tensor(one.layout(site, index[site.name]).stored_bits())
            out[f"{site.name}/planned_rank"] = torch.tensor(one.rank)
            if one.widths.dim() == 2 or (one.group, one.scales) != (GROUP, Scales.TWO_LEVEL):
                out[f"{site.name}/group"] = torch.tensor(one.group)
                out[f"{site.name}/scale_kind"] = torch.tensor(int(one.scales))
        for what in ("loss", "price", "gap"):
            out[f"budget/{what}"] = torch.tensor(getattr(self, what), dtype=torch.float64)
        return out

    def write(self, program: Program, index: Mapping[str, bool], count: str) -> Program:
        """``table`` into the program, in place of what another strategy wrote about a site."""
        stale = frozenset(f"{s.name}/{key}" for s in program.sites for key in ("group", "scale_kind"))
        return program.with_tensors(self.table(program.sites, index, count), stale)

    @classmethod
    def read(cls, program: Program) -> Decisions:
        """What ``write`` wrote."""
        of = program.tensors
        ceiling = next(int(of[key]) for key in ("budget/bits", "budget/payload_bits") if key in of)
        made = {
            s.name: Decision(
                program.tensor(s.name, "widths").cpu(),
                int(program.tensor(s.name, "planned_rank")),
                *program.stored_form(s),
            )
            for s in program.open_sites()
        }
        loss, price, gap = (float(of[f"budget/{what}"]) for what in ("loss", "price", "gap"))
        return cls(made, loss, price, gap, ceiling)


def bounds(
    sites: tuple[Site, ...], index: Mapping[str, bool], budget: Budget, fixed: Mapping[str, int], span: Span
) -> Limits:
    """Fewest and most bits that can be spent; ``ConfigError`` where ``fixed`` names no open site or no width."""
    names = {s.name for s in sites if s.open}
    for name, width in fixed.items():
        if name not in names or width not in WIDTHS:
            raise ConfigError(
                f"fixed width {width!r} for {name!r}: widths are {WIDTHS}, sites e.g. {sorted(names)[:3]}"
            )
    return limits(sites, index, fixed, budget.count, lambda site: span(site, index[site.name]))


def spend(
    sites: tuple[Site, ...],
    index: Mapping[str, bool],
    budget: Budget,
    fixed: Mapping[str, int],
    span: Span,
    decide: Callable[[tuple[Site, ...], int], Decisions],
    pinned_loss: Callable[[Site, torch.Tensor], float],
) -> Decisions:
    """Spend what ``fixed`` sites leave of ``budget`` with ``decide(sites, room)``.

    Raises:
        BudgetError: it is below the floor or above the ceiling of the weights in scope.
        ConfigError: ``fixed`` names a site that is not open, or a width that does not exist.
    """
    able = bounds(sites, index, budget, fixed, span)
    ceiling = budget.bits(able.weights)
    able.require(ceiling, str(budget))
    free = tuple(s for s in sites if s.open and s.name not in fixed)
    pinned = [s for s in sites if s.name in fixed]
    held = sum(row_span(s, fixed[s.name], fixed[s.name], False, budget.count)[0] for s in pinned)
    found = decide(free, ceiling - able.fixed - held)
    own = {s.name: Decision(torch.full((s.rows,), fixed[s.name], dtype=torch.uint8)) for s in pinned}
    loss = found.loss + sum(pinned_loss(s, own[s.name].widths) for s in pinned)
    made = {**found.sites, **own}
    return replace(found, sites={s.name: made[s.name] for s in sites if s.open}, loss=loss, ceiling=ceiling)


@dataclass(frozen=True)
class Assignment(Pass):
    """Base of the passes that decide: they hold a budget and sites whose width the user set.

    ``budget`` is a hard ceiling on the weights in scope; its ``count`` says whether everything stored is counted or,
    to match a paper's setting, codes only.  ``fixed`` are (site, width) pairs that are not up for choice.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.ASSIGNED})

    budget: Budget = field(default_factory=lambda: Budget(4.4))
    fixed: tuple[tuple[str, int], ...] = ()

    def run(self, program: Program, context: Context) -> Program:
        index = needs_index(program.sites, analyse(program))
        found = spend(
            program.sites, index, self.budget, dict(self.fixed), self.span,
            lambda sites, room: self.decide(program, sites, index, room, context),
            lambda site, widths: self.pinned_loss(program, site, widths),
        )  # fmt: skip
        return found.write(program, index, self.budget.count)

    def limits(self, program: Program) -> Limits:
        """Fewest and most bits that this pass can spend; known before any calibration."""
        index = needs_index(program.sites, analyse(program))
        return bounds(program.sites, index, self.budget, dict(self.fixed), self.span)

    @abstractmethod
    def span(self, site: Site, index: bool) -> tuple[int, int]:
        """Fewest and most bits of a site; ``index``: mixed rows need a stored row index."""

    @abstractmethod
    def decide(
        self, program: Program, sites: tuple[Site, ...], index: Mapping[str, bool], room: int, context: Context
    ) -> Decisions:
        """Spend ``room`` bits on ``sites``."""

    def pinned_loss(self, program: Program, site: Site, widths: torch.Tensor) -> float:
        """Predicted loss of a pinned site: 0 where the strategy has no price for widths it did not choose."""
        return 0.0
