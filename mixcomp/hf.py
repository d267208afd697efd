"""``AutoModelForCausalLM.from_pretrained(folder)`` for folders that ``mixcomp.save`` wrote.

transformers builds the model, picks devices and moves tensors; this file swaps the compiled layers in beforehand and
compares every tensor with its digest afterwards.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixcomp import restore, skeleton
from mixcomp.errors import ArtifactError, ConfigError
from mixcomp.files import sha256
from mixcomp.format import VERSION
from mixcomp.lowering.module import MixedLinear
from mixcomp.manifest import INDEX, METHOD
from mixcomp.shards import content

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from mixcomp.manifest import Manifest


def register() -> None:
    """Make transformers know ``quant_method: mixcomp``; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(MixCompConfig)
        register_quantizer(METHOD)(MixCompQuantizer)


class MixCompConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a config.json; what is stored how stands in the manifest."""

    def __init__(self, quant_method: str = METHOD, format_version: int = VERSION) -> None:
        self.quant_method: Any = quant_method
        self.format_version = format_version


class MixCompQuantizer(HfQuantizer):
    """Steps that transformers calls while it loads a saved folder."""

    requires_calibration = True  # in transformers' words: plain models are refused
    manifest: Manifest
    folder: Path
    dtype: torch.dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Point transformers to our files; the one step between reading the config and looking for weights."""
        config.transformers_weights = INDEX
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same step, as older releases of transformers call it."""
        return self.update_attn_implementation(config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Note the dtype asked for; by default it is that of the config."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = [Path(file) for file in kwargs["checkpoint_files"]]
        self.folder = files[0].parent
        self.manifest = restore.open_folder(self.folder)
        if set(files) != {self.folder / name for name, listed in self.manifest.files.items() if listed.tensors}:
            raise ArtifactError(f"{INDEX}: names other files than the manifest; copy or save the folder again")
        tensors = {name: tensor.like() for name, tensor in self.manifest.tensors.items()}
        skeleton.exchange_modules(model, restore.modules(self.manifest, tensors))
        skeleton.check_names(model, [*tensors, *self.manifest.ties], self.manifest.buffers)
        skeleton.assign(model, tensors, self.manifest.ties)  # transformers casts to the dtypes it finds
        if self.dtype != model.dtype:
            raise ConfigError(f"dtype {self.dtype}: the folder holds {model.dtype}; leave dtype out, then use model.to")
        model._keep_in_fp32_modules = model._keep_in_fp32_modules_strict = set()
        model.all_tied_weights_keys = dict(self.manifest.ties)
        model._keys_to_ignore_on_load_unexpected = {re.escape(name) for name in self.manifest.buffers}
        for module in model.modules():
            # only buffers outside the state are left to initialize; GPT-2 would draw its c_proj.weight anew
            module._is_hf_initialized = not module._non_persistent_buffers_set

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        stored = self.manifest.tensors
        loaded = dict(model.state_dict(keep_vars=True))
        for name, listed in stored.items():
            if name in self.manifest.buffers:
                continue
            tensor = loaded[name]
            if tensor.is_meta or tensor.dtype != listed.dtype or sha256(content(tensor)) != listed.sha256:
                raise ArtifactError(f"tensor {name!r}: transformers did not load what is stored; use mixcomp.load")
        restore.finish(model, self.folder, self.manifest)
        for module in model.modules():
            if isinstance(module, MixedLinear):
                module.settle()  # transformers filled its buffers one by one
        return model

    def is_serializable(self) -> bool:
        """False: ``mixcomp.save`` writes compiled models, ``save_pretrained`` refuses."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False
