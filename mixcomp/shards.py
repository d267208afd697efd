"""Tensors in safetensors files whose every byte is known in advance.

The layout is a pure function of names, dtypes and shapes: tensors by falling element size, then by name, without
holes, under a header in one fixed spelling.  So a reader does not parse a header it does not trust; it compares it
with the one the manifest implies, and a digest for each tensor covers the rest of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from mixcomp.errors import ArtifactError
from mixcomp.files import check_size, fill, open_regular, sha256, write_file

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

#: element types as safetensors spells them
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SPELLING = {dtype: name for name, dtype in DTYPES.items()}

_PIECE = 1 << 24
#: that hash or copy at once; both let other threads run
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a file holds under a name; ``sha256`` is of its little-endian, row-major bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str = ""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)

    def like(self) -> torch.Tensor:
        """A tensor of this dtype and shape on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the folder; ``tensors`` is empty for anything but safetensors files."""

    size: int
    sha256: str
    tensors: Mapping[str, StoredTensor]

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"size": self.size, "sha256": self.sha256}
        if self.tensors:
            out["tensors"] = {
                name: {"dtype": SPELLING[t.dtype], "shape": list(t.shape), "sha256": t.sha256}
                for name, t in self.tensors.items()
            }
        return out


def header(tensors: Mapping[str, StoredTensor]) -> bytes:
    """The first bytes of a file: length, then JSON padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in stored_order(tensors):
        tensor = tensors[name]
        end = offset + tensor.nbytes
        spelling = SPELLING[tensor.dtype]
        entries[name] = {"dtype": spelling, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes of the whole file."""
    return len(header(tensors)) + sum(t.nbytes for t in tensors.values())


def stored_order(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Names as they follow each other; big elements first, so that each tensor is aligned to its element."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def content(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, copied only if it is strided or on another device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read(
    file: BinaryIO, name: str, tensors: Mapping[str, StoredTensor], size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the verified tensors of an open file in stored order, each in memory of its own.

    Several threads read ahead, since hashing is slower than a disk.
    Nothing is allocated before the size and the header agree with ``tensors``; at the end every byte of the file
    has been compared or hashed.  Raises ``ArtifactError`` naming the file and the tensor.
    """
    check_size(file, name, size)
    wanted = header(tensors)
    if file_size(tensors) != size:
        raise ArtifactError(f"{name}: its tensors do not add up to its {size} bytes; save the model again")
    found = bytearray(len(wanted))
    fill(file, name, memoryview(found), 0)
    if found != wanted:
        at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        raise ArtifactError(f"{name}: the header differs from the manifest at byte {at}; copy or save the folder again")
    offset = len(wanted)
    ahead: deque[tuple[str, Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for key in stored_order(tensors):
            ahead.append((key, pool.submit(_read_tensor, file, name, key, tensors[key], offset)))
            offset += tensors[key].nbytes
            if len(ahead) > 2 * THREADS:
                first, tensor = ahead.popleft()
                yield first, tensor.result()
        for key, tensor in ahead:
            yield key, tensor.result()


def _read_tensor(file: BinaryIO, name: str, key: str, wanted: StoredTensor, offset: int) -> torch.Tensor:
    raw = torch.empty(wanted.nbytes, dtype=torch.uint8)
    view = raw.numpy().data
    digest = hashlib.sha256()
    for start in range(0, len(view), _PIECE):
        piece = view[start : start + _PIECE]
        fill(file, name, piece, offset + start)
        digest.update(piece)
    if digest.hexdigest() != wanted.sha256:
        raise ArtifactError(
            f"{name}: tensor {key!r:.200} is damaged (bytes {offset} to {offset + len(view)} do not match its sha256); "
            "copy or save the folder again"
        )
    return raw.view(wanted.dtype).reshape(wanted.shape)


def split(sizes: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names in the given order, cut into files of at most ``limit`` bytes of tensors (a larger tensor alone)."""
    parts: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= size
    return parts


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> StoredFile:
    """Write a new safetensors file to the disk itself; what a manifest has to say of it."""
    listed = {name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def chunks() -> Iterator[bytes | memoryview]:
        yield header(listed)
        for name in stored_order(listed):
            raw = content(tensors[name])
            listed[name] = replace(listed[name], sha256=sha256(raw))
            yield raw

    size, digest = write_file(path, chunks())
    return StoredFile(size, digest, listed)


def read_files(
    folder: Path, files: Mapping[str, StoredFile], some: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The verified tensors of all listed files, or of those that hold any of ``some``."""
    for name, listed in files.items():
        if listed.tensors and (some is None or not listed.tensors.keys().isdisjoint(some)):
            with open_regular(folder, name) as file:
                yield from read(file, name, listed.tensors, listed.size)
