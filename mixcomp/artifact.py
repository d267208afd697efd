"""Saving a compiled model to a folder and loading it again, bit for bit.

A folder holds what transformers writes (config, generation config, tokenizer), the tensors in safetensors files, the
plan, and ``mixcomp.json`` with the formats and a digest of everything (``manifest``).  It appears whole or not at all,
and equal models give equal bytes.  Loading needs no calibration, no passes and no original weights.
"""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixcomp import skeleton
from mixcomp.errors import ArtifactError, ConfigError, FormatError, InputError, MixCompError
from mixcomp.files import (
    check_digest,
    check_name,
    need_room,
    new_folder,
    open_regular,
    read_whole,
    sha256,
    write_file,
)
from mixcomp.format import VERSION
from mixcomp.lowering.module import MixedLinear
from mixcomp.manifest import CONFIG, MANIFEST, MAX_MANIFEST, METHOD, Manifest, StoredFile, StoredSite, read_json
from mixcomp.packed import PackedWeight, check_values
from mixcomp.plan import Compiled, Plan
from mixcomp.shards import SPELLING, StoredTensor, content, header, read, split, stored_order

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedModel

INDEX = "mixcomp.safetensors.index.json"  #: for transformers, which looks for tensors there
GENERATION = "generation_config.json"
PLAN = "plan.json"
SHARD_BYTES = 4 << 30
_LIBRARIES = ("mixcomp", "safetensors", "torch", "transformers")
_SMALL = 1 << 28  # bytes of the largest file that is not tensors: tokenizers take tens of MB
_CODE_SUFFIXES = (".py", ".bin", ".pt", ".pth", ".pkl", ".so")


def save(model: PreTrainedModel, folder: str | Path, *, tokenizer: Any = None) -> None:
    """Write a compiled model to ``folder``; an earlier compiled model there is replaced in one step.

    ``tokenizer`` is anything with transformers' ``save_pretrained``.  The model is not changed.

    Raises:
        InputError: ``model`` is not a compiled transformers model, or some of its tensors are on the meta device.
        ArtifactError: ``folder`` holds files that MixComp did not write, or the model could not be loaded again
            because transformers does not build it from its config.
        StorageError: the file system refused; what was in ``folder`` before is intact.
    """
    _check_model(model)
    target = Path(folder).resolve()
    _check_replaceable(target)
    texts = {
        CONFIG: _config_text(model),
        **_generation_text(model),
        **_plan_text(model),
        **_tokenizer_files(tokenizer),
    }
    sites = _sites(model)
    named, ties = _state(model)
    attention = model.config._attn_implementation
    attention = attention if attention in ("eager", "sdpa") else None
    architecture = type(model).__name__
    extra = _changed_buffers(model, read_json(texts[CONFIG], CONFIG), architecture, attention, sites, {**named, **ties})
    named |= extra
    sizes = [(name, tensor.nbytes) for name, tensor in named.items()]
    need_room(target, sum(size for _, size in sizes) + sum(map(len, texts.values())))
    with new_folder(target) as partial:
        files = {name: StoredFile(*write_file(partial / name, [raw]), {}) for name, raw in texts.items()}
        for number, names in enumerate(split(sizes, SHARD_BYTES), start=1):
            shard = f"mixcomp-{number:05d}.safetensors"
            files[shard] = _write_shard(partial / shard, {name: named[name] for name in names})
        where = {name: shard for shard, listed in files.items() for name in listed.tensors}
        index = _text({"metadata": {}, "weight_map": where})
        files[INDEX] = StoredFile(*write_file(partial / INDEX, [index]), {})
        versions = {name: version(name) for name in _LIBRARIES}
        manifest = Manifest(versions, architecture, attention, sites, ties, tuple(sorted(extra)), files)
        write_file(partial / MANIFEST, [manifest.to_bytes()])


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
    for key, tensor in _tensors(folder, manifest):
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
    tensors = {key: tensor.to(place) for key, tensor in _tensors(folder, manifest)}
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
        key = (manifest.sites[site].dtype, *sources.values())
        if key not in made:
            bias = tensors[sources["bias"]] if "bias" in sources else None
            made[key] = MixedLinear(_packed(manifest, site, tensors), bias, manifest.sites[site].dtype).eval()
        out[site] = made[key]
    return out


def finish(model: PreTrainedModel, folder: Path, manifest: Manifest) -> None:
    """Give a model whose state is loaded what lies outside of it: the buffers listed for that, and the plan."""
    buffers = {key: tensor for key, tensor in _tensors(folder, manifest, manifest.buffers) if key in manifest.buffers}
    skeleton.assign(model, {key: tensor.to(model.get_buffer(key).device) for key, tensor in buffers.items()}, {})
    _set_plan(model, _texts(folder, manifest))


_UNCHECKED = ("codes", "scales", "branch_a", "branch_b", "bias")  # every value of these is a legal one


