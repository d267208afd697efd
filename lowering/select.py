"""Which implementation computes a compiled linear: one pure function of format, dtype, device and token count."""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mixcomp.format import SiteFormat

#: up to this many tokens one kernel reads codes and multiplies; above, cuBLAS earns back what an expansion costs, and
#: 8-bit activations are worth their rounding
MAX_FUSED_TOKENS = 128
#: up to this many tokens embedding bags beat expanding the weight (benchmarks/cpu_decode.py --tokens)
MAX_BAG_TOKENS = 8
#: sums of more products of 8-bit integers may not fit the 32 bits that tensor cores add up in
MAX_INT8_COLUMNS = 2**31 // 127**2
#: below this many columns there are too few terms for the bags' extra rounding to vanish in the sum's own (see ``cpu``)
MIN_BAG_COLUMNS = 64


class Path(Enum):
    """An implementation of ``mixcomp::mixed_linear``."""

    TRITON = "triton"  #: ``kernels.launch.mixed_linear``: one kernel reads the codes
    TRITON_GEMM = "triton-gemm"  #: ``kernels.launch.expanded_linear``: expand this one weight, cuBLAS, forget it
    TRITON_INT8 = "triton-int8"  #: ``kernels.launch.int8_linear``: the same with 8-bit integers on both sides
    CPU_BAGS = "cpu-bags"  #: ``cpu.by_bags``: sums per column group straight from a table of codes
    CPU_GEMM = "cpu-gemm"  #: ``cpu.by_gemm``: expand this one weight to fp32, multiply, forget it
    INT8 = "int8"  #: ``int8``: activations of 8 bits in plain torch, any device
    REFERENCE = "reference"  #: ``reference``: dequantize and multiply in plain torch, any device


def choose_path(
    device_type: str, dtype: torch.dtype, fmt: SiteFormat, tokens: int, activations: str = "native"
) -> Path:
    """The implementation for ``tokens`` rows of activations of ``dtype`` on a device type such as ``"cuda"``.

    Whether they are rounded depends on ``activations`` (``config.ACTIVATIONS``) and ``tokens`` alone.
    """
    return _decide(device_type, dtype, fmt, tokens, activations)[0]


def explain(device_type: str, dtype: torch.dtype, fmt: SiteFormat, tokens: int, activations: str = "native") -> str:
    """``choose_path`` with its reason, e.g. ``reference: triton is not installed``."""
    path, reason = _decide(device_type, dtype, fmt, tokens, activations)
    return f"{path.value}: {reason}"


def takes_fragments(device_type: str, fmt: SiteFormat) -> bool:
    """Whether a site on such a device is held as fragments (``gpu``): where a kernel reads them."""
    return choose_path(device_type, torch.float16, fmt, 1) is Path.TRITON


def _decide(device_type: str, dtype: torch.dtype, fmt: SiteFormat, tokens: int, activations: str) -> tuple[Path, str]:
    if activations == "int8" and tokens > MAX_FUSED_TOKENS:
        plain, reason = _decide(device_type, dtype, fmt, tokens, "native")
        if plain is Path.TRITON_GEMM and fmt.columns <= MAX_INT8_COLUMNS:
            return Path.TRITON_INT8, f"more than {MAX_FUSED_TOKENS} tokens are multiplied in 8-bit integers"
        return Path.INT8, reason if plain is Path.REFERENCE else "no fast path multiplies these 8-bit integers"
    # Whoever computes in fp64 wants the digits: every fast path sums in fp32.
    if dtype is torch.float64:
        return Path.REFERENCE, "fast paths sum in fp32, the activations are fp64"
    if fmt.departure:
        return Path.REFERENCE, f"no fast path reads {fmt.departure}"
    if device_type == "cuda":
        return _decide_on_gpu(tokens)
    if device_type != "cpu":
        return Path.REFERENCE, f"there is no kernel for {device_type}"
    if not bags_available():
        return Path.REFERENCE, "this build of torch has no quantized embedding bags"
    # A bag reads the whole table once per token, an expansion costs as much as several tokens whatever their number.
    if tokens > MAX_BAG_TOKENS:
        return Path.CPU_GEMM, f"more than {MAX_BAG_TOKENS} tokens are worth an fp32 expansion of the weight"
    if fmt.columns < MIN_BAG_COLUMNS:
        return Path.CPU_GEMM, f"sums of fewer than {MIN_BAG_COLUMNS} columns need every bit of fp32"
    return Path.CPU_BAGS, "few tokens: sums straight from a table of codes"


def _decide_on_gpu(tokens: int) -> tuple[Path, str]:
    if not triton_installed():
        return Path.REFERENCE, "triton is not installed"
    if torch.version.hip:
        return Path.REFERENCE, "the kernels hold instructions of NVIDIA's GPUs"
    if tokens > MAX_FUSED_TOKENS:
        return Path.TRITON_GEMM, f"more than {MAX_FUSED_TOKENS} tokens are worth an expansion of the weight"
    return Path.TRITON, "codes are read by one kernel"


@lru_cache(maxsize=1)
def triton_installed() -> bool:
    """Whether triton can be imported; it is not imported here."""
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def bags_available() -> bool:
    """Whether torch has the operators that ``cpu`` is built on."""
    ops = torch.ops.quantized
    return hasattr(ops, "embedding_bag_4bit_rowwise_offsets") and hasattr(ops, "embedding_bag_byte_rowwise_offsets")
