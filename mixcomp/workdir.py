"""A folder for what long work has finished, so that a run that is cut off can go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load, save

from mixcomp.errors import ArtifactError, StorageError
from mixcomp.files import read_whole, sha256, write_atomic

_SUFFIX = ".part"
_LIMIT = 1 << 40


@dataclass(slots=True)
class Workdir:
    """``protocol.Memory`` in files of ``folder``: a digest, then safetensors; each appears whole or not at all."""

    folder: Path
    _own: set[Path] = field(default_factory=set)

    @classmethod
    def open(cls, folder: str | Path) -> Workdir:
        """Make the folder where there is none; ``StorageError`` where that is refused."""
        made = cls(Path(folder))
        try:
            made.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"workdir {str(folder)!r} cannot be made: {error}; give a folder to write in") from error
        return made

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """What was saved under ``name``, or None; ``ArtifactError`` where the file is damaged."""
        path = self._path(name)
        if not path.exists():
            return None
        self._own.add(path)
        digest, _, data = read_whole(path.parent, path.name, _LIMIT).partition(b"\n")
        if digest.decode("ascii", "replace") != sha256(data):
            raise ArtifactError(f"{path.name}: damaged, its digest does not match; delete it and start again")
        return load(data)

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep ``tensors`` under ``name``; ``StorageError`` where the file system refuses."""
        data = save({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
        self._own.add(self._path(name))
        write_atomic(self._path(name), sha256(data).encode() + b"\n" + data)

    def clear(self) -> None:
        """Delete what this work saved or read; other files stay."""
        for path in self._own:
            path.unlink(missing_ok=True)
        self._own.clear()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"
