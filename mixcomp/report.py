"""What a compiled model consists of: every site's layout and path, three sizes, and what was left alone and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mixcomp.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mixcomp.lowering.module import MixedLinear
    from mixcomp.plans import Plan

#: numbers of tokens for which the path is stated: one decode step, and a prompt
TOKENS = (1, 512)


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One compiled linear.  ``widths`` maps a width (``"4"``; ``"2+4"`` of rows that mix some) to its rows, ``paths`` a
    number of tokens to the path that runs.

    ``reorder``: ``"none"`` (rows as they were), ``"scatter"`` (a row index is stored) or ``"absorbed"`` (consumers read
    the permuted features).
    """

    name: str
    rows: int
    columns: int
    widths: Mapping[str, int]
    rank: int
    reorder: str
    payload_bits: int
    stored_bits: int
    paths: Mapping[int, str]

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return self.stored_bits / (self.rows * self.columns)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": [self.rows, self.columns],
            "widths": dict(self.widths),
            "rank": self.rank,
            "reorder": self.reorder,
            "payload_bits": self.payload_bits,
            "stored_bits": self.stored_bits,
            "bpw": self.bpw,
            "paths": {str(tokens): path for tokens, path in self.paths.items()},
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All sites and the three sizes of a compiled model.

    ``weights``, ``payload_bits`` and ``stored_bits`` are those of the budget's scope, weights left alone in it counted
    at their own size; ``checkpoint_bytes`` is everything a saved model holds, ``original_bytes`` the same uncompiled.
    """

    sites: tuple[SiteRow, ...]
    left_alone: Mapping[str, str]
    weights: int
    payload_bits: int
    stored_bits: int
    checkpoint_bytes: int
    original_bytes: int
    budget: str
    predicted_loss: float
    calibration: str

    @property
    def payload_bpw(self) -> float:
        return self.payload_bits / max(self.weights, 1)

    @property
    def stored_bpw(self) -> float:
        return self.stored_bits / max(self.weights, 1)

    def to_json(self) -> dict[str, Any]:
        return {
            "totals": {
                "weights": self.weights,
                "payload_bits": self.payload_bits,
                "payload_bpw": self.payload_bpw,
                "stored_bits": self.stored_bits,
                "stored_bpw": self.stored_bpw,
                "checkpoint_bytes": self.checkpoint_bytes,
                "original_bytes": self.original_bytes,
            },
            "budget": self.budget,
            "predicted_loss": self.predicted_loss,
            "calibration": self.calibration,
            "rows_by_width": self.rows_by_width(),
            "sites": [site.to_json() for site in self.sites],
            "left_alone": dict(self.left_alone),
        }

    def rows_by_width(self) -> dict[str, int]:
        """Rows of all sites at each width that occurs."""
        total: Counter[str] = Counter()
        for site in self.sites:
            total.update(site.widths)
        return _ascending(total)

    def print(self, console: Console, *, sites: bool = True) -> None:
        """Show it to a person, with a table of all sites if asked for."""
        if sites:
            console.print(self._table())
        for name, reason in self.left_alone.items():
            console.print(f"left alone: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
        for line in self.summary():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def summary(self) -> Iterator[str]:
        """The few lines everybody wants."""
        yield f"budget      {self.budget}"
        yield f"payload     {self.payload_bpw:.4f} bits per weight, {megabytes(self.payload_bits / 8)}"
        yield f"stored      {self.stored_bpw:.4f} bits per weight, {megabytes(self.stored_bits / 8)}"
        yield f"checkpoint  {megabytes(self.checkpoint_bytes)}, uncompiled {megabytes(self.original_bytes)}"
        shares = ", ".join(f"{width} bits: {rows:,}" for width, rows in self.rows_by_width().items())
        ranks = [site.rank for site in self.sites if site.rank]
        yield f"rows        {shares}"
        if ranks:
            yield f"branches    {len(ranks)} of {len(self.sites)} sites, rank {sum(ranks)} in all"
        if any("int8" in path for site in self.sites for path in site.paths.values()):
            yield "activations 8 bits in prompts"
        yield f"calibration {self.calibration}"

    def _table(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Column, Table

        site_name = Column("site", no_wrap=True, overflow="fold")
        titles = ("shape", "rows at each width", "rank", "reorder", "bits", *_path_titles())
        table = Table(site_name, *titles, box=SIMPLE_HEAD)
        for site in self.sites:
            widths = " ".join(f"{rows}x{width}" for width, rows in site.widths.items())
            shape, rank = f"{site.rows} x {site.columns}", str(site.rank or "-")
            table.add_row(site.name, shape, widths, rank, site.reorder, f"{site.bpw:.3f}", *site.paths.values())
        return table


def _path_titles() -> list[str]:
    return [f"path ({tokens})" for tokens in TOKENS]


def describe(model: torch.nn.Module) -> Report:
    """The report of a compiled model, counted from its own modules.

    Raises:
        InputError: the model was not compiled by MixComp.
    """
    from mixcomp.lowering.module import MixedLinear

    compiled = getattr(model, "mixcomp", None)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, MixedLinear)}
    if compiled is None:
        raise InputError(
            f"the {type(model).__name__} was not compiled by MixComp; compile it, or load a compiled folder"
        )
    plan: Plan = compiled.plan
    dtype = _dtype(model)
    sites = tuple(_row(name, module, plan, dtype) for name, module in modules.items())
    checkpoint = checkpoint_bytes(model)
    packed = sum(site.stored_bits for site in sites) // 8
    alone = plan.totals["payload_bits"] - sum(
        site.payload_bits for site in sites
    )  # weights in scope, at their own size
    return Report(
        sites=sites,
        left_alone=plan.left_alone,
        weights=plan.totals["weights"],
        payload_bits=plan.totals["payload_bits"],
        stored_bits=sum(site.stored_bits for site in sites) + alone,
        checkpoint_bytes=checkpoint,
        original_bytes=checkpoint - packed + dtype.itemsize * sum(site.rows * site.columns for site in sites),
        budget=_budget(plan),
        predicted_loss=plan.predicted_loss,
        calibration=plan.calibration,
    )


def gate_lines(run: Mapping[str, Any]) -> Iterator[str]:
    """The gate's table of a run's report, for people; nothing where there was no gate."""
    if run["gate"]:
        tokens = run["calibration"]["held_tokens"]
        yield f"gate        KL from the original in nats a token, on {tokens:,} calibration tokens kept back"
    for row in run["gate"]:
        bits, kl = row["stored_bits_per_weight"], row["kl"]
        found = [] if bits is None else [f"{bits:.4f} bits per weight"]
        found += [row["reason"].partition(";")[0] if kl is None else f"{kl:.4g}", *(["kept"] if row["kept"] else [])]
        yield f"            {row['strategy']:<8} " + "   ".join(found)


def _row(name: str, module: MixedLinear, plan: Plan, dtype: torch.dtype) -> SiteRow:
    from mixcomp.lowering.select import choose_path

    fmt = module.fmt
    widths: Counter[str] = Counter()
    for segment in fmt.segments:
        widths[segment.label] += segment.rows
    decided = plan.sites.get(name, {}).get("reorder")
    device = next(module.buffers()).device.type
    return SiteRow(
        name=name,
        rows=fmt.rows,
        columns=fmt.columns,
        widths=_ascending(widths),
        rank=fmt.rank,
        reorder=decided if isinstance(decided, str) else "scatter" if fmt.scatter else "none",
        payload_bits=fmt.payload_bits(),
        stored_bits=fmt.stored_bits(),
        paths={tokens: choose_path(device, dtype, fmt, tokens, module.activations).value for tokens in TOKENS},
    )


def _ascending(widths: Mapping[str, int]) -> dict[str, int]:
    """By the widest width, rows of one width before those that mix some."""
    return dict(sorted(widths.items(), key=lambda item: [int(w) for w in reversed(item[0].split("+"))]))


def _dtype(model: torch.nn.Module) -> torch.dtype:
    """What the model computes in: the dtype of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _budget(plan: Plan) -> str:
    from mixcomp.config import Budget

    given = plan.options.get("budget")
    return str(Budget(**given)) if isinstance(given, Mapping) else str(given)


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and saved buffers; shared storage is counted once."""
    seen = {(t.device, t.data_ptr(), t.nbytes): t.nbytes for t in model.state_dict().values() if t.numel()}
    return sum(seen.values())


def megabytes(count: float) -> str:
    """Decimal megabytes as text."""
    return f"{count / 1e6:,.1f} MB"
