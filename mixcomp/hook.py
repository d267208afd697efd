"""Registration with transformers that waits until transformers is there.

``import mixcomp`` may not cost the seconds that transformers' quantizers take to import, and may come before or after
``import transformers``.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Let ``from_pretrained`` read our folders: now if transformers has its registry, else as soon as it has."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    try:
        from mixcomp import hf

        hf.register()
    except Exception as error:  # must not break the import of transformers it runs in
        warnings.warn(f"from_pretrained will not read MixComp folders ({error}); use mixcomp.load", stacklevel=2)


class _Waiting(MetaPathFinder):
    """Finds the registry as everybody else does, and registers once it has been executed."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if (
                    "mixcomp.hf" not in sys.modules
                ):  # else it is what imports the registry, half made: its importer registers
                    _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
