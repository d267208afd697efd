"""Measurements on disk: equal bytes, moments opened late, and nothing damaged, forged or foreign believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from measured import DOWN, PROJ, UP, measurement, priced
from mixcomp import measurement as home
from mixcomp import records
from mixcomp.errors import ArtifactError, InputError, MixCompError
from mixcomp.fingerprint import Identity
from mixcomp.measurement import MANIFEST, Measurement
from mixcomp.planning import plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measurement") / "folder"
    measurement().save(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "copy"
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_loaded_is_what_was_saved(folder: Path) -> None:
    found, wanted = Measurement.load(folder), measurement()
    assert (found.sites, found.couplings, found.identity) == (wanted.sites, wanted.couplings, wanted.identity)
    assert (found.options, found.calibration) == (wanted.options, wanted.calibration)
    for got, held in ((found.tensors, wanted.tensors), (dict(found.moments.read()), dict(wanted.moments.read()))):
        assert got.keys() == held.keys()
        assert all(torch.equal(got[key], held[key]) for key in held)
    assert not all(site.open for site in found.sites), "the head is out of scope"
    assert DOWN in found.couplings.absorptions[0].consumers


def test_equal_measurements_are_equal_bytes_and_replace_each_other(
    folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Measurement.load(folder).save(copy)
    assert contents(copy) == contents(folder)
    monkeypatch.setattr(home, "SHARD_BYTES", 1 << 12)
    measurement().save(copy)
    assert len(contents(copy)) > len(contents(folder))
    again = Measurement.load(copy)
    assert dict(again.moments.read()).keys() == dict(measurement().moments.read()).keys()
    assert again.fingerprint == measurement().fingerprint


def test_planning_reads_no_moments(copy: Path) -> None:
    for path in copy.glob("moments-*"):
        path.unlink()
    loaded = Measurement.load(copy)
    assert plan(loaded, 4.4).to_bytes() == plan(measurement(), 4.4).to_bytes()
    with pytest.raises(ArtifactError, match=r"moments-00001\.safetensors: the file is missing"):
        loaded.statistics(priced())


def test_statistics_come_under_the_names_of_the_program(folder: Path) -> None:
    program = priced()
    renamed = program.with_sites({s.name: replace(s, input=f"new_{s.input}") for s in program.sites})
    found = Measurement.load(folder).statistics(renamed)
    for site in program.open_sites():
        assert torch.equal(found[f"new_{site.input}/sigma"], program.tensor(site.input, "sigma"))
        assert torch.equal(found[f"{site.name}/gamma"], program.tensor(site.name, "gamma"))
    sites = tuple(replace(s, reason="left out") if s.name == PROJ else s for s in measurement().sites)
    with pytest.raises(InputError, match=r"layers\.1\.proj"):
        replace(measurement(), sites=sites).statistics(program)


@pytest.mark.parametrize("name", [MANIFEST, "prices-00001.safetensors", "moments-00001.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_is_found_and_named(copy: Path, name: str, damage: str) -> None:
    raw = bytearray((copy / name).read_bytes())
    raw[-9] ^= 1
    (copy / name).write_bytes(raw if damage == "flip" else raw[:-8])
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        list(Measurement.load(copy).moments.read())


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / MANIFEST).read_bytes())
    change(data)
    data.pop("digest")
    (folder / MANIFEST).write_bytes(records.signed(data))


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another version": (lambda d: d.update(measurement_version=1), "measurement_version"),
    "an unknown field": (lambda d: d.update(more=1), "unknown fields"),
    "no rows": (lambda d: d["sites"][0].update(rows=0), "rows"),
    "rows that the tensors lack": (lambda d: d["sites"][0].update(rows=95), "fingerprint"),
    "an integer weight": (lambda d: d["sites"][0].update(dtype="I8"), "floating-point"),
    "a site twice": (lambda d: d["sites"].append(d["sites"][0]), "different names"),
    "another model": (lambda d: d.update(fingerprint="0" * 64), "fingerprint"),
    "a short digest": (lambda d: d["sites"][0].update(sha256="ab"), "sha256"),
    "a producer that is no site": (lambda d: d["absorptions"][0].update(producers=["no"]), "producers"),
    "a block that divides nothing": (lambda d: d["absorptions"][0].update(block=7), "block"),
    "a reason for nobody": (lambda d: d["scattered"].update(no="reason"), "scattered"),
    "an option that is none": (lambda d: d["options"].update(seed=-1), "seed"),
    "no prices": (lambda d: d["files"].pop("prices-00001.safetensors"), "prices"),
    "a file outside": (lambda d: d["files"].update({"../x": d["files"].popitem()[1]}), "plain name"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_manifests_are_refused(copy: Path, case: str) -> None:
    change, words = FORGERIES[case]
    forge(copy, change)  # type: ignore[arg-type]
    with pytest.raises(MixCompError, match=words):
        Measurement.load(copy)


def test_prices_that_are_no_losses_are_refused(tmp_path: Path) -> None:
    wanted = measurement()
    key = f"{UP}/salience"
    replace(wanted, tensors={**wanted.tensors, key: -wanted.tensors[key]}).save(tmp_path / "bad")
    with pytest.raises(ArtifactError, match="negative or not finite"):
        Measurement.load(tmp_path / "bad")


def test_folders_of_other_things_are_neither_read_nor_replaced(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no measurement"):
        Measurement.load(tmp_path)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match=r"mine\.txt"):
        measurement().save(tmp_path)
    assert contents(tmp_path) == {"mine.txt": b"keep"}


def test_a_failed_save_leaves_the_old_measurement(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(copy)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(home, "write_shard", fail)
    with pytest.raises(MixCompError, match="No space left"):
        measurement().save(copy)
    assert contents(copy) == before


def test_no_machine_is_named(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    assert str(folder) not in text
    assert "/" not in json.dumps(json.loads(text)["options"])


def test_identity_is_of_the_weights() -> None:
    assert Identity.of(priced()) == measurement().identity
