"""Where the output features of a linear lie in a tensor that was computed from them.

Every dimension is a product of *parts*, most significant first.  A part of stride s > 0 is a digit of the feature's row
number: one step along it is s rows.  A part of stride 0 is anything else: batch, time, the copies of a repeated head.
Grouped-query values with 2 heads of 4 features (8 rows), read by 6 query heads::

    linear            [B, T, 8]         B:0    T:0      8:1
    view              [B, T, 2, 4]      B:0    T:0      2:4      4:1        (size:stride)
    transpose(1, 2)   [B, 2, T, 4]      B:0    2:4      T:0      4:1
    expand, reshape   [B, 6, T, 4]      B:0    2:4 3:0  T:0      4:1
    transpose, view   [B, T, 24]        B:0    T:0      2:4 3:0 4:1

The last line says how 24 columns of the next linear follow 8 rows.  It is the index arithmetic of strided layouts
(as in CuTe's shape:stride algebra), on logical features instead of memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

#: an int, or a sympy expression where the length is dynamic
Size = Any
Sizes = tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """``size`` steps (more than one) of ``stride`` rows each."""

    size: Size
    stride: int


#: the parts of one dimension, and of all dimensions of a tensor
Parts = tuple[Part, ...]
Layout = tuple[Parts, ...]


def sizes_of(shape: Iterable[int | torch.SymInt]) -> Sizes:
    """A shape whose symbolic sizes are plain expressions: comparing those adds no guards."""
    return tuple(_plain(size) for size in shape)


def _plain(size: int | torch.SymInt) -> Size:
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def output_layout(sizes: Sizes) -> Layout:
    """The layout of a linear's output: its last dimension is the rows."""
    return (*(_other(size) for size in sizes[:-1]), _fused([Part(sizes[-1], 1)]))


def _other(size: Size) -> Parts:
    return _fused([Part(size, 0)])


def has_features(parts: Parts) -> bool:
    """Whether moving along a dimension may lead to another row."""
    return any(part.stride for part in parts)


def reshape(layout: Layout, sizes: Sizes) -> Layout | None:
    """The same elements, row-major, under new sizes; None where a new dimension would cut a part unevenly."""
    left = [part for parts in reversed(layout) for part in reversed(parts)]
    out = []
    for size in sizes:
        taken = _take(left, size)
        if taken is None:
            return None
        out.append(_fused(taken))
    return None if left else tuple(out)


def _take(left: list[Part], size: Size) -> list[Part] | None:
    """Remove leading parts (the end of ``left``) that make up ``size``, splitting the last of them if need be."""
    taken = []
    while size != 1:
        if not left:
            return None
        part = left.pop()
        rest = _quotient(size, part.size)
        if rest is not None:
            taken.append(part)
            size = rest
            continue
        low = _quotient(part.size, size)
        if low is None:
            return None
        left.append(Part(low, part.stride))
        taken.append(Part(size, part.stride and part.stride * low))
        size = 1
    return taken


def _quotient(size: Size, by: Size) -> Size | None:
    """``size / by`` if that is whole for every value of the symbols."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if size and size % by == 0 else None
    ratio = size / by
    if ratio.as_numer_denom()[1] != 1:
        return None
    return int(ratio) if ratio.is_number else ratio


def _fused(parts: Iterable[Part]) -> Parts:
    """Normal form: no part of size 1, neighbours that count on as one part."""
    out: list[Part] = []
    for part in parts:
        if part.size == 1:
            continue
        if out and out[-1].stride == part.stride * part.size:
            part = Part(out.pop().size * part.size, part.stride)
        out.append(part)
    return tuple(out)


def broadcast(layout: Layout, sizes: Sizes) -> Layout:
    """Expand to ``sizes``, aligned at the last dimension: what was of size 1 no longer depends on the feature."""
    padded = ((),) * (len(sizes) - len(layout)) + layout
    return tuple(parts or _other(size) for parts, size in zip(padded, sizes, strict=True))


def resize(layout: Layout, before: Sizes, after: Sizes) -> Layout | None:
    """Slicing: dimensions without features may change their size, the others may not."""
    out = []
    for parts, old, new in zip(layout, before, after, strict=True):
        if old != new and has_features(parts):
            return None
        out.append(parts if old == new else _other(new))
    return tuple(out)


def weighted_sum(layout: Layout, sizes: Sizes) -> Layout | None:
    """``p @ v`` for the layout of v, [..., S, d] -> ``sizes`` [..., T, d]; None where features are summed over.

    Leading dimensions may grow by whole copies of each entry (grouped-query attention: head h reads v's head
    ``h // copies``).
    """
    if not 2 <= len(layout) == len(sizes) or has_features(layout[-2]):
        return None
    leading = []
    for parts, size in zip(layout[:-2], sizes, strict=False):
        copies = size
        for part in parts:
            copies = None if copies is None else _quotient(copies, part.size)
        if copies is None:
            return None
        leading.append(_fused([*parts, Part(copies, 0)]))
    return (*leading, _other(sizes[-2]), layout[-1])


def column_blocks(layout: Layout, rows: int) -> tuple[int, int] | None:
    """How the last dimension follows ``rows`` features: (block, repeats), or None if in no simple way.

    Column ``(k * repeats + r) * block + i`` then reads row ``k * block + i``; a permutation of rows carries over to the
    columns if it stays inside blocks.
    """
    if any(has_features(parts) for parts in layout[:-1]):
        return None
    digits = [part for part in layout[-1] if part.stride]
    copies = [i for i, part in enumerate(layout[-1]) if not part.stride]
    left = rows
    for part in digits:
        if part.stride * part.size != left:
            return None
        left = part.stride
    if left != 1 or len(copies) > 1:
        return None
    if not copies:
        return rows, 1
    at = copies[0]
    repeats = layout[-1][at].size
    block = digits[at - 1].stride if at else rows
    return (block, repeats) if isinstance(repeats, int) else None
