"""From a measurement to a plan: pure, in seconds, with neither model nor GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixcomp.budget import original_bits
from mixcomp.config import CompileConfig
from mixcomp.errors import ConfigError, InputError
from mixcomp.format import GROUP, Scales
from mixcomp.measurement import Measurement
from mixcomp.passes.coupling import needs_index
from mixcomp.passes.orders import find_orders
from mixcomp.passes.planner import STRATEGIES, assign
from mixcomp.plans import Plan, widths_text

if TYPE_CHECKING:
    from mixcomp.config import Budget
    from mixcomp.passes.coupling import Couplings
    from mixcomp.passes.decision import Decisions
    from mixcomp.program import Site


def plan(
    measurement: Measurement | str | Path,
    budget: float | str | Budget,
    *,
    strategy: str = "joint",
    overrides: Mapping[str, int] | None = None,
    activations: str = "native",
) -> Plan:
    """Decide the width of every row within ``budget``; the same measurement and arguments give the same bytes.

    The plan is the one that ``compile`` makes of the same model, calibration and options.

    Args:
        measurement: what ``measure`` returned, or a folder it was saved in.
        budget: as in ``compile``.
        strategy: ``"joint"`` or ``"uniform"``; the others measure things of their own, so only ``compile`` runs them.
        overrides: pattern -> width in bits; to leave a site alone, leave it out when measuring.
        activations: as in ``compile``; for ``apply`` to follow.

    Raises:
        MixCompError: bad options, budget out of range, a damaged measurement.
    """
    measured = open_measurement(measurement)
    config = CompileConfig.from_kwargs(
        budget=budget, strategy=strategy, overrides=overrides, activations=activations, **measured.options.to_json()
    )
    if config.strategy not in STRATEGIES:
        raise ConfigError(
            f"strategy {config.strategy!r} needs more of the model than a measurement holds, which serves "
            f"{' and '.join(map(repr, STRATEGIES))}; use mixcomp.compile(model, budget, strategy={config.strategy!r})"
        )
    if config.alone:
        raise ConfigError(
            f"overrides {config.alone[0]!r}: width 16 leaves a site alone, and this one was measured for compiling, with "
            "what it shares an order with; give a width of a code, or measure with exclude="
        )
    prices = measured.prices()
    found = assign(prices, config.budget, config.strategy, config.fixed(s.name for s in prices.open_sites()))
    made = record(prices.sites, prices.couplings, found, config, measured.calibration, measured.fingerprint)
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


def record(
    sites: tuple[Site, ...],
    couplings: Couplings,
    found: Decisions,
    config: CompileConfig,
    calibration: str,
    model: str,
) -> Plan:
    """Decisions as a plan; ``model`` is the fingerprint of the model it is for."""
    index = needs_index(sites, couplings)
    widths = {name: one.widths for name, one in found.sites.items()}
    moved = {name for order in find_orders(widths, couplings) for name in order.sites}
    totals = {"weights": 0, "payload_bits": 0, "stored_bits": 0}
    made = {}
    for site in (s for s in sites if s.in_scope):
        totals["weights"] += site.rows * site.columns
        if not site.open:
            totals["payload_bits"] += original_bits(site)
            totals["stored_bits"] += original_bits(site)
            continue
        one = found.sites[site.name]
        fmt = replace(one.layout(site, index[site.name]), rank=one.rank)
        totals["payload_bits"] += fmt.payload_bits()
        totals["stored_bits"] += fmt.stored_bits()
        reorder = "scatter" if fmt.scatter else "absorbed" if site.name in moved else "none"
        made[site.name] = {"widths": widths_text(one.widths), "rank": one.rank, "reorder": reorder}
        made[site.name] |= {"group": fmt.group} if fmt.group != GROUP else {}
        made[site.name] |= {"scales": fmt.scales.text} if fmt.scales is not Scales.TWO_LEVEL else {}
    return Plan(
        options=config.to_json(),
        calibration=calibration,
        totals=totals,
        predicted_loss=found.loss,
        price=found.price,
        gap=found.gap,
        sites=made,
        left_alone={s.name: s.reason or "out of scope" for s in sites if not s.open},
        model=model,
    )