def _check_model(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"save takes a transformers PreTrainedModel, got {type(model).__name__}; give the model itself"
        )
    if not any(isinstance(module, MixedLinear) for module in model.modules()):
        raise InputError(
            "the model has no compiled layer; call mixcomp.compile before saving, or model.save_pretrained"
        )
    state = model.state_dict(keep_vars=True)
    empty = [name for name, tensor in state.items() if isinstance(tensor, torch.Tensor) and tensor.is_meta]
    if empty:
        raise InputError(f"tensors on the meta device hold no values: {empty[:5]}; load the model to CPU or GPU first")
    odd = [name for name, tensor in state.items() if getattr(tensor, "dtype", None) not in SPELLING]
    if odd:
        raise InputError(
            f"state that no safetensors file can hold: {odd[:5]}; plain tensors of real numbers are allowed"
        )


def _check_replaceable(target: Path) -> None:
    """``ArtifactError`` unless ``target`` is absent, empty, or holds nothing but what a manifest in it lists."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target}: is a file; give the name of a folder to save to")
    found = {path.name for path in target.iterdir()}
    ours: set[str] = set()
    if MANIFEST in found:
        ours = {MANIFEST, *Manifest.from_bytes(read_whole(target, MANIFEST, MAX_MANIFEST)).files}
    if found - ours:
        raise ArtifactError(
            f"{target}: holds files that MixComp did not write: {sorted(found - ours)[:5]}; "
            "choose another folder or remove them"
        )


def _config_text(model: PreTrainedModel) -> bytes:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    data = json.loads(config.to_json_string())
    data.pop("transformers_weights", None)
    data["dtype"] = str(model.dtype).removeprefix("torch.")
    data["quantization_config"] = {"quant_method": METHOD, "format_version": VERSION}
    skeleton.refuse_code(data)
    return _text(data)


def _generation_text(model: PreTrainedModel) -> dict[str, bytes]:
    if not model.can_generate():
        return {}
    text: str = model.generation_config.to_json_string(keys_to_pop=["compile_config"])
    return {GENERATION: text.encode()}


def _plan_text(model: PreTrainedModel) -> dict[str, bytes]:
    compiled = getattr(model, "mixcomp", None)
    return {} if compiled is None else {PLAN: _text(compiled.plan.to_json())}


def _text(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = {check_name(path.name): path for path in sorted(Path(scratch).iterdir())}
        for name, path in files.items():
            if (
                not path.is_file()
                or name.endswith(_CODE_SUFFIXES)
                or name in (CONFIG, GENERATION, PLAN, INDEX, MANIFEST)
            ):
                raise ArtifactError(f"the tokenizer wants to save {name!r}, which is not plain data; save it elsewhere")
        return {name: path.read_bytes() for name, path in files.items()}


def _sites(model: nn.Module) -> dict[str, StoredSite]:
    out = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MixedLinear):
            try:
                check_values(module.packed())
            except FormatError as error:
                raise InputError(f"layer {name!r}: {error}; compile the model again") from error
            out[name] = StoredSite(module.fmt, module.dtype, None if module.bias is None else module.bias.dtype)
    return out


def _state(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The model's tensors by their first name, and every further name of a tensor with its first.

    Tied means: one object, or the same memory read the same way, while all tensors are alive.
    """
    named: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        source = first.setdefault(memory if tensor.numel() else id(tensor), name)
        if source == name:
            named[name] = tensor
        else:
            ties[name] = source
    return named, ties


def _changed_buffers(
    model: PreTrainedModel,
    config: Mapping[str, Any],
    architecture: str,
    attention: str | None,
    sites: Mapping[str, StoredSite],
    names: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """Buffers outside the state dict that a fresh model would not have (rotary frequencies after ``model.half()``).

    Builds the empty model that ``load`` will build, and so proves before anything is written that it can.
    """
    fresh = skeleton.build(config, architecture, attention, 4 * len(names) + 64)
    skeleton.exchange_modules(fresh, {site: model.get_submodule(site) for site in sites})
    skeleton.check_names(fresh, names, ())
    expected = dict(fresh.named_buffers(remove_duplicate=False))
    out = {}
    for name, tensor in model.named_buffers(remove_duplicate=False):
        # a buffer that a fresh model lacks, or has in another shape, is a cache that fills in use
        if name in names or name not in expected or expected[name].shape != tensor.shape:
            continue
        if tensor.dtype != expected[name].dtype or not torch.equal(_bytes(tensor), _bytes(expected[name])):
            out[name] = tensor
    return out


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> StoredFile:
    listed = {name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def chunks() -> Iterator[bytes | memoryview]:
        yield header(listed)
        for name in stored_order(listed):
            raw = content(tensors[name])
            listed[name] = replace(listed[name], sha256=sha256(raw))
            yield raw

    size, digest = write_file(path, chunks())
    return StoredFile(size, digest, listed)


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


def _tensors(
    folder: Path, manifest: Manifest, some: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The verified tensors of all files, or of those that hold ``some``."""
    for name, listed in manifest.files.items():
        if listed.tensors and (some is None or not listed.tensors.keys().isdisjoint(some)):
            with open_regular(folder, name) as file:
                yield from read(file, name, listed.tensors, listed.size)


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
