"""A measurement: what planning and quantization need to know of a model, taken once and kept in a folder.

The folder holds ``measurement.json`` (sites, couplings, options, a digest of everything), ``prices-*.safetensors`` (what
planning reads: megabytes) and ``moments-*.safetensors`` (what quantization reads: gigabytes, opened only by ``apply``).
It appears whole or not at all, and equal measurements give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mixcomp.config import MeasureConfig
from mixcomp.errors import ArtifactError, ConfigError, InputError
from mixcomp.files import check_name, need_room, new_folder, read_whole, require_replaceable, write_file
from mixcomp.fingerprint import Identity
from mixcomp.format import WIDTHS
from mixcomp.passes.coupling import Absorption, Couplings
from mixcomp.passes.planner import Prices, curve
from mixcomp.passes.statistics import moments_device
from mixcomp.program import Program, Site, WeightRef
from mixcomp.records import Record, signed
from mixcomp.shards import DTYPES, SPELLING, THREADS, StoredFile, read_files, split, write_shard

MANIFEST = "measurement.json"
VERSION = 2
SHARD_BYTES = 4 << 30
_PRICES, _MOMENTS = "prices", "moments"
_MAX_MANIFEST = 1 << 26
_MOST = 1 << 31
_RECORD = Record(MANIFEST, "measure the model again")
_LAYOUT: Mapping[str, type] = {
    "measurement_version": int,
    "options": dict,
    "calibration": str,
    "fingerprint": str,
    "sites": list,
    "absorptions": list,
    "scattered": dict,
    "files": dict,
    "digest": str,
}


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """ "<input>/sigma" fp32[columns, columns] and "<site>/gamma" fp32[rows]: in memory, or in files read when needed."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    folder: Path = Path()
    files: Mapping[str, StoredFile] = field(default_factory=dict)

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, verified; ``ArtifactError`` names a file that is missing or damaged."""
        yield from self.tensors.items()
        yield from read_files(self.folder, self.files)


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """What was found out about a model.

    ``sites`` are all its linears (without calls: there is no graph), ``couplings`` the orders that can be absorbed,
    ``tensors`` "<site>/salience" fp32[rows, widths], ``calibration`` names the text, ``options`` are those that shaped it.
    """

    sites: tuple[Site, ...]
    couplings: Couplings
    identity: Identity
    options: MeasureConfig
    calibration: str
    tensors: Mapping[str, torch.Tensor]
    moments: Moments

    @classmethod
    def of(
        cls, program: Program, couplings: Couplings, identity: Identity, options: MeasureConfig, calibration: str
    ) -> Measurement:
        """From a program that has been priced; tensors move to main memory."""
        sites = tuple(
            _bare(s.name, s.weight.shape, s.weight.dtype, s.input, s.in_scope, s.reason) for s in program.sites
        )
        kinds = ("/salience",), ("/sigma", "/gamma")
        found = {k: t for k, t in program.tensors.items() if k.endswith(kinds[0] + kinds[1])}
        with ThreadPoolExecutor(THREADS) as pool:
            held = list(zip(found, pool.map(_in_main_memory, found.values()), strict=True))
        prices, moments = ({k: t for k, t in held if k.endswith(kind)} for kind in kinds)
        return cls(sites, couplings, identity, options, calibration, MappingProxyType(prices), Moments(moments))

    @property
    def fingerprint(self) -> str:
        """Which model was measured."""
        return self.identity.fingerprint

    def prices(self) -> Prices:
        return Prices(self.sites, self.couplings, self.tensors)

    def curve(self, count: str = "stored") -> list[tuple[float, float]]:
        """(bits per weight, predicted loss in nats a token) from the floor to the ceiling; see ``planner.curve``."""
        return curve(self.prices(), count)

    def statistics(self, program: Program) -> dict[str, torch.Tensor]:
        """Second moments and output weights for the open sites of ``program``, under its names of inputs: on its
        device, or second moments in main memory where ``CollectStatistics`` would keep them.

        Raises:
            InputError: an open site was not measured.
        """
        device = program.weight(program.open_sites()[0]).device
        inputs = {s.name: s.input for s in self.sites if s.open}
        missing = [s.name for s in program.open_sites() if s.name not in inputs]
        if missing:
            raise InputError(f"sites {missing[:5]} are compiled and were left alone when measured; measure them too")
        wanted: dict[str, set[str]] = {}
        for site in program.open_sites():
            wanted.setdefault(f"{inputs[site.name]}/sigma", set()).add(f"{site.input}/sigma")
            wanted[f"{site.name}/gamma"] = {f"{site.name}/gamma"}
        place = {"sigma": moments_device(program, device), "gamma": device}
        read = ((key, tensor) for key, tensor in self.moments.read() if key in wanted)
        return {new: t.to(place[key.rpartition("/")[2]]) for key, t in read for new in sorted(wanted[key])}

    def summary(self) -> dict[str, Any]:
        """What was measured, in short."""
        opened = self.prices().open_sites()
        return {
            "fingerprint": self.fingerprint,
            "calibration": self.calibration,
            "options": self.options.to_json(),
            "sites": len(opened),
            "weights": sum(s.rows * s.columns for s in opened),
            "left_alone": {s.name: s.reason or "out of scope" for s in self.sites if not s.open},
        }

    def lines(self, folder: str) -> Iterator[str]:
        """The summary for people."""
        found = self.summary()
        yield from (f"left alone: {name}: {reason}" for name, reason in found["left_alone"].items())
        yield f"measured    {found['sites']} sites, {found['weights']:,} weights"
        yield f"calibration {self.calibration}"
        yield f"fingerprint {self.fingerprint[:16]}"
        yield f"saved       {folder}"

    def save(self, folder: str | Path) -> None:
        """Write the measurement to ``folder``; an earlier one there is replaced in one step.

        Raises:
            ArtifactError: ``folder`` holds files that are no measurement's.
            StorageError: the file system refused; what was in ``folder`` before is intact.
        """
        target = Path(folder).resolve()
        check_replaceable(target)
        groups = {_PRICES: dict(self.tensors), _MOMENTS: dict(self.moments.read())}
        need_room(target, sum(t.nbytes for group in groups.values() for t in group.values()))
        with new_folder(target) as partial:
            files = {}
            for kind, group in groups.items():
                sizes = [(key, group[key].nbytes) for key in sorted(group)]
                for number, names in enumerate(split(sizes, SHARD_BYTES), start=1):
                    name = f"{kind}-{number:05d}.safetensors"
                    files[name] = write_shard(partial / name, {key: group[key] for key in names})
            write_file(partial / MANIFEST, [signed(self._to_json(files))])

    @classmethod
    def load(cls, folder: str | Path) -> Measurement:
        """Read what planning needs; second moments stay on the disk until ``apply`` asks for them.

        Raises:
            ArtifactError: the folder holds no measurement, or a damaged one; the message names file and field.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise ArtifactError(
                f"{folder}: has no {MANIFEST}, so it is no measurement; give a folder that `mixcomp measure` wrote"
            )
        data = _read(read_whole(folder, MANIFEST, _MAX_MANIFEST))
        files = {check_name(name): _RECORD.stored_file(name, file) for name, file in data["files"].items()}
        sites = tuple(_site(i, site) for i, site in enumerate(data["sites"]))
        digests = {s["name"]: _RECORD.digest(f"sites.{s['name']:.200}.sha256", s["sha256"]) for s in data["sites"]}
        if len(digests) != len(sites):
            raise _RECORD.wrong("sites", len(sites), "sites of different names")
        identity = Identity.given(sites, digests)
        if identity.fingerprint != data["fingerprint"]:
            raise _RECORD.wrong("fingerprint", data["fingerprint"], "that of the sites")
        _check_tensors(sites, files)
        groups = [{n: f for n, f in files.items() if n.startswith(kind)} for kind in (_PRICES, _MOMENTS)]
        tensors = dict(read_files(folder, groups[0]))
        _check_values(tensors)
        try:
            options = MeasureConfig.from_kwargs(**data["options"])
        except ConfigError as error:
            raise ArtifactError(f"{MANIFEST}: options: {error}; {_RECORD.again}") from error
        couplings = _couplings(data, {s.name: s for s in sites})
        moments = Moments(folder=folder, files=groups[1])
        return cls(sites, couplings, identity, options, data["calibration"], MappingProxyType(tensors), moments)

    def _to_json(self, files: Mapping[str, StoredFile]) -> dict[str, Any]:
        return {
            "measurement_version": VERSION,
            "options": self.options.to_json(),
            "calibration": self.calibration,
            "fingerprint": self.fingerprint,
            "sites": [_site_json(s, self.identity.linears[s.name][3]) for s in self.sites],
            "absorptions": [
                asdict(a) | {"producers": list(a.producers), "consumers": list(a.consumers)}
                for a in self.couplings.absorptions
            ],
            "scattered": dict(self.couplings.scattered),
            "files": {name: file.to_json() for name, file in files.items()},
        }


