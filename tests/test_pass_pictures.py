"""G14: the before and after pictures in the docstrings of passes are true.

Lines that look like the printed form are looked up in real programs: ``%3 = linear(...)`` by its op,
``layers.0.q_proj/gamma  fp32[576]`` by key, dtype and number of axes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from laws import PASSES, pool, stage
from mixcomp.printer import Digests, render
from mixcomp.program import Program
from mixcomp.protocol import Pass

DTYPES = {"fp32": "f32", "fp16": "f16", "fp64": "f64", "uint8": "u8", "int64": "i64", "int8": "i8", "bool": "bool"}
TABLE_LINE = re.compile(
    r"^\s+(?P<owner>[\w.]+)/(?P<keys>\w+|\{[\w, ]+\})(?:\s+(?P<dtype>\w+)(?P<shape>\[[^\]]*\])?)?.*"
)
NODE_LINE = re.compile(r"^\s+%\d+ = (?P<op>\w+)\(.*")


def pictures(kind: type[Pass]) -> Iterator[re.Match[str]]:
    """Lines of the docstring that look like the printed form."""
    for line in (kind.__doc__ or "").splitlines():
        found = TABLE_LINE.match(line) or NODE_LINE.match(line)
        if found is not None:
            yield found


def printed(program: Program) -> set[str]:
    """``linear``, ``q/gamma : f32[1]`` ... : calls by op, tensors with their owners and sizes left out."""
    lines = render(program, Digests.NONE).splitlines()
    calls = {m[1] for line in lines if (m := re.match(r"%\d+ = ([\w.]+)\(", line))}
    tensors = {m[1] for line in lines if (m := re.match(r"  .*/(\w+ : .*)", line))}
    return calls | {re.sub(r"\d+(?=[],])", "n", t) for t in tensors} | {t.partition(" : ")[0] for t in tensors}


@pytest.mark.parametrize("number", range(len(PASSES)), ids=[p.name for p in PASSES])
def test_g14_docstrings_show_what_passes_do(number: int) -> None:
    kind = PASSES[number]
    doc = kind.__doc__ or ""
    assert re.search("before", doc, re.I), "a pass shows the program before"
    assert re.search("after", doc, re.I), "and after"
    stages = [stage(blueprint, number) for blueprint in pool()]
    shown = set().union(*(printed(p) for s in stages for p in (s.before, s.after)))
    for line in pictures(kind):
        parts = line.groupdict()
        for key in re.findall(r"\w+", parts.get("op") or parts["keys"]):
            dtype = DTYPES.get(parts.get("dtype") or "")
            rank = len((parts.get("shape") or "[]").strip("[]").split(",")) if parts.get("shape") else 0
            wanted = f"{key} : {dtype}[{','.join('n' * rank)}]" if dtype else key
            assert wanted in shown, f"{kind.name} shows {line[0].strip()!r}; there is no {wanted!r}"
