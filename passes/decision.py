"""What every strategy writes down: the table of a decision, and the base of passes that make one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mixcomp.budget import Limits, limits, row_bits
from mixcomp.config import Budget
from mixcomp.errors import ConfigError
from mixcomp.format import WIDTHS, SiteFormat, runs
from mixcomp.passes.coupling import analyse, needs_index
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context, Pass


@dataclass(frozen=True, slots=True)
class Decision:
    """One site's.  ``widths`` uint8[rows], or uint8[rows, groups] with ``group`` columns each; ``bits`` without the side
    branch; ``loss`` as predicted; ``scale_kind`` 0: two-level scales, 1: an fp16 scale and an integer zero per group."""

    widths: torch.Tensor
    bits: int
    loss: float = 0.0
    rank: int = 0
    group: int | None = None
    scale_kind: int | None = None


@dataclass(frozen=True, slots=True)
class Decisions:
    """All sites'.  ``price`` is the loss one more bit would save, ``gap`` how far the loss can be above the best."""

    sites: Mapping[str, Decision]
    price: float = 0.0
    gap: float = 0.0


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
        pinned = fixed_widths(program, self.fixed)
        bounds = self.limits(program)
        ceiling = self.budget.bits(bounds.weights)
        bounds.require(ceiling, str(self.budget))
        free = tuple(s for s in program.open_sites() if s.name not in pinned)
        count = self.budget.count
        held = {n: site_bits(program.site(n), width, count) for n, width in pinned.items()}
        found = self.decide(program, free, ceiling - bounds.fixed - sum(held.values()), context)
        widths = {n: torch.full((program.site(n).rows,), w, dtype=torch.uint8) for n, w in pinned.items()}
        own = {n: row_decision(program.site(n), w, False, self.pinned_loss(program, n, w)) for n, w in widths.items()}
        limit = {"budget/bits" if count == "stored" else "budget/payload_bits": torch.tensor(ceiling)}
        # what another strategy wrote about a site is not this one's decision
        stale = frozenset(f"{s.name}/{key}" for s in program.sites for key in ("group", "scale_kind"))
        return program.with_tensors(limit | table({**found.sites, **own}, found.price, found.gap), stale)

    def limits(self, program: Program) -> Limits:
        """Fewest and most bits that this pass can spend; known before any calibration."""
        pinned = fixed_widths(program, self.fixed)
        index = needs_index(program, analyse(program))
        return limits(program.sites, index, pinned, self.budget.count, lambda site: self.span(site, index[site.name]))

    @abstractmethod
    def span(self, site: Site, index: bool) -> tuple[int, int]:
        """Fewest and most bits of a site; ``index``: mixed rows need a stored row index."""

    @abstractmethod
    def decide(self, program: Program, sites: tuple[Site, ...], room: int, context: Context) -> Decisions:
        """Spend ``room`` bits on ``sites``."""

    def pinned_loss(self, program: Program, name: str, widths: torch.Tensor) -> float:
        """Predicted loss of a pinned site: 0 where the strategy has no price for widths it did not choose."""
        return 0.0


def fixed_widths(program: Program, fixed: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Site -> width; ``ConfigError`` where the site is not open or the width is none of the format's."""
    names = {s.name for s in program.open_sites()}
    for name, width in fixed:
        if name not in names or width not in WIDTHS:
            raise ConfigError(
                f"fixed width {width!r} for {name!r}: widths are {WIDTHS}, sites e.g. {sorted(names)[:3]}"
            )
    return dict(fixed)


def site_bits(site: Site, width: int, count: str) -> int:
    """Bits of a site all of whose rows have one width."""
    return site.rows * row_bits(site.rows, site.columns, width, False, count)


def row_decision(site: Site, widths: torch.Tensor, index: bool, loss: float, rank: int = 0) -> Decision:
    """Widths uint8[rows] in the default format; ``index`` says that rows in mixed order would need a row index."""
    ordered = sorted(widths.tolist())
    # rows that already lie in as few segments as a sort would leave stay where they are
    scatter = index and len(runs(widths.tolist())) > len(set(ordered))
    fmt = SiteFormat(site.rows, site.columns, runs(ordered), scatter)
    return Decision(widths, fmt.stored_bits(), loss, rank)


def table(decisions: Mapping[str, Decision], price: float, gap: float) -> dict[str, torch.Tensor]:
    """The tensors of all decisions, and the prediction."""
    out: dict[str, torch.Tensor] = {}
    for name, one in decisions.items():
        out[f"{name}/widths"] = one.widths
        out[f"{name}/planned_bits"] = torch.tensor(one.bits)
        out[f"{name}/planned_rank"] = torch.tensor(one.rank)
        for key, value in (("group", one.group), ("scale_kind", one.scale_kind)):
            if value is not None:
                out[f"{name}/{key}"] = torch.tensor(value)
    predicted = sum(one.loss for one in decisions.values())
    for key, number in (("loss", predicted), ("price", price), ("gap", gap)):
        out[f"budget/{key}"] = torch.tensor(number, dtype=torch.float64)
    return out