def check_replaceable(target: Path) -> None:
    """``ArtifactError`` unless ``target`` is absent, empty, or holds nothing but a measurement."""
    require_replaceable(target, MANIFEST, _MAX_MANIFEST, lambda raw: _read(raw)["files"])


def _in_main_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy, zeroed first: new pages take longer than the copy, and threads get them side by side."""
    return tensor if tensor.is_cpu else torch.empty_like(tensor, device="cpu").zero_().copy_(tensor)


def _bare(
    name: str, shape: tuple[int, int], dtype: torch.dtype, source: str, in_scope: bool, reason: str | None
) -> Site:
    return Site(name, (), WeightRef(name, (), shape, dtype), None, source, in_scope, reason)


def _read(raw: bytes) -> dict[str, Any]:
    data = _RECORD.read(raw)
    if data.get("measurement_version") != VERSION:
        raise _RECORD.wrong("measurement_version", data.get("measurement_version"), f"{VERSION} for this release")
    _RECORD.check_digest(raw, data)
    return _RECORD.fields("the whole", data, _LAYOUT)


def _site_json(site: Site, digest: str) -> dict[str, Any]:
    return {
        "name": site.name,
        "rows": site.rows,
        "columns": site.columns,
        "dtype": SPELLING[site.weight.dtype],
        "sha256": digest,
        "input": site.input,
        "in_scope": site.in_scope,
        "reason": site.reason,
    }


def _site(number: int, data: object) -> Site:
    where = f"sites.{number}"
    kinds = {"name": str, "rows": int, "columns": int, "dtype": str, "sha256": str, "input": str, "in_scope": bool}
    fields = _RECORD.fields(where, data, {**kinds, "reason": (str, type(None))})
    shape = tuple(_RECORD.number(f"{where}.{side}", fields[side], 1, _MOST) for side in ("rows", "columns"))
    if fields["dtype"] not in DTYPES or not DTYPES[fields["dtype"]].is_floating_point:
        raise _RECORD.wrong(f"{where}.dtype", fields["dtype"], "a floating-point dtype")
    name, source = (_RECORD.name(f"{where}.{what}", fields[what]) for what in ("name", "input"))
    return _bare(name, (shape[0], shape[1]), DTYPES[fields["dtype"]], source, fields["in_scope"], fields["reason"])


def _couplings(data: Mapping[str, Any], sites: Mapping[str, Site]) -> Couplings:
    kinds = {"producers": list, "consumers": list, "block": int, "repeats": int, "rows": int}
    found = []
    for i, entry in enumerate(data["absorptions"]):
        where = f"absorptions.{i}"
        fields = _RECORD.fields(where, entry, kinds)
        for what in ("block", "repeats", "rows"):
            _RECORD.number(f"{where}.{what}", fields[what], 1, _MOST)
        for what, sizes in (("producers", "rows"), ("consumers", "columns")):
            size = fields["rows"] * (fields["repeats"] if what == "consumers" else 1)
            names = fields[what]
            if not names or not all(
                isinstance(n, str) and n in sites and getattr(sites[n], sizes) == size for n in names
            ):
                raise _RECORD.wrong(f"{where}.{what}", names, f"sites of {size} {sizes}")
        if fields["rows"] % fields["block"]:
            raise _RECORD.wrong(f"{where}.block", fields["block"], f"a divisor of {fields['rows']}")
        producers, consumers = tuple(fields["producers"]), tuple(fields["consumers"])
        found.append(Absorption(producers, consumers, fields["block"], fields["repeats"], fields["rows"]))
    for name, reason in data["scattered"].items():
        if name not in sites or not isinstance(reason, str):
            raise _RECORD.wrong(f"scattered.{name:.200}", reason, "a reason, under the name of a site")
    return Couplings(tuple(found), MappingProxyType(data["scattered"]))


def _check_tensors(sites: tuple[Site, ...], files: Mapping[str, StoredFile]) -> None:
    """The files list what the sites need, and nothing else."""
    listed = {(n.partition("-")[0], key): tensor for n, file in files.items() for key, tensor in file.tensors.items()}
    wanted: dict[tuple[str, str], tuple[int, ...]] = {}
    for s in (site for site in sites if site.open):
        wanted[_PRICES, f"{s.name}/salience"] = (s.rows, len(WIDTHS))
        wanted[_MOMENTS, f"{s.name}/gamma"] = (s.rows,)
        wanted[_MOMENTS, f"{s.input}/sigma"] = (s.columns, s.columns)
    for kind, key in sorted(listed.keys() | wanted.keys()):
        found, shape = listed.get((kind, key)), wanted.get((kind, key))
        if found is None or (found.dtype, found.shape) != (torch.float32, shape):
            raise _RECORD.wrong(f"files: {kind} {key:.200}", found and found.shape, f"F32 of shape {shape}")


def _check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise ArtifactError(f"{MANIFEST}: tensor {key!r:.200} holds a loss that is negative or not finite; "
                                f"{_RECORD.again}")  # fmt: skip
