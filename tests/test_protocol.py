"""What a pass may use while it runs: progress that always ends, random streams of their own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mixcomp import manager
from mixcomp.passes import PIPELINE
from mixcomp.protocol import Context
from programs import ABSORBING, build, tokens


@pytest.mark.parametrize("items", [[], ["a"], ["a", "b", "c"]])
def test_tracked_items_report_before_each_and_at_the_end(items: list[str]) -> None:
    said: list[tuple[str, int, int]] = []
    context = Context(progress=lambda *step: said.append(step))
    seen = []
    for item in context.track("work", items):
        assert said[-1] == ("work", len(seen), len(items))
        seen.append(item)
    assert seen == items
    assert said == [("work", done, len(items)) for done in range(len(items) + 1)]


def test_every_stage_of_the_pipeline_ends_before_the_next_begins() -> None:
    said: list[tuple[str, int, int]] = []
    batches = tuple(tokens(ABSORBING, length=6) for _ in range(2))
    context = Context(batches=batches, progress=lambda *step: said.append(step))
    manager.run(build(ABSORBING), [one() for one in PIPELINE], context)
    stages = {"sensitivities", "second moments", "scale channels", "salience", "quantize", "side branches"}
    assert {what for what, _, _ in said} == stages
    for (what, done, total), (following, _, _) in pairwise([*said, ("end", 0, 0)]):
        assert what == following or done == total, f"{what} stopped at {done} of {total}"


def test_random_streams_depend_on_seed_pass_and_site_alone() -> None:
    def draw(seed: int, *names: str) -> torch.Tensor:
        return torch.rand(4, generator=Context(seed=seed).generator(*names))

    assert torch.equal(draw(1, "pass", "site"), draw(1, "pass", "site"))
    others = [draw(2, "pass", "site"), draw(1, "other", "site"), draw(1, "pass", "another")]
    assert not any(torch.equal(draw(1, "pass", "site"), other) for other in others)
