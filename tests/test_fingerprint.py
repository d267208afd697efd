"""Fingerprints: the same for the same linears in any order, another for any other; differences are listed."""

from __future__ import annotations

import hashlib

import pytest

from mixcomp import printer
from mixcomp.errors import MismatchError
from mixcomp.fingerprint import Identity
from mixcomp.shards import content
from programs import Blueprint, Kind, Layer, build

LINEARS = {f"layer.{i}": (4 + i, 8, "F32", f"{i:064x}") for i in range(8)}


def test_order_of_registration_does_not_matter() -> None:
    back = Identity(dict(reversed(LINEARS.items())))
    assert back.fingerprint == Identity(LINEARS).fingerprint
    back.require(Identity(LINEARS))


@pytest.mark.parametrize("change", [(5, 8, "F32", f"{0:064x}"), (4, 8, "F16", f"{0:064x}"), (4, 8, "F32", f"{9:064x}")])
def test_shapes_dtypes_and_values_do(change: tuple[int, int, str, str]) -> None:
    assert Identity({**LINEARS, "layer.0": change}).fingerprint != Identity(LINEARS).fingerprint


def test_transposed_storage_is_the_same_weight() -> None:
    one, other = (Identity.of(build(Blueprint((Layer(kind, 16),)))) for kind in (Kind.PLAIN, Kind.TRANSPOSED))
    assert [linear[:3] for linear in one.linears.values()] == [linear[:3] for linear in other.linears.values()]


def test_digests_are_of_whole_weights_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and digests keep together, over many threads, pieces that do not divide a weight, and transposed ones."""
    layers = [Layer((Kind.PLAIN, Kind.TRANSPOSED)[i % 2], 16 + i) for i in range(20)]
    program = build(Blueprint(tuple(layers)))
    wanted = {s.name: hashlib.sha256(content(program.weight(s))).hexdigest() for s in program.sites}
    assert len({*wanted.values()}) == len(wanted) >= 20
    for size in (52, 1 << 24):
        monkeypatch.setattr(printer, "CHUNK_BYTES", size)
        assert {name: linear[3] for name, linear in Identity.of(program).linears.items()} == wanted


def test_the_first_five_differences_are_named() -> None:
    given = {name: (*linear[:3], "f" * 64) for name, linear in LINEARS.items()} | {"extra": (1, 1, "F32", "")}
    with pytest.raises(MismatchError) as caught:
        Identity(given).require(Identity(LINEARS))
    text = str(caught.value)
    assert "extra is not in the measurement" in text
    assert text.count("has other weights") == 4
    assert "and 4 more" in text
    with pytest.raises(MismatchError, match=r"layer\.0 is 5 x 8 F16, measured was 4 x 8 F32"):
        Identity({**LINEARS, "layer.0": (5, 8, "F16", "")}).require(Identity(LINEARS))
