"""Saving a compiled model to a folder; ``restore`` loads it again, bit for bit.

A folder holds what transformers writes (config, generation config, tokenizer), the tensors in safetensors files, the
plan, and ``mixcomp.json`` with the formats and a digest of everything (``manifest``).  It appears whole or not at all,
and equal models give equal bytes.  Loading needs no calibration, no passes and no original weights.
"""

from __future__ import annotations

import copy
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixcomp import skeleton
from mixcomp.errors import ArtifactError, FormatError, InputError
from mixcomp.files import check_name, need_room, new_folder, require_replaceable, write_file
from mixcomp.format import VERSION
from mixcomp.lowering.module import MixedLinear
from mixcomp.manifest import CONFIG, GENERATION, INDEX, MANIFEST, MAX_MANIFEST, METHOD, PLAN, Manifest, StoredSite
from mixcomp.packed import check_values
from mixcomp.records import read_json
from mixcomp.restore import check_folder, load
from mixcomp.shards import SPELLING, StoredFile, split, write_shard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["check_folder", "load", "save"]

SHARD_BYTES = 4 << 30
_LIBRARIES = ("mixcomp", "safetensors", "torch", "transformers")
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
    check_replaceable(target)
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
            files[shard] = write_shard(partial / shard, {name: named[name] for name in names})
        where = {name: shard for shard, listed in files.items() for name in listed.tensors}
        index = _text({"metadata": {}, "weight_map": where})
        files[INDEX] = StoredFile(*write_file(partial / INDEX, [index]), {})
        versions = {name: version(name) for name in _LIBRARIES}
        manifest = Manifest(versions, architecture, attention, sites, ties, tuple(sorted(extra)), files)
        write_file(partial / MANIFEST, [manifest.to_bytes()])


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


def check_replaceable(target: Path) -> None:
    """``ArtifactError`` unless ``target`` is absent, empty, or holds nothing but what a manifest in it lists."""
    require_replaceable(target, MANIFEST, MAX_MANIFEST, lambda raw: Manifest.from_bytes(raw).files)


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
    if compiled is None:
        return {}
    try:
        return {PLAN: compiled.plan.to_bytes()}
    except (TypeError, ValueError) as error:
        raise InputError(f"model.mixcomp.plan cannot be written as JSON ({error}); compile the model again") from error


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
            bias = module.bias.dtype if isinstance(module.bias, torch.Tensor) else None
            out[name] = StoredSite(module.fmt, module.dtype, bias, module.activations)
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
