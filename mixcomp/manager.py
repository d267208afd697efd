"""Runs passes one after another, each on a clone, and checks the laws between them.

``MIXCOMP_CHECK`` says how much is checked: 0 nothing, 1 (default) every invariant that is cheap, 2 everything,
digests of the input before and after included.  ``dumps`` documents the other two variables.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace

from mixcomp.dumps import Dumps
from mixcomp.errors import ConfigError, InvariantError, MixCompError, PassError, PassOrderError
from mixcomp.printer import Digests, digest
from mixcomp.program import Fact, Program, Step
from mixcomp.protocol import Context, Pass
from mixcomp.snapshot import Snapshot
from mixcomp.verify import check

LEVELS = ("0", "1", "2")


def run(program: Program, passes: Sequence[Pass], context: Context, level: int | None = None) -> Program:
    """Apply ``passes`` in order; ``program`` itself is never changed.

    Args:
        program: what to start from; it is checked too.
        passes: instances, in the order they run.
        context: calibration tokens, seed, device and progress callback, handed to every pass.
        level: how much to check, see above; None reads ``MIXCOMP_CHECK``.

    Returns:
        The program after the last pass, with its facts and one history step per pass.

    Raises:
        PassOrderError: a pass requires a fact that nothing has established.
        InvariantError: a pass returned a program that breaks a law; the message starts with the law's id.
        PassError: a pass failed with an error that is not MixComp's own, or did not return a program.
        MixCompError: what a pass itself raised, with a note that names the pass.
    """
    level = _level() if level is None else level
    dumps = Dumps.from_environment()
    _check_order(program, passes)
    check(program, level)
    dumps.start(program)
    before = digest(program, Digests.SAMPLED)
    for one in passes:
        start = time.perf_counter()
        try:
            result = _run_checked(one, program, context, level)
        except MixCompError as error:
            error.add_note(f"in pass {one.spec()}, after {_passed(program)}")
            raise
        seconds = time.perf_counter() - start
        after = digest(result, Digests.SAMPLED)
        step = Step(one.spec(), seconds, after != before)
        program, before = replace(result, history=(*program.history, step)), after
        dumps.after(program, one.name, step.changed)
    return program


def _run_checked(one: Pass, program: Program, context: Context, level: int) -> Program:
    """One pass on a clone, its facts, and the laws."""
    snapshot = Snapshot.of(program, level) if level else None
    graph = digest(program, Digests.NONE) if level >= 2 else None
    try:
        result = one.run(program.clone(), context)
    except MixCompError:
        raise
    except Exception as error:
        raise PassError(f"pass {one.name} failed with {type(error).__name__}: {error}") from error
    if not isinstance(result, Program):
        raise PassError(f"pass {one.name} returned {type(result).__name__}, a pass returns a Program")
    result = replace(result, facts=_facts_after(one, program.facts))
    try:
        check(result, level, snapshot)
    except InvariantError as error:
        raise InvariantError(f"{error}\nafter pass {one.spec()}") from error
    if level >= 2 and (Snapshot.of(program, level), digest(program, Digests.NONE)) != (snapshot, graph):
        raise InvariantError(f"I08: pass {one.name} wrote to the program it was given; it must make a new one")
    return result


def _facts_after(one: Pass, facts: frozenset[Fact]) -> frozenset[Fact]:
    return (facts - one.clobbers) | one.ensures


def _check_order(program: Program, passes: Sequence[Pass]) -> None:
    """Follow the facts through the pipeline before anything expensive runs."""
    facts = program.facts
    for i, one in enumerate(passes):
        for missing in sorted(one.requires - facts, key=lambda f: f.value):
            known = ", ".join(sorted(f.value for f in facts)) or "no facts"
            raise PassOrderError(
                f"pass {one.name} requires the fact {missing.value!r}, which {_provider(missing, passes)}; "
                f"before it run {', '.join(p.name for p in passes[:i]) or 'no passes'} and there are {known}"
            )
        facts = _facts_after(one, facts)


def _provider(fact: Fact, passes: Sequence[Pass]) -> str:
    names = " or ".join(p.name for p in passes if fact in p.ensures)
    return f"{names} provides: put it first" if names else "no pass of this pipeline provides: add one"


def _passed(program: Program) -> str:
    return "no pass" if not program.history else ", ".join(step.spec for step in program.history)


def _level() -> int:
    asked = os.environ.get("MIXCOMP_CHECK", "1")
    if asked not in LEVELS:
        raise ConfigError(f"MIXCOMP_CHECK={asked!r}: allowed are 0 (nothing), 1 (cheap laws) and 2 (everything)")
    return int(asked)
