"""JSON files that say what a folder consists of: written in one spelling, read without trusting them."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mixcomp.errors import ArtifactError
from mixcomp.files import sha256
from mixcomp.shards import DTYPES, StoredFile, StoredTensor, file_size

DIGEST = "digest"  #: the field that holds the digest of all others

_SHARD = ".safetensors"
_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_ITEMS = 1 << 22
_MAX_DEPTH = 32
_MAX_TENSOR_NAME = 1024
_MAX_RANK = 8
_MAX_ELEMENTS = 1 << 48

Kinds = type | tuple[type, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Reads one kind of JSON file that is not trusted, and names it and what to do in every error.

    The spelling is canonical and carries its own digest (so that damage shows), and every field is checked for its type
    (so that a forged one is refused too).
    """

    file: str
    again: str

    def read(self, raw: bytes) -> dict[str, Any]:
        """The object in ``raw``, its digest not looked at yet."""
        data = read_json(raw, self.file)
        if not isinstance(data, dict):
            raise self.wrong("the whole", data, "an object")
        return data

    def check_digest(self, raw: bytes, data: Mapping[str, Any]) -> None:
        """``ArtifactError`` unless ``raw`` is what ``signed`` wrote for ``data``."""
        unsigned = {k: v for k, v in data.items() if k != DIGEST}
        if spell(data) != raw or data.get(DIGEST) != sha256(spell(unsigned)):
            raise ArtifactError(f"{self.file}: damaged, its digest does not match; copy or save the folder again")

    def wrong(self, field: str, got: object, wanted: str) -> ArtifactError:
        """The error that says what a field holds and what it must be."""
        return ArtifactError(f"{self.file}: field {field!r} is {brief(got)}, it must be {wanted}; {self.again}")

    def fields(self, where: str, data: object, layout: Mapping[str, Kinds]) -> dict[str, Any]:
        """``data`` as an object with exactly these fields of exactly these types."""
        if not isinstance(data, dict):
            raise self.wrong(where, data, f"an object with the fields {sorted(layout)}")
        missing, unknown = sorted(layout.keys() - data.keys()), sorted(data.keys() - layout.keys())
        if missing or unknown:
            raise ArtifactError(
                f"{self.file}: {where} has unknown fields {unknown[:5]} and lacks {missing[:5]}; "
                f"read it with the release that wrote it, or {self.again}"
            )
        for name, kinds in layout.items():
            if type(data[name]) not in (kinds if isinstance(kinds, tuple) else (kinds,)):
                raise self.wrong(f"{where}: {name}", data[name], f"of type {kinds}")
        return data

    def text(self, field: str, value: object, limit: int) -> str:
        """A text of 1 to ``limit`` characters."""
        if not isinstance(value, str) or not 0 < len(value) <= limit:
            raise self.wrong(field, value, f"a text of 1 to {limit} characters")
        return value

    def name(self, field: str, value: object) -> str:
        """A tensor's or a module's name."""
        return self.text(field, value, _MAX_TENSOR_NAME)

    def digest(self, field: str, value: object) -> str:
        """A sha256."""
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise self.wrong(field, value, "a sha256 of 64 hexadecimal digits")
        return value

    def number(self, field: str, value: object, low: int, high: int) -> int:
        """A whole number in low..high."""
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(field, value, f"a whole number in {low}..{high}")
        return value

    def stored_file(self, name: str, data: object) -> StoredFile:
        """What a manifest says of one file of its folder."""
        is_shard = name.endswith(_SHARD)
        layout: Mapping[str, Kinds] = {"size": int, "sha256": str} | ({"tensors": dict} if is_shard else {})
        fields = self.fields(f"files.{name}", data, layout)
        digest = self.digest(f"files.{name}.sha256", fields["sha256"])
        tensors = {key: self.tensor(key, tensor) for key, tensor in fields.get("tensors", {}).items()}
        if is_shard and (not tensors or file_size(tensors) != fields["size"]):
            raise self.wrong(f"files.{name}.size", fields["size"], "the header and the tensors added up")
        if fields["size"] < 0:
            raise self.wrong(f"files.{name}.size", fields["size"], "at least 0")
        return StoredFile(fields["size"], digest, tensors)

    def tensor(self, name: str, data: object) -> StoredTensor:
        """What a manifest says of one tensor."""
        where = f"tensor {self.name('tensors', name):.200}"
        fields = self.fields(where, data, {"dtype": str, "shape": list, "sha256": str})
        shape = fields["shape"]
        if fields["dtype"] not in DTYPES:
            raise self.wrong(f"{where}: dtype", fields["dtype"], f"one of {sorted(DTYPES)}")
        if len(shape) > _MAX_RANK or any(type(n) is not int or n < 0 for n in shape):
            raise self.wrong(f"{where}: shape", shape, f"at most {_MAX_RANK} integers, none negative")
        if prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
            raise self.wrong(f"{where}: shape", shape, f"of at most {_MAX_ELEMENTS} elements")
        return StoredTensor(DTYPES[fields["dtype"]], tuple(shape), self.digest(f"{where}: sha256", fields["sha256"]))


def signed(data: Mapping[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, no white space, its own digest inside."""
    return spell({**data, DIGEST: sha256(spell(data))})


def spell(data: Mapping[str, Any]) -> bytes:
    """The one spelling of a JSON object."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def read_json(raw: bytes, name: str) -> Any:
    """Parse JSON that may be hostile; duplicate keys, NaN, too many entries or levels are an ``ArtifactError``."""
    if raw.count(b":") + raw.count(b",") > _MAX_ITEMS:  # an upper bound of keys and elements, before any is built
        raise ArtifactError(f"{name}: more than {_MAX_ITEMS} entries; save the model again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise ArtifactError(f"{name}: key {key!r:.200} occurs twice; save the model again")
            out[key] = value
        return out

    def refuse(constant: str) -> Any:
        raise ArtifactError(f"{name}: {constant} is not a JSON number; save the model again")

    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name}: is not JSON ({error!s:.200}); copy or save the folder again") from error
    _check_depth(data, name)
    return data


def _check_depth(data: Any, name: str) -> None:
    level = [data]
    for _ in range(_MAX_DEPTH):
        level = [v for x in level if isinstance(x, dict | list) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return
    raise ArtifactError(f"{name}: nested more than {_MAX_DEPTH} deep; save the model again")


def brief(value: object) -> str:
    """``repr`` cut short while it is made: a hostile value may be millions of numbers."""
    short = reprlib.Repr()
    short.maxstring = 200
    return short.repr(value)
