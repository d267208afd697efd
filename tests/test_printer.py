"""The text form: complete, stable, readable, and equal only for equal programs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import decisions
import strategies
from mixcomp.lowering.lower import LowerLinears
from mixcomp.manager import run
from mixcomp.printer import WHOLE_BYTES, Digests, body, digest, escape, render, tensor_digest, tensor_text, window
from mixcomp.program import META, Program
from mixcomp.protocol import Context
from mutants import Mutant
from programs import EVERYTHING, PLAIN, Values, build, own
from table_mutants import MUTANTS

Golden = Callable[[str, str], None]
DYADIC = replace(EVERYTHING, values=Values.DYADIC)


def test_canonical_program_is_printed_as_ever(golden: Golden) -> None:
    """The file was written by another process, with another hash seed."""
    golden("canonical", render(build(DYADIC), Digests.WHOLE))


def test_decided_program_is_printed_as_ever(golden: Golden) -> None:
    golden("decided", render(decisions.decided(), Digests.WHOLE))


def test_lowered_program_is_printed_as_ever(golden: Golden) -> None:
    golden("lowered", render(run(decisions.decided(), [LowerLinears()], Context()), Digests.WHOLE))


def test_mixed_program_is_printed_as_ever(golden: Golden) -> None:
    golden("mixed", render(run(decisions.mixed(), [LowerLinears()], Context()), Digests.WHOLE))


def test_plans_of_mixed_rows_are_printed_before_they_are_quantized() -> None:
    program = decisions.mixed()
    site = replace(program.site(decisions.PROJ), format=None)
    text = body(program.with_sites({decisions.PROJ: site}))
    assert "{1+8x4 4x4 2+8x4 float-group rows reordered}" in text


def test_symbols_are_numbered_by_appearance_not_by_torchs_names() -> None:
    first, second = build(PLAIN), build(PLAIN)
    assert body(first) == body(second)
    assert "i64[s0,s1]" in body(first)


def test_every_linear_has_one_line_and_no_address_shows() -> None:
    program = decisions.decided()
    text = render(program)
    assert "0x" not in text
    for site in program.sites:
        assert text.count(f", @{site.name}) : ") == len(site.calls)


def test_clone_prints_the_same() -> None:
    program = decisions.decided()
    assert (
        render(program.clone(), Digests.WHOLE) == render(program, Digests.WHOLE) == render(own(program), Digests.WHOLE)
    )


#: they change what the text deliberately leaves out
INVISIBLE = {"not_recompiled", "replaced_by_a_copy", "not_contiguous", "tie_broken"}


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.base == "decided"], ids=lambda m: m.name)
def test_what_a_mutant_changes_shows_in_the_digest(mutant: Mutant) -> None:
    program = decisions.decided()
    before = digest(program)
    broken = mutant.breaks(program.clone())
    if mutant.breaks.__name__ not in INVISIBLE:
        assert digest(broken) != before
        window(broken, next(iter(broken.graph_module.graph.nodes)))  # broken programs can be shown


def test_facts_are_printed_but_do_not_count_as_a_change() -> None:
    program = decisions.decided()
    other = replace(program, facts=frozenset())
    assert render(program) != render(other)
    assert digest(program) == digest(other)


def test_names_from_outside_cannot_forge_lines() -> None:
    program = build(PLAIN)
    site = program.sites[0]
    name = 'x\n%9 = evil() \u202e"'
    program.node(site.calls[0]).meta[META] = name
    text = body(replace(program, sites=(replace(site, name=name, reason="a\tb\n"), *program.sites[1:])))
    assert "\n%9" not in text
    assert text.isascii()
    assert "x\\n%9 = evil() \\u202e" in text


@given(st.text(st.sampled_from(["a", " ", "\n", "\t", "\0", '"', "'", "\\", "\u202e", "\u0430", "%", "\U0001f600"])))
def test_escaped_text_is_one_printable_ascii_line(text: str) -> None:
    shown = escape(text)
    assert shown.isascii()
    assert shown.isprintable()
    assert shown == text or not (text.isascii() and text.isprintable())


def test_window_marks_the_node() -> None:
    program = decisions.decided()
    node = program.node(program.site(decisions.PROJ).calls[0])
    lines = window(program, node).splitlines()
    assert len(lines) == 3
    assert [line.startswith("> ") for line in lines].count(True) == 1
    assert f"linear(%7, @{decisions.PROJ})" in next(line for line in lines if line.startswith("> "))


SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(SHAPES, st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool]), strategies.seeds)
def test_whole_digest_is_sha256_of_the_values_in_row_major_order(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wanted = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    assert tensor_digest(values, whole=True) == wanted
    assert tensor_digest(values.mT.contiguous().mT if values.dim() > 1 else values, whole=True) == wanted


def test_large_tensors_are_streamed_in_parts() -> None:
    values = torch.arange(6_000_000, dtype=torch.int32)
    assert tensor_digest(values, whole=True) == hashlib.sha256(values.numpy().tobytes()).hexdigest()


@given(st.integers(WHOLE_BYTES + 1, 4 * WHOLE_BYTES), st.booleans())
@example(WHOLE_BYTES + 1, True)
def test_samples_reach_both_ends_and_say_that_they_are_samples(size: int, at_the_end: bool) -> None:
    values = torch.zeros(size, dtype=torch.uint8)
    before = tensor_text(values, Digests.SAMPLED)
    assert f"u8[{size}]~" in before
    assert f"u8[{size}]#" in tensor_text(values, Digests.WHOLE)
    values[-1 if at_the_end else 0] = 1
    assert tensor_text(values, Digests.SAMPLED) != before


def test_numbers_have_six_digits() -> None:
    assert tensor_text(torch.tensor(1 / 3), Digests.WHOLE).endswith(" = 0.333333")
    assert tensor_text(torch.tensor(7), Digests.WHOLE).endswith(" = 7")
    assert tensor_text(torch.zeros(2, 3).bfloat16(), Digests.NONE) == "bf16[2,3]"


def test_left_alone_sites_say_so() -> None:
    program = build(PLAIN)
    program = program.with_sites({"layers.0.proj": replace(program.site("layers.0.proj"), reason="fp8 weight")})
    assert "left alone: fp8 weight" in body(program)
    assert "@layers.0.proj) : f32[s0,s1,16] {left alone}" in body(program)


def test_reading_a_program_changes_nothing() -> None:
    program: Program = decisions.decided()
    code = program.graph_module.code
    assert digest(program) == digest(program)
    assert program.graph_module.code == code
