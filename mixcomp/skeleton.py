"""Rebuilding the empty model that a saved folder's tensors go into, without paying for its original weights.

transformers builds the model from its config as usual, on the CPU and with real buffers (rotary frequencies, causal
masks), but each parameter moves to the meta device as it is registered, before anything touches its memory.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mixcomp.errors import ArtifactError, MixCompError
from mixcomp.lowering.module import MixedLinear

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

#: config fields that make transformers fetch or run code that is not its own
_CODE_FIELDS = frozenset(
    {"auto_map", "trust_remote_code", "attn_implementation", "_attn_implementation", "experts_implementation"}
    | {
        "_experts_implementation",
        "transformers_weights",
        "fusion_config",
        "kernel_config",
        "custom_pipelines",
    }
)
_SPECIAL_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}

_building = threading.Lock()


def build(config: Mapping[str, Any], architecture: str, attention: str | None, most_parameters: int) -> PreTrainedModel:
    """The model of a ``config.json`` in evaluation mode: parameters on meta, buffers on the CPU.

    ``most_parameters`` bounds how many parameters the config may ask for.  Raises ``ArtifactError`` if transformers
    does not know the model or cannot build it.
    """
    refuse_code(config)
    parsed = _config(config)
    model_class = _model_class(parsed, architecture)
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with (
            _building,
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            _parameters_on_meta(most_parameters),
        ):
            model: PreTrainedModel = model_class._from_config(parsed, **options).eval()
    except MixCompError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"config.json: transformers cannot build {architecture} from it ({type(error).__name__}: {error!s:.300}); "
            "load the folder with the transformers release that saved it"
        ) from error
    return model


def refuse_code(config: Mapping[str, Any]) -> None:
    """``ArtifactError`` if a config, at any depth, asks for code that is not part of transformers."""
    level: list[Any] = [config]
    while level:
        value = level.pop()
        if isinstance(value, dict):
            found = sorted(_CODE_FIELDS & value.keys())
            if found:
                raise ArtifactError(
                    f"config.json: field {found[0]!r} asks for code from outside transformers; MixComp never runs any; "
                    "use a model class that transformers has"
                )
            level.extend(value.values())
        elif isinstance(value, list):
            level.extend(value)


def exchange_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put ``modules`` in place by path; a path where the model has no weight of that shape is an ``ArtifactError``."""
    for path, module in modules.items():
        fmt: Any = module.fmt
        try:
            old = model.get_submodule(path)
            if old is module:
                continue  # its other path came first
            weight = old.get_parameter("weight")
        except AttributeError:
            raise ArtifactError(
                f"site {path!r:.200}: the model built from config.json has no linear there; save the model again"
            ) from None
        if sorted(weight.shape) != sorted((fmt.rows, fmt.columns)):
            raise ArtifactError(
                f"site {path!r:.200}: stored as {fmt.rows} x {fmt.columns}, the model built from config.json has "
                f"{tuple(weight.shape)} there; save the model again"
            )
        model.set_submodule(path, module)


def check_names(model: nn.Module, have: Iterable[str], extra: Iterable[str]) -> None:
    """``ArtifactError`` unless ``have`` names the model's state and those of its buffers that are ``extra``."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    wanted = set(model.state_dict(keep_vars=True)) | (buffers & set(extra))
    missing, unexpected = sorted(wanted - set(have)), sorted(set(have) - wanted)
    if missing or unexpected:
        raise ArtifactError(
            f"tensors and config.json are of different models: missing {missing[:5]} ({len(missing)} in all), "
            f"unexpected {unexpected[:5]} ({len(unexpected)} in all); save the model again"
        )


def assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], ties: Mapping[str, str]) -> None:
    """Give the model its tensors, without a copy.  ``ties`` maps further names to the one whose tensor they share.

    A shape that differs from the model's is an ``ArtifactError`` naming the tensor.
    """
    parameters: dict[str, nn.Parameter] = {}
    for name in (*tensors, *ties):
        source = ties.get(name, name)
        tensor = tensors[source]
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if isinstance(owner, MixedLinear):
            continue  # made of its tensors, in whatever form it holds them
        old = getattr(owner, leaf)
        if old.shape != tensor.shape:
            raise ArtifactError(
                f"tensor {name!r:.200} is {tuple(tensor.shape)}, the model built from config.json wants "
                f"{tuple(old.shape)}; save the model again"
            )
        if isinstance(old, nn.Parameter):
            trainable = old.requires_grad and tensor.is_floating_point()
            tensor = parameters.setdefault(source, nn.Parameter(tensor, requires_grad=trainable))
        setattr(owner, leaf, tensor)


@contextmanager
def _parameters_on_meta(most: int) -> Iterator[None]:
    """Parameters that this thread registers go to meta; more than ``most`` of them is an ``ArtifactError``."""
    thread = threading.get_ident()
    count = 0

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        nonlocal count
        if threading.get_ident() != thread or parameter is None or parameter.is_meta:
            return None
        count += 1
        if count > most:
            raise ArtifactError(f"config.json: asks for more than {most} parameters; save the model again")
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _config(config: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, __version__

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ArtifactError(
            f"config.json: transformers {__version__} does not know model type {kind!r:.80}; install one that does, "
            "or register the class with AutoConfig before loading"
        )
    try:
        parsed: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(_floats(config))
    except Exception as error:
        raise ArtifactError(
            f"config.json: transformers refuses it ({type(error).__name__}: {error!s:.300}); "
            "load the folder with the transformers release that saved it"
        ) from error
    return parsed


def _floats(value: Any) -> Any:
    """Undo transformers' spelling of infinities, ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[value["__float__"]]
        return {key: _floats(v) for key, v in value.items()}
    return [_floats(v) for v in value] if isinstance(value, list) else value


def _model_class(config: PreTrainedConfig, name: str) -> Any:
    import transformers

    listed: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    classes = listed if isinstance(listed, list | tuple) else (listed,)
    own = getattr(transformers, name, None)
    if isinstance(own, type) and getattr(own, "config_class", None) is type(config):
        classes = (*classes, own)
    for model_class in classes:
        if model_class.__name__ == name:
            return model_class
    raise ArtifactError(
        f"{name!r:.80} is not a model class that transformers {transformers.__version__} builds from a "
        f"{type(config).__name__}; register it with AutoModelForCausalLM before saving and loading"
    )
