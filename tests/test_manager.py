"""The manager: order, clones, facts, checks, errors, history, printing and dumps, with passes made for the purpose."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import decision_mutants
import decisions
import mutants
from mixcomp.errors import (
    ConfigError,
    InvariantError,
    PassError,
    PassOrderError,
    StorageError,
    WeightError,
)
from mixcomp.manager import run
from mixcomp.printer import digest
from mixcomp.program import Fact, Program
from mixcomp.protocol import Context
from programs import PLAIN, build, own
from toys import Do, Forget, Idle, Salience, Widths, relu_to_silu


def fail(error: BaseException) -> Callable[[Program], Program]:
    def action(program: Program) -> Program:
        relu_to_silu(program)
        raise error

    return action


@pytest.fixture
def program() -> Program:
    return build(PLAIN)


def test_passes_run_in_order_and_leave_facts_and_history(program: Program) -> None:
    before = digest(program)
    result = run(program, [Salience(2.0), Widths(), Idle()], Context(), level=2)
    assert result.facts == {Fact.SALIENCE, Fact.ASSIGNED}
    assert [(s.spec, s.changed) for s in result.history] == [
        ("toy-salience{scale=2.0}", True),
        ("toy-widths", True),
        ("idle", False),
    ]
    assert all(s.seconds >= 0 for s in result.history)
    assert (digest(program), program.facts, program.history) == (before, frozenset(), ())


def test_no_passes_no_change(program: Program) -> None:
    assert run(program, [], Context()) is program


def test_missing_fact_is_named_with_its_provider_before_anything_runs(program: Program) -> None:
    ran = []
    with pytest.raises(PassOrderError, match=r"toy-widths requires the fact 'salience', which toy-salience provides"):
        run(program, [Do(ran.append), Widths(), Salience()], Context())
    with pytest.raises(PassOrderError, match="no pass of this pipeline provides"):
        run(program, [Widths()], Context())
    with pytest.raises(PassOrderError, match="toy-widths requires"):
        run(program, [Salience(), Forget(), Widths()], Context())
    assert not ran


def test_facts_established_earlier_count(program: Program) -> None:
    first = run(program, [Salience()], Context())
    assert run(first, [Widths()], Context()).facts == {Fact.SALIENCE, Fact.ASSIGNED}


def test_clobbered_facts_are_gone(program: Program) -> None:
    assert run(program, [Salience(), Forget()], Context()).facts == frozenset()


def test_a_pass_cannot_claim_facts_it_does_not_declare(program: Program) -> None:
    claims = Do(lambda p: replace(p, facts=frozenset(Fact)))
    assert run(program, [claims], Context()).facts == frozenset()


def test_a_pass_must_keep_its_promise(program: Program) -> None:
    with pytest.raises(InvariantError, match=r"^I10: .*salience"):
        run(program, [Salience(-1.0)], Context())


def test_facts_held_before_are_checked_again(program: Program) -> None:
    spoils = Do(lambda p: p.with_tensors({}, drop=frozenset({"layers.0.proj/salience"})))
    with pytest.raises(InvariantError, match=r"^I10: ") as caught:
        run(program, [Salience(), spoils], Context())
    assert "after pass do{" in str(caught.value)
    assert any("after toy-salience{scale=1.0}" in note for note in caught.value.__notes__)


def test_the_input_is_checked_too() -> None:
    broken = decision_mutants.width_seven(decisions.decided())
    with pytest.raises(InvariantError, match=r"^I11: "):
        run(broken, [], Context())


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_exception_leaves_the_input_whole(program: Program, level: int) -> None:
    before = digest(program)
    with pytest.raises(PassError, match=r"pass do failed with ZeroDivisionError: 1/0") as caught:
        run(program, [Idle(), Do(fail(ZeroDivisionError("1/0")))], Context(), level=level)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "after idle" in caught.value.__notes__[0]
    assert digest(program) == before


def test_own_errors_are_kept_and_noted(program: Program) -> None:
    with pytest.raises(WeightError, match=r"^layers\.0\.proj: bad") as caught:
        run(program, [Do(fail(WeightError("layers.0.proj: bad")))], Context())
    assert caught.value.__notes__[0].startswith("in pass do{")
    assert "after no pass" in caught.value.__notes__[0]


def test_interrupts_are_not_errors(program: Program) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(program, [Do(fail(KeyboardInterrupt()))], Context())


@pytest.mark.parametrize("nonsense", [None, 3, "program"])
def test_a_pass_returns_a_program(program: Program, nonsense: object) -> None:
    with pytest.raises(PassError, match="a pass returns a Program"):
        run(program, [Do(lambda _: nonsense)], Context())


def test_graph_edits_do_not_reach_the_input(program: Program) -> None:
    before, code = digest(program), program.graph_module.code
    result = run(program, [Do(relu_to_silu)], Context(), level=2)
    assert result.history[0].changed
    assert (digest(program), program.graph_module.code) == (before, code)


WRITERS: list[tuple[str, Callable[[Program], Program], int]] = [
    ("I08", mutants.written_in_place, 1),
    ("I09", decision_mutants.table_written_in_place, 1),
    ("I08", mutants.written_behind_the_counter, 2),
]


@pytest.mark.parametrize(("id", "write", "level"), WRITERS, ids=lambda v: getattr(v, "__name__", v))
def test_writes_in_place_are_caught(id: str, write: Callable[[Program], Program], level: int) -> None:
    with pytest.raises(InvariantError, match=f"^{id}: "):
        run(own(decisions.decided()), [Do(write)], Context(), level=level)


def test_writes_to_dropped_tensors_are_caught_at_level_2() -> None:
    key = f"{decisions.PROJ}/gamma"

    def write_and_hide(program: Program) -> Program:
        old = program.tensors[key]
        new = program.with_tensors({key: old.clone()})
        old.mul_(3)
        return new

    with pytest.raises(InvariantError, match=r"^I08: pass do wrote"):
        run(own(decisions.decided()), [Do(write_and_hide)], Context(), level=2)


def test_edits_of_the_callers_graph_are_caught_at_level_2(program: Program) -> None:
    with pytest.raises(InvariantError, match=r"^I08: pass do wrote"):
        run(program, [Do(lambda clone: relu_to_silu(program) and clone)], Context(), level=2)


def test_check_level_comes_from_the_environment(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    spoils = Do(mutants.dead_node)
    monkeypatch.setenv("MIXCOMP_CHECK", "0")
    run(program, [spoils], Context())
    monkeypatch.delenv("MIXCOMP_CHECK")
    with pytest.raises(InvariantError, match=r"^I05"):
        run(program, [spoils], Context())
    monkeypatch.setenv("MIXCOMP_CHECK", "yes")
    with pytest.raises(ConfigError, match=r"MIXCOMP_CHECK='yes': allowed are 0"):
        run(program, [spoils], Context())


@pytest.mark.parametrize(
    ("show", "seen"),
    [("all", ["idle", "toy-salience"]), ("changed", ["toy-salience"]), ("idle", ["idle"]), ("", [])],
)
def test_programs_are_printed_to_the_log(
    program: Program, show: str, seen: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MIXCOMP_PRINT_IR", show)
    with caplog.at_level(logging.WARNING, "mixcomp.ir"):
        run(program, [Idle(), Salience()], Context())
    records = [r.getMessage() for r in caplog.records if r.name == "mixcomp.ir"]
    assert [r.splitlines()[0] for r in records] == [f"after {name}" for name in seen]
    assert all("linear(%1, @layers.0.proj)" in r for r in records)


def test_dumps_are_numbered_over_several_runs(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "dumps"
    monkeypatch.setenv("MIXCOMP_DUMP_DIR", str(folder))
    first = run(program, [Salience()], Context())
    second = run(first, [Widths(), Idle()], Context())
    names = ["000_input.txt", "001_toy-salience.txt", "002_toy-widths.txt", "003_idle.txt"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert (folder / "002_toy-widths.txt").read_text() == (folder / "003_idle.txt").read_text()
    assert "facts: assigned salience" in (folder / "003_idle.txt").read_text()
    assert len(second.history) == 3
    run(first, [Widths()], Context())
    assert sorted(p.name for p in folder.iterdir()) == names[:3]
    run(program, [Idle()], Context())
    assert sorted(p.name for p in folder.iterdir()) == ["000_input.txt", "001_idle.txt"]


@pytest.mark.parametrize("stranger", ["notes.md", "0001_idle.txt", "001_idle.txt.bak", "001_Idle.txt"])
def test_a_folder_with_strangers_is_refused_and_left_alone(
    program: Program, stranger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXCOMP_DUMP_DIR", str(tmp_path))
    (tmp_path / stranger).write_text("mine")
    (tmp_path / "001_idle.txt").write_text("old")
    with pytest.raises(ConfigError, match=r"holds '.*', which is no dump"):
        run(program, [Idle()], Context())
    assert (tmp_path / stranger).read_text() == "mine"
    assert (tmp_path / "001_idle.txt").read_text() == "old"


def test_links_are_strangers(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, target = tmp_path / "dumps", tmp_path / "target"
    folder.mkdir()
    target.write_text("mine")
    (folder / "001_idle.txt").symlink_to(target)
    monkeypatch.setenv("MIXCOMP_DUMP_DIR", str(folder))
    with pytest.raises(ConfigError, match="001_idle"):
        run(program, [Idle()], Context())
    assert target.read_text() == "mine"


def test_an_unusable_folder_is_a_storage_error(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXCOMP_DUMP_DIR", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="MIXCOMP_DUMP_DIR"):
        run(program, [Idle()], Context())


def test_two_runs_share_no_state(program: Program) -> None:
    one = run(program, [Salience(1.0)], Context())
    two = run(program, [Salience(3.0)], Context())
    assert digest(run(program, [Salience(1.0)], Context())) == digest(one) != digest(two)
