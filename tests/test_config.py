"""Budgets and options: what is accepted means exactly what it says, everything else is refused by name (B01-B08)."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mixcomp.config import Budget, CompileConfig
from mixcomp.errors import BudgetError, ConfigError


@pytest.mark.parametrize(
    ("given_budget", "expected"),
    [
        (4.4, Budget(4.4)),
        (4, Budget(4.0)),
        (np.float32(4.5), Budget(4.5)),
        ("4.4bpw", Budget(4.4)),
        (" 4.4 BPW ", Budget(4.4)),
        ("3.9GB", Budget(3.9e9, "bytes")),
        ("300MB", Budget(3e8, "bytes")),
        ("0.1 kb", Budget(100.0, "bytes")),
        (Budget(4.4, count="payload"), Budget(4.4, count="payload")),
    ],
)
def test_forms_of_a_budget(given_budget: object, expected: Budget) -> None:
    assert Budget.parse(given_budget) == expected


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "4.4",
        "",
        "GB",
        "4.4 bits",
        "-3GB",
        "1e9",
        "nan",
        "4.4bpw!",
        "9" * 400 + "GB",
        True,
        False,
        [4],
        {},
        4 + 0j,
    ],
)
def test_what_is_no_budget(bad: object) -> None:
    with pytest.raises(ConfigError, match="budget") as caught:
        Budget.parse(bad)
    assert repr(bad) in str(caught.value)
    assert "4.4bpw" in str(caught.value), "the message has to say what is allowed"


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), -float("inf"), 0, 0.0, -1, 1e9, 16.01, "0MB", "17bpw", 10**400]
)
def test_budgets_out_of_range(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"budget .*(4\.4bpw|3\.9GB)"):
        Budget.parse(bad)


def test_range_errors_are_budget_errors_that_say_what_16_means() -> None:
    with pytest.raises(BudgetError, match="16 bits per weight, the uncompressed weight"):
        Budget.parse(1e9)


@pytest.mark.parametrize(("field", "value"), [("unit", "bit"), ("count", "payloads"), ("count", None)])
def test_budget_fields(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"budget {field}.*allowed"):
        Budget(4.4, **{field: value})


@example(43500, 100)
@given(st.integers(1, 16 * 10**4), st.integers(0, 10**12))
def test_bits_are_the_decimal_product_rounded_down(value: int, weights: int) -> None:
    exact = Fraction(value, 10**4)
    assert Budget(value / 10**4).bits(weights) == exact * weights // 1
    assert Budget.parse(f"{value}MB").bits(weights) == value * 8 * 10**6


def test_config_normalises_and_survives_json() -> None:
    config = CompileConfig.from_kwargs(
        budget="4.4bpw", overrides={"re:.*down_proj": 8, "lm_head": 16}, exclude=["a", "b"]
    )
    assert config.overrides == (("re:.*down_proj", 8), ("lm_head", 16))
    assert config.exclude == ("a", "b")
    hash(config)
    data = config.to_json()
    again = CompileConfig.from_kwargs(**{**data, "budget": Budget(**data["budget"])})
    assert again == config


def test_overrides_may_be_absent() -> None:
    assert CompileConfig.from_kwargs(budget=4.4, overrides=None) == CompileConfig.from_kwargs(budget=4.4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stratagy": "joint"}, ["stratagy", "did you mean 'strategy'"]),
        ({"excludes": []}, ["excludes", "did you mean 'exclude'"]),
        ({"zzz": 1}, ["zzz", "options are"]),
        ({"strategy": "jonit"}, ["strategy", "jonit", "did you mean 'joint'", "'uniform'"]),
        ({"strategy": None}, ["strategy", "None", "'joint'"]),
        ({"effort": "bset"}, ["effort", "bset", "did you mean 'best'", "'fast'"]),
        ({"effort": 3}, ["effort", "3", "'fast'"]),
        ({"activations": "int9"}, ["activations", "int9", "did you mean 'int8'", "'native'"]),
        ({"exclude": "lm_head"}, ["exclude", "lm_head", '["lm_head"]']),
        ({"include": [3]}, ["include", "3"]),
        ({"include": [""]}, ["include", "''"]),
        ({"exclude": ["re:("]}, ["exclude", "re:(", "regular expression"]),
        ({"overrides": {"a": 7}}, ["overrides", "7", "'a'", "(2, 3, 4, 5, 6, 8, 16)"]),
        ({"overrides": {"a": True}}, ["overrides", "True"]),
        ({"overrides": {"a": 4.0}}, ["overrides", "4.0"]),
        ({"overrides": ["a"]}, ["overrides", "'a'"]),
        ({"overrides": 8}, ["overrides", "8", "mapping"]),
        ({"seed": -1}, ["seed", "-1", "0.."]),
        ({"seed": 1.0}, ["seed", "1.0"]),
        ({"seed": True}, ["seed", "True"]),
        ({"samples": 0}, ["samples", "0", "1.."]),
        ({"length": 1}, ["length", "1", "2.."]),
        ({"min_coverage": 1.5}, ["min_coverage", "1.5", "0..1"]),
        ({"min_coverage": float("nan")}, ["min_coverage", "nan"]),
        ({"min_coverage": "much"}, ["min_coverage", "much"]),
    ],
)
def test_bad_options_are_named(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        CompileConfig.from_kwargs(budget=4.4, **options)
    missing = [word for word in words if not re.search(re.escape(word), str(caught.value))]
    assert not missing, f"{missing} not in: {caught.value}"


def test_a_missing_budget_is_named() -> None:
    with pytest.raises(ConfigError, match="budget is missing"):
        CompileConfig.from_kwargs(strategy="joint")


def test_every_strategy_has_passes() -> None:
    from mixcomp.config import STRATEGIES
    from mixcomp.passes import strategies

    assert tuple(strategies.STRATEGIES) == STRATEGIES
    for name in STRATEGIES:
        _, deciding = strategies.passes_of(name, Budget(5.0), (("a", 4),))
        assert (deciding.budget, deciding.fixed) == (Budget(5.0), (("a", 4),))
