"""Damaged folders are refused with the damage named."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from artifacts import BUILDERS, new, refused
from mixcomp import artifact
from mixcomp.artifact import check_folder, load, save
from mixcomp.manifest import MANIFEST, Manifest

pytest_plugins = ["artifacts"]


def test_every_flipped_bit_is_found(folder: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    tried = 0
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        size = len(good)
        places = {0, 7, 8, size - 1, *torch.randint(size, (45,), generator=generator).tolist()}
        for number, place in enumerate(sorted(places)):
            bad = bytearray(good)
            bad[place] ^= 1 << int(torch.randint(8, (), generator=generator))
            path.write_bytes(bad)
            refused(folder, re.escape(path.name), (load,) if number % 8 == 0 else (check_folder,))
            tried += 1
        path.write_bytes(good)
    assert tried >= 300
    check_folder(folder)


def test_every_truncation_and_every_extra_byte_is_found(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for cut in sorted({0, 1, 7, 8, 9, len(good) // 3, len(good) // 2, len(good) - 8, len(good) - 1}):
            path.write_bytes(good[:cut])
            refused(folder, re.escape(path.name), (check_folder,))
        for extra in (b"\0", b" ", b"\n", good):
            path.write_bytes(good + extra)
            refused(folder, re.escape(path.name), (check_folder,))
        refused(folder, re.escape(path.name))
        path.write_bytes(good)


def test_a_missing_file_is_named(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        path.unlink()
        refused(folder, re.escape(path.name))
        path.write_bytes(good)


def test_a_damaged_tensor_is_named_with_its_bytes(folder: Path) -> None:
    shard = folder / "mixcomp-00002.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    listed = check_after_size(folder, shard.name)
    refused(folder, rf"mixcomp-00002\.safetensors.*{re.escape(listed)}.*bytes \d+ to {len(raw)} do not match", (load,))


def check_after_size(folder: Path, shard: str) -> str:
    """Name of the last tensor in a shard."""
    tensors = Manifest.from_bytes((folder / MANIFEST).read_bytes()).files[shard].tensors
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))[-1]


def test_swapped_shards_are_found(folder: Path) -> None:
    one, two = (folder / f"mixcomp-0000{i}.safetensors" for i in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    refused(folder, "mixcomp-0000")


def test_a_shard_from_another_save_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "SHARD_BYTES", 20_000)
    model = BUILDERS["llama-tied"]()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save(model, tmp_path / "other")
    last = sorted(folder.glob("*.safetensors"))[-1].name  # equal in size and header
    (folder / last).write_bytes((tmp_path / "other" / last).read_bytes())
    refused(folder, re.escape(last))
    refused(folder, r"model\.norm\.weight", (load,))


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    new("llama").save_pretrained(tmp_path / "plain")
    refused(tmp_path / "plain", r"has no mixcomp\.json.*mixcomp\.compile")
    refused(tmp_path / "absent", "is not a folder")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["mixcomp.json", "config.json", "mixcomp-00001.safetensors"])
def test_anything_but_regular_files_is_refused(folder: Path, tmp_path: Path, kind: str, name: str) -> None:
    path = folder / name
    path.rename(tmp_path / "aside")
    if kind == "link":
        path.symlink_to(tmp_path / "aside")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    refused(folder, re.escape(name))
