"""Counting bits.  Nothing else in the code base counts: planner, verifier, report and files all ask here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixcomp.errors import BudgetError
from mixcomp.format import GROUP, WIDTHS, Scales, Segment, SiteFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mixcomp.program import Site


@dataclass(frozen=True, slots=True)
class Limits:
    """Fewest and most bits the weights in scope can take, and how many weights that is.

    ``fixed`` are the bits of weights in scope that are left alone: they count at their own size.
    """

    weights: int
    fixed: int
    floor: int
    ceiling: int

    def require(self, bits: int, asked: str) -> None:
        """Raise ``BudgetError`` unless floor <= bits <= ceiling."""
        if self.floor <= bits <= self.ceiling:
            return
        low, high = self.floor / self.weights, self.ceiling / self.weights
        share = (
            f"; {self.fixed / self.weights:.3f} of it are weights left alone at their own size" if self.fixed else ""
        )
        side, what = ("below the floor", "raise it") if bits < self.floor else ("above the ceiling", "lower it")
        raise BudgetError(
            f"budget {asked} is {side}: these {self.weights:,} weights take {low:.3f} to {high:.3f} bits each{share}; "
            f"{what}, or change the scope with include= and exclude="
        )


def row_bits(
    rows: int, columns: int, width: int, index: bool, count: str = "stored", group: int = GROUP,
    scales: Scales = Scales.TWO_LEVEL,
) -> int:  # fmt: skip
    """Bits one row adds to its site: codes with padding, scales and zeros, row factor, row index if it needs one.

    With ``count="payload"`` codes of real weights only.  Rows never share a byte, so a site without a side branch costs
    exactly the sum of its rows.
    """
    fmt = SiteFormat(1, columns, (Segment(1, width),), group=group, scales=scales)
    if count == "payload":
        return fmt.payload_bits()
    index_bits = SiteFormat(rows, columns, (Segment(rows, width),)).index_dtype.itemsize * 8
    return fmt.stored_bits() + (index_bits if index else 0)


def original_bits(site: Site) -> int:
    """Bits of a site's weight as the model came."""
    return site.rows * site.columns * site.weight.dtype.itemsize * 8


def row_span(site: Site, narrow: int, wide: int, index: bool, *form: Any) -> tuple[int, int]:
    """Bits of a site with all rows at one width and with all at another, the latter with an index if it needs one.

    ``form``: what else ``row_bits`` takes.
    """
    least, most = (row_bits(site.rows, site.columns, w, i, *form) for w, i in ((narrow, False), (wide, index)))
    return site.rows * least, site.rows * most


def limits(
    sites: Iterable[Site],
    index: Mapping[str, bool],
    fixed: Mapping[str, int],
    count: str,
    span: Callable[[Site], tuple[int, int]] | None = None,
) -> Limits:
    """Limits of all sites in scope.  ``fixed`` pins sites to a width; ``index`` says which rows may need an index.

    A site with one width needs no index, so neither floor nor ceiling holds any.  ``span`` gives the fewest and most
    bits of a site that is not pinned; without it they are those of the narrowest and the widest row width.
    """
    weights = kept = low = high = 0
    for site in sites:
        if not site.in_scope:
            continue
        weights += site.rows * site.columns
        if not site.open:
            kept += original_bits(site)
            continue
        if span is not None and site.name not in fixed:
            least, most = span(site)
        else:
            narrow, wide = (fixed[site.name],) * 2 if site.name in fixed else (WIDTHS[0], WIDTHS[-1])
            least, most = row_span(site, narrow, wide, index.get(site.name, False), count)
        low, high = low + least, high + most
    return Limits(weights, kept, low + kept, high + kept)
