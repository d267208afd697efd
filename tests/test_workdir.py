"""A run that is cut off goes on after its last finished layer, to the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import families
import mixcomp
from mixcomp import api
from mixcomp.errors import ArtifactError, MixCompError, StorageError
from mixcomp.passes import layerwise
from mixcomp.passes.tune_blocks import TuneBlocks
from mixcomp.workdir import Workdir

TEXT = torch.randint(0, 128, (16, 32), generator=torch.Generator().manual_seed(0))


class CutOffError(Exception):
    """What stands for a lost machine."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(api.TUNING, "balanced", (TuneBlocks(steps=4),))


def learning(monkeypatch: pytest.MonkeyPatch, last: int = 99) -> list[int]:
    """Counts the layers that are learned; the ``last`` one is never finished."""
    counted: list[int] = []
    original = layerwise.descend

    def descend(*args: object) -> None:
        counted.append(len(counted))
        if len(counted) > last:
            raise CutOffError
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(layerwise, "descend", descend)
    return counted


def compiled(seed: int = 0, **options: object) -> dict[str, torch.Tensor]:
    model = families.build("llama", num_hidden_layers=3)
    made = mixcomp.compile(model, 3.5, calibration=TEXT, effort="balanced", strategy="uniform", seed=seed, **options)  # type: ignore[arg-type]
    return dict(made.state_dict())


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled()
    other = tmp_path / "not ours"
    other.write_text("stays")
    with monkeypatch.context() as patch:
        learning(patch, last=2)
        with pytest.raises(MixCompError, match="CutOffError"):
            compiled(workdir=tmp_path)
    assert len(list(tmp_path.glob("tune-blocks-*.part"))) == 2
    with monkeypatch.context() as patch:
        counted = learning(patch)
        assert same(compiled(workdir=tmp_path), whole)
    assert len(counted) == 1
    assert list(tmp_path.iterdir()) == [other], "finished: nothing of it is left, everything else is"


def test_another_run_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        learning(patch, last=2)
        with pytest.raises(MixCompError):
            compiled(workdir=tmp_path)
    counted = learning(monkeypatch)
    compiled(seed=1, workdir=tmp_path)
    assert len(counted) == 3
    assert len(list(tmp_path.glob("*.part"))) == 2, "those of the first run wait for it"


def test_damage_is_told(tmp_path: Path) -> None:
    kept = Workdir.open(tmp_path / "new")
    assert kept.load("a-1") is None
    kept.save("a-1", {"x": torch.arange(5)})
    found = Workdir.open(tmp_path / "new").load("a-1")
    assert found is not None
    assert torch.equal(found["x"], torch.arange(5))
    (path,) = (tmp_path / "new").iterdir()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"a-1.*damaged.*delete"):
        kept.load("a-1")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="workdir"):
        Workdir.open(tmp_path / "file" / "inside")
