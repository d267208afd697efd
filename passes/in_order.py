"""Sums in one fixed order, so that equal runs on a GPU give the same plan to the byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def in_order() -> Iterator[None]:
    """Kernels that add in one fixed order: attention's backward pass has a faster one that does not.

    An operator that has no such kernel raises ``RuntimeError`` inside.
    """
    settings: Any = torch.utils.deterministic
    enabled, lenient = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filling = settings.fill_uninitialized_memory
    # cuBLAS is in order on one stream; torch looks for this setting all the same
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=lenient)
        settings.fill_uninitialized_memory = filling
