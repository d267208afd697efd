"""``mixcomp.json``: what a saved folder consists of, down to the digest of each tensor.

It is written last and read first, and it is not trusted: its spelling is canonical and carries its own digest (so
that damage shows), and every field is checked for what it means (so that a forged one is refused too).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from mixcomp.config import ACTIVATIONS
from mixcomp.errors import ArtifactError, FormatError
from mixcomp.files import check_name
from mixcomp.format import VERSION, SiteFormat
from mixcomp.packed import PackedWeight
from mixcomp.records import Kinds, Record, brief, signed
from mixcomp.shards import DTYPES, SPELLING, StoredFile, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MANIFEST = "mixcomp.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"
PLAN = "plan.json"
INDEX = "mixcomp.safetensors.index.json"  #: for transformers, which looks for tensors there
METHOD = "mixcomp"  #: ``quant_method`` in config.json
MAX_MANIFEST = 1 << 26  #: bytes

_RECORD = Record(MANIFEST, "save the model again")
_ATTENTION = (None, "eager", "sdpa")


@dataclass(frozen=True, slots=True)
class StoredSite:
    """A compiled linear: its format, the dtype of the weight it replaces, that of its bias if it has one, and what it
    multiplies with (``config.ACTIVATIONS``)."""

    fmt: SiteFormat
    dtype: torch.dtype
    bias: torch.dtype | None
    activations: str = "native"

    def to_json(self) -> dict[str, Any]:
        bias = None if self.bias is None else SPELLING[self.bias]
        return {
            "format": self.fmt.to_json(),
            "dtype": SPELLING[self.dtype],
            "bias": bias,
            "activations": self.activations,
        }


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked manifest.

    ``versions`` names the libraries that wrote the folder, ``architecture`` the model class, ``attention`` the
    attention code it ran on where every machine has it.  ``sites`` maps module paths to compiled linears; ``ties``
    maps a tensor name to the stored name whose tensor it shares; ``buffers`` lists stored tensors that a model's
    state dict leaves out.
    """

    versions: Mapping[str, str]
    architecture: str
    attention: str | None
    sites: Mapping[str, StoredSite]
    ties: Mapping[str, str]
    buffers: tuple[str, ...]
    files: Mapping[str, StoredFile]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {name: tensor for file in self.files.values() for name, tensor in file.tensors.items()}

    @property
    def weights(self) -> int:
        """Weights of all compiled linears."""
        return sum(site.fmt.weights for site in self.sites.values())

    @property
    def payload_bits(self) -> int:
        return sum(site.fmt.payload_bits() for site in self.sites.values())

    @property
    def stored_bits(self) -> int:
        return sum(site.fmt.stored_bits() for site in self.sites.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of all files but the manifest itself."""
        return sum(file.size for file in self.files.values())

    def site_tensors(self, name: str) -> dict[str, str]:
        """Buffer name -> stored name, for every tensor of a site (``bias`` included), ties followed."""
        site = self.sites[name]
        wanted = [*site.fmt.tensors(), *(["bias"] if site.bias is not None else [])]
        return {key: self.ties.get(f"{name}.{key}", f"{name}.{key}") for key in wanted}

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no white space, its own digest inside."""
        data = {
            "format_version": VERSION,
            "versions": dict(self.versions),
            "architecture": self.architecture,
            "attention": self.attention,
            "sites": {name: site.to_json() for name, site in self.sites.items()},
            "ties": dict(self.ties),
            "buffers": list(self.buffers),
            "files": {name: file.to_json() for name, file in self.files.items()},
            "bits": {"payload": self.payload_bits, "stored": self.stored_bits},
        }
        return signed(data)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Read and check a manifest; ``ArtifactError`` or ``FormatError`` names the field that is wrong."""
        data = _RECORD.read(raw)
        _check_version(data)
        _RECORD.check_digest(raw, data)
        _RECORD.fields("the whole", data, _LAYOUT)
        for name, version in data["versions"].items():
            _RECORD.text(f"versions.{name:.80}", version, 64)
        if data["attention"] not in _ATTENTION:
            raise _RECORD.wrong("attention", data["attention"], f"one of {_ATTENTION}")
        if not data["architecture"].isidentifier():
            raise _RECORD.wrong("architecture", data["architecture"], "the name of a model class")
        manifest = cls(
            data["versions"],
            data["architecture"],
            data["attention"],
            {_RECORD.name("sites", name): _site(name, site) for name, site in data["sites"].items()},
            {_RECORD.name("ties", alias): _RECORD.name("ties", name) for alias, name in data["ties"].items()},
            tuple(_RECORD.name("buffers", name) for name in data["buffers"]),
            {check_name(name): _RECORD.stored_file(name, file) for name, file in data["files"].items()},
        )
        _check_whole(manifest)
        bits = {"payload": manifest.payload_bits, "stored": manifest.stored_bits}
        if data["bits"] != bits:
            raise _RECORD.wrong("bits", data["bits"], f"{bits}, as the formats add up")
        return manifest


_LAYOUT: Mapping[str, type | tuple[type, ...]] = {
    "format_version": int,
    "versions": dict,
    "architecture": str,
    "attention": (str, type(None)),
    "sites": dict,
    "ties": dict,
    "buffers": list,
    "files": dict,
    "bits": dict,
    "digest": str,
}


def _check_version(data: Mapping[str, Any]) -> None:
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise _RECORD.wrong("format_version", version, "a positive integer")
    if version != VERSION:
        versions = data.get("versions")
        writer = versions.get("mixcomp") if isinstance(versions, dict) else None
        raise ArtifactError(
            f"{MANIFEST}: format version {version}, this release reads version {VERSION}; "
            f"read it with mixcomp {brief(writer)} or later, which wrote it"
        )


def _site(name: str, data: object) -> StoredSite:
    if isinstance(data, dict):
        data = {"activations": "native", **data}  # folders of earlier versions do not say
    layout: Mapping[str, Kinds] = {"format": dict, "dtype": str, "bias": (str, type(None)), "activations": str}
    fields = _RECORD.fields(f"sites.{name:.200}", data, layout)
    if fields["activations"] not in ACTIVATIONS:
        raise _RECORD.wrong(f"sites.{name:.200}.activations", fields["activations"], f"one of {ACTIVATIONS}")
    try:
        fmt = SiteFormat.from_json(fields["format"])
    except FormatError as error:
        raise FormatError(f"{MANIFEST}: site {name!r:.200}: {error}; save the model again") from error
    bias = None if fields["bias"] is None else _float(f"sites.{name:.200}.bias", fields["bias"])
    return StoredSite(fmt, _float(f"sites.{name:.200}.dtype", fields["dtype"]), bias, fields["activations"])


def _float(field: str, spelling: str) -> torch.dtype:
    if spelling not in DTYPES or not DTYPES[spelling].is_floating_point:
        raise _RECORD.wrong(field, spelling, "a floating-point dtype")
    return DTYPES[spelling]


def _check_whole(manifest: Manifest) -> None:
    """What fields say about each other: names are unique, ties lead somewhere, sites have their tensors."""
    tensors = manifest.tensors
    if CONFIG not in manifest.files or MANIFEST in manifest.files:
        raise _RECORD.wrong("files", sorted(manifest.files)[:9], f"a list with {CONFIG} and without {MANIFEST}")
    if len({name.casefold() for name in manifest.files}) != len(manifest.files):
        raise _RECORD.wrong("files", sorted(manifest.files)[:9], "names that differ in more than case")
    if len(tensors) != sum(len(file.tensors) for file in manifest.files.values()):
        raise _RECORD.wrong("files", _repeated(manifest.files.values()), "tensor names that occur in one file only")
    for alias, name in manifest.ties.items():
        if alias in tensors or name not in tensors:
            raise _RECORD.wrong(f"ties.{alias:.200}", name, "a stored tensor, under a name that is not stored itself")
    for name in manifest.buffers:
        if name not in tensors:
            raise _RECORD.wrong("buffers", name, "names of stored tensors")
    for name in manifest.sites:
        _check_site(manifest, name, tensors)
    _check_owners(manifest, tensors)


def _repeated(files: Iterable[StoredFile]) -> list[str]:
    names = sorted(name for file in files for name in file.tensors)
    return [a for a, b in pairwise(names) if a == b][:5]


def _check_site(manifest: Manifest, name: str, tensors: Mapping[str, StoredTensor]) -> None:
    site = manifest.sites[name]
    sources = manifest.site_tensors(name)
    missing = [key for key, source in sources.items() if source not in tensors]
    if missing:
        raise ArtifactError(f"{MANIFEST}: site {name!r:.200} has no tensors {missing}; save the model again")
    try:
        PackedWeight.from_tensors(site.fmt, {k: tensors[s].like() for k, s in sources.items() if k != "bias"})
    except FormatError as error:
        raise FormatError(f"{MANIFEST}: site {name!r:.200}: {error}; save the model again") from error
    if site.bias is not None:
        bias = tensors[sources["bias"]]
        if (bias.dtype, bias.shape) != (site.bias, (site.fmt.rows,)):
            raise FormatError(
                f"{MANIFEST}: site {name!r:.200}: bias is {bias.dtype}{bias.shape}, "
                f"the site wants {site.bias}({site.fmt.rows},); save the model again"
            )


def _check_owners(manifest: Manifest, tensors: Mapping[str, StoredTensor]) -> None:
    """Nothing but a site's own tensors lies under its name: no original weight, no site inside a site."""
    for name in (*tensors, *manifest.ties):
        for end in (i for i, letter in enumerate(name) if letter == "."):
            site = name[:end]
            if site in manifest.sites and name[end + 1 :] not in manifest.site_tensors(site):
                raise ArtifactError(
                    f"{MANIFEST}: tensor {name!r:.200} is not part of compiled site {site!r:.200}; save the model again"
                )
