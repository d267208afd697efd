"""The plan's file, and how far two plans agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mixcomp.errors import ArtifactError, FormatError, MismatchError, MixCompError
from mixcomp.plans import Plan, overlap

PLAN = Plan({"seed": 0}, "books", {"weights": 8, "payload_bits": 30, "stored_bits": 40}, 0.5, 1e-9, 0.0)


def of(**widths: str) -> Plan:
    return replace(PLAN, sites={n: {"widths": w, "rank": 1, "reorder": "none"} for n, w in widths.items()})


def test_files_are_readable_and_come_back(tmp_path: Path) -> None:
    made = of(a="4485", b="44")
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert (tmp_path / "plan.json").read_bytes() == made.to_bytes()
    assert json.loads(made.to_bytes())["sites"]["a"]["widths"] == "4485"
    assert made.summary()["rows_by_width"] == {"4": 4, "5": 1, "8": 1}
    assert made.summary()["rank"] == 2
    assert repr(made) == repr(of(b="44", a="4485")) != repr(of(a="4485", b="45"))


def test_overlap_is_of_the_rows_wider_than_the_commonest_width() -> None:
    assert overlap(of(a="44485", b="44"), of(a="44485", b="44")) == 1.0
    assert overlap(of(a="4444"), of(a="3333")) == 1.0, "neither favours any row"
    assert overlap(of(a="4448", b="444"), of(a="4484", b="444")) == 0.0
    # {a3, a4, b1} and {a3, b0, b1}; widths themselves do not matter, and narrow rows are not favoured
    assert overlap(of(a="44456", b="45"), of(a="33333", b="33")) == 0.0
    assert overlap(of(a="444562", b="454"), of(a="333832", b="453")) == 0.5


def test_plans_of_other_rows_are_not_compared() -> None:
    with pytest.raises(MismatchError, match="b"):
        overlap(of(a="44", b="4"), of(a="44"))
    with pytest.raises(MismatchError, match="a"):
        overlap(of(a="44"), of(a="444"))


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("{", ArtifactError, "not JSON"),
        ("[]", FormatError, "list"),
        ("{}", FormatError, "fields"),
        (json.dumps(PLAN.to_json() | {"plan_version": 1}), FormatError, "version 1"),
        (json.dumps(PLAN.to_json() | {"sites": []}), FormatError, "'sites'"),
        (json.dumps(PLAN.to_json() | {"price": "high"}), FormatError, "'price'"),
        (json.dumps(PLAN.to_json() | {"more": 1}), FormatError, "more"),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, text: str, error: type[MixCompError], words: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(error, match=words):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent\.json"):
        Plan.load(tmp_path / "absent.json")
