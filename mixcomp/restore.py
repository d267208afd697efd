"""Reading a saved folder: checking every byte of it, and making the model again.

Nothing in the folder is trusted.  Manifest first, then the files it lists; what is read is what was checked, from one
descriptor; a model is returned whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mixcomp import skeleton
from mixcomp.errors import ArtifactError, ConfigError, FormatError, MixCompError
from mixcomp.files import check_digest, read_whole, sha256
from mixcomp.lowering.module import MixedLinear
from mixcomp.manifest import CONFIG, GENERATION, MANIFEST, MAX_MANIFEST, PLAN, Manifest
from mixcomp.packed import PackedWeight, check_values
from mixcomp.plans import Compiled, Plan
from mixcomp.records import read_json
from mixcomp.shards import read_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

_SMALL = 1 << 28  # bytes of the largest file that is not tensors: tokenizers take tens of MB
_UNCHECKED = ("codes", "scales", "branch_a", "branch_b", "bias")  # every value of these is a legal one


def check_folder(folder: str | Path) -> Manifest:
    """Verify every byte of a saved folder, and that its stored values mean something; nothing is built.

    Raises ``ArtifactError`` or ``FormatError`` naming the file, the tensor or the field.
    """
    folder = Path(folder)
    manifest = open_folder(folder)
    texts = _texts(folder, manifest)
    skeleton.refuse_code(read_json(texts[CONFIG], CONFIG))
    _plan(texts)
    for name, listed in manifest.files.items():
        if listed.tensors:
            check_digest(folder, name, listed.size, listed.sha256)
    values: dict[str, torch.Tensor] = {}
    checked = {s for site in manifest.sites for k, s in manifest.site_tensors(site).items() if k not in _UNCHECKED}
    for key, tensor in read_files(folder, manifest.files):
        values[key] = tensor if key in checked else tensor.to("meta")
    for site in manifest.sites:
        _packed(manifest, site, values)
    return manifest


def load(folder: str | Path, *, device: str | torch.device | None = None) -> PreTrainedModel:
    """The model of a saved folder, in evaluation mode, on ``device`` (default: CPU).  Every byte read is verified.

    Its outputs are those of the model that was saved, bit for bit, on the same machine and libraries.
    Raises ``ArtifactError`` or ``FormatError`` naming the file, the tensor or the field; never returns part of a model.
    """
    place = _device(device)
    folder = Path(folder)
    manifest = open_folder(folder)
    texts = _texts(folder, manifest)
    config = read_json(texts[CONFIG], CONFIG)
    most = 4 * (len(manifest.tensors) + len(manifest.ties)) + 64
    model = skeleton.build(config, manifest.architecture, manifest.attention, most)
    tensors = dict(read_files(folder, manifest.files))  # moved module by module: on a GPU codes take another form
    skeleton.exchange_modules(model, modules(manifest, tensors))
    skeleton.check_names(model, [*tensors, *manifest.ties], manifest.buffers)
    skeleton.assign(model, tensors, manifest.ties)
    _set_generation(model, texts)
    _set_plan(model, texts)
    return model.to(place)  # type: ignore[arg-type, no-any-return]


def open_folder(folder: Path) -> Manifest:
    """The checked manifest of a saved folder; its files have not been looked at."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: is not a folder; give the folder that mixcomp.save wrote")
    if not (folder / MANIFEST).exists():
        raise ArtifactError(
            f"{folder}: has no {MANIFEST}, so mixcomp.save did not write it (or not to the end); "
            "compile a plain model with mixcomp.compile first"
        )
    return Manifest.from_bytes(read_whole(folder, MANIFEST, MAX_MANIFEST))


def modules(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> dict[str, MixedLinear]:
    """A module for every site, of stored tensors by name; sites that share all their tensors share one."""
    out: dict[str, MixedLinear] = {}
    made: dict[tuple[object, ...], MixedLinear] = {}
    for site in manifest.sites:
        sources = manifest.site_tensors(site)
        stored = manifest.sites[site]
        key = (stored.dtype, stored.activations, *sources.values())
        if key not in made:
            bias = tensors[sources["bias"]] if "bias" in sources else None
            packed = _packed(manifest, site, tensors)
            made[key] = MixedLinear(packed, bias, stored.dtype, stored.activations).eval()
        out[site] = made[key]
    return out


def finish(model: PreTrainedModel, folder: Path, manifest: Manifest) -> None:
    """Give a model whose state is loaded what lies outside of it: the buffers listed for that, and the plan."""
    buffers = {
        key: tensor for key, tensor in read_files(folder, manifest.files, manifest.buffers) if key in manifest.buffers
    }
    skeleton.assign(model, {key: tensor.to(model.get_buffer(key).device) for key, tensor in buffers.items()}, {})
    _set_plan(model, _texts(folder, manifest))


def _texts(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The verified bytes of everything but the tensors."""
    out = {}
    for name, listed in manifest.files.items():
        if listed.tensors:
            continue
        out[name] = read_whole(folder, name, _SMALL)
        if len(out[name]) != listed.size or sha256(out[name]) != listed.sha256:
            raise ArtifactError(
                f"{name}: damaged, its {len(out[name])} bytes are not the {listed.size} listed ones; "
                "copy or save the folder again"
            )
    return out


def _plan(texts: Mapping[str, bytes]) -> Plan | None:
    return Plan.from_json(read_json(texts[PLAN], PLAN)) if PLAN in texts else None


def _set_plan(model: PreTrainedModel, texts: Mapping[str, bytes]) -> None:
    plan = _plan(texts)
    if plan is not None:
        model.mixcomp = Compiled(plan)  # type: ignore[assignment]


def _packed(manifest: Manifest, site: str, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
    sources = manifest.site_tensors(site)
    try:
        packed = PackedWeight.from_tensors(
            manifest.sites[site].fmt,
            {key: tensors[source] for key, source in sources.items() if key != "bias"},
        )
        if not packed.factors.is_meta:
            check_values(packed)
    except FormatError as error:
        raise FormatError(f"site {site!r:.200}: {error}; save the model again") from error
    return packed


def _set_generation(model: PreTrainedModel, texts: Mapping[str, bytes]) -> None:
    if GENERATION not in texts:
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_dict(read_json(texts[GENERATION], GENERATION))
    except MixCompError:
        raise
    except Exception as error:
        raise ArtifactError(f"{GENERATION}: transformers refuses it ({error!s:.300}); save the model again") from error


def _device(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used ({error!s:.200}); give 'cpu' or a device torch has"
        ) from error
    if place.type == "meta":
        raise ConfigError("device 'meta' holds no values; give 'cpu' or a device torch has")
    return place
