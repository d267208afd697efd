"""Which model it is: a digest over the names, shapes, dtypes and values of all its linears."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixcomp.errors import MismatchError
from mixcomp.files import sha256
from mixcomp.printer import tensor_digest
from mixcomp.records import spell
from mixcomp.shards import SPELLING, THREADS

if TYPE_CHECKING:
    from mixcomp.program import Program, Site

#: differences that an error lists
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Identity:
    """``linears`` maps a site to (rows, columns, dtype, sha256 of its weight as rows x columns)."""

    linears: Mapping[str, tuple[int, int, str, str]]

    @classmethod
    def of(cls, program: Program) -> Identity:
        """Identity of a captured model; every weight is read once, a few pieces at a time."""
        with ThreadPoolExecutor(THREADS) as pool:
            weights = map(program.weight, program.sites)
            digests = pool.map(lambda weight: tensor_digest(weight, whole=True), weights)
            return cls.given(program.sites, dict(zip((s.name for s in program.sites), digests, strict=True)))

    @classmethod
    def given(cls, sites: tuple[Site, ...], digests: Mapping[str, str]) -> Identity:
        """Identity of sites with weights of these digests."""
        return cls({s.name: (s.rows, s.columns, SPELLING[s.weight.dtype], digests[s.name]) for s in sites})

    @property
    def fingerprint(self) -> str:
        """One digest of it all; the order in which modules were registered does not matter."""
        return sha256(spell({name: list(linear) for name, linear in self.linears.items()}))

    def require(self, measured: Identity) -> None:
        """``MismatchError`` with the first differences unless a measurement was made from this model."""
        if self == measured:
            return
        found = list(self._differences(measured))
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise MismatchError(
            f"the measurement was made from another model: {'; '.join(found[:SHOWN])}{more}; "
            "give the model that was measured, or measure this one"
        )

    def _differences(self, measured: Identity) -> list[str]:
        found = []
        for name in sorted(self.linears.keys() | measured.linears.keys()):
            own, other = self.linears.get(name), measured.linears.get(name)
            if own is None or other is None:
                found.append(f"{name} is not in the {'model' if own is None else 'measurement'}")
            elif own[:3] != other[:3]:
                found.append(f"{name} is {own[0]} x {own[1]} {own[2]}, measured was {other[0]} x {other[1]} {other[2]}")
            elif own != other:
                found.append(f"{name} has other weights")
        return found
