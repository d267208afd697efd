"""Compiled linears on a GPU: codes and scales as fragments instead of the stored bytes, one copy of either.

``kernels.fragments`` says what fragments are.  They take the place of ``codes`` and ``scales`` where a kernel reads them
(``select.takes_fragments``), are told apart by their type, and lead back to the stored bytes bit for bit.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mixcomp.packed import pack_codes, pack_scales, unpack_codes, unpack_scales

if TYPE_CHECKING:
    from mixcomp.format import SiteFormat

Pair = tuple[torch.Tensor, torch.Tensor]


def are_fragments(codes: torch.Tensor) -> bool:
    """Whether codes are fragments and not stored bytes."""
    return codes.dtype is torch.int32


@torch.no_grad()
def to_fragments(codes: torch.Tensor, scales: torch.Tensor, fmt: SiteFormat) -> Pair:
    """Stored codes and scales uint8 (``SiteFormat.tensors``) -> int32 (``SiteFormat.fragments``), same device."""
    from mixcomp.kernels import fragments

    return fragments.pack(unpack_codes(codes, fmt), unpack_scales(scales, 2 * scales.shape[1]), fmt)


@torch.no_grad()
def to_stored(words: torch.Tensor, nibbles: torch.Tensor, fmt: SiteFormat) -> Pair:
    """Inverse of ``to_fragments``; always new tensors."""
    from mixcomp.kernels import fragments

    codes, scales = fragments.unpack(words, nibbles, fmt)
    return pack_codes(codes, fmt), pack_scales(scales)


#: words -> nibbles, what both were unpacked to, and versions of all four
_shown: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def shown(words: torch.Tensor, nibbles: torch.Tensor, fmt: SiteFormat) -> Pair:
    """``to_stored`` for those who look and save: the same tensors again while they are alive and nothing has changed.

    A module that lies at two paths of a model shows one tensor at both, as it does with buffers.
    """
    if words in _shown:
        *held, versions = _shown[words]
        source, codes, scales = (ref() for ref in held)
        alive = source is nibbles and codes is not None and scales is not None
        if alive and versions == _versions(words, nibbles, codes, scales):
            return codes, scales
    codes, scales = to_stored(words, nibbles, fmt)
    refs = [weakref.ref(tensor) for tensor in (nibbles, codes, scales)]
    _shown[words] = *refs, _versions(words, nibbles, codes, scales)
    return codes, scales


def _versions(*tensors: torch.Tensor) -> list[int]:
    """Counters of writes in place; inference tensors have none."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
