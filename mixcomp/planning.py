"""From a measurement to a plan: pure, in seconds, with neither model nor GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixcomp.budget import original_bits
from mixcomp.config import CompileConfig
from mixcomp.errors import ConfigError, InputError
from mixcomp.measurement import Measurement
from mixcomp.passes.coupling import needs_index
from mixcomp.passes.orders import find_orders
from mixcomp.passes.planner import Assignment, Prices, assign, site_format
from mixcomp.plans import Plan

if TYPE_CHECKING:
    from mixcomp.config import Budget


def plan(
    measurement: Measurement | str | Path,
    budget: float | str | Budget,
    *,
    strategy: str = "joint",
    overrides: Mapping[str, int] | None = None,
) -> Plan:
    """Decide the width of every row within ``budget``; the same measurement and arguments give the same bytes.

    The plan is the one that ``compile`` makes of the same model, calibration and options.

    Args:
        measurement: what ``measure`` returned, or a folder it was saved in.
        budget, strategy: as in ``compile``.
        overrides: pattern -> width in bits; to leave a site alone, leave it out when measuring.

    Raises:
        MixCompError: bad options, budget out of range, a damaged measurement.
    """
    measured = open_measurement(measurement)
    config = CompileConfig.from_kwargs(
        budget=budget, strategy=strategy, overrides=overrides, **measured.options.to_json()
    )
    if config.alone:
        raise ConfigError(
            f"overrides {config.alone[0]!r}: width 16 leaves a site alone, and this one was measured for compiling, with "
            "what it shares an order with; give a width of a code, or measure with exclude="
        )
    prices = measured.prices()
    found = assign(prices, config.budget, config.strategy, config.fixed(s.name for s in prices.open_sites()))
    made = record(prices, found, config, measured.calibration, measured.fingerprint)
    return replace(made, measurement=measured)


def open_measurement(given: object) -> Measurement:
    """A measurement as it is, or the one in a folder; anything else is an ``InputError``."""
    if isinstance(given, Measurement):
        return given
    if isinstance(given, (str, Path)):
        return Measurement.load(given)
    raise InputError(
        f"measurement is a {type(given).__name__}; give what mixcomp.measure returned, or the folder it was saved in"
    )


def record(prices: Prices, found: Assignment, config: CompileConfig, calibration: str, model: str) -> Plan:
    """An assignment as a plan; ``model`` is the fingerprint of the model it is for."""
    index = needs_index(prices.sites, prices.couplings)
    moved = {name: order for order in find_orders(found.widths, prices.couplings) for name in order.sites}
    totals = {"weights": 0, "payload_bits": 0, "stored_bits": 0}
    sites = {}
    for site in (s for s in prices.sites if s.in_scope):
        totals["weights"] += site.rows * site.columns
        if not site.open:
            totals["payload_bits"] += original_bits(site)
            totals["stored_bits"] += original_bits(site)
            continue
        widths, rank = found.widths[site.name], found.ranks[site.name]
        fmt = replace(site_format(site, widths, index[site.name]), rank=rank)
        totals["payload_bits"] += fmt.payload_bits()
        totals["stored_bits"] += fmt.stored_bits()
        reorder = "scatter" if fmt.scatter else "absorbed" if site.name in moved else "none"
        digits = (widths + ord("0")).numpy().tobytes().decode()
        sites[site.name] = {"widths": digits, "rank": rank, "reorder": reorder}
    return Plan(
        options=config.to_json(),
        calibration=calibration,
        totals=totals,
        predicted_loss=found.loss,
        price=found.price,
        gap=found.gap,
        sites=sites,
        left_alone={s.name: s.reason or "out of scope" for s in prices.sites if not s.open},
        model=model,
    )
