"""Codes in the order in which threads multiply them: a layout for the GPU, made once from the stored bytes.

Sixteen rows of one width by 128 columns are a *block*.  Its bytes lie as a warp's tensor-core operand wants them, so a
kernel loads 16 bytes a lane and has, after shifts and masks, the operand in its registers::

    row    in a block = half * 8 + lane // 4                                half of 2
    column in a block = group * 32 + lane % 4 * 8 + k16 * 4 + k2 * 2 + k1

A *unit* (group, half) is what a lane holds of one row and one group: 8 neighbouring codes, four pairs ``f = (k16, k2)``,
the two of a pair (k1) in the same place of the lower and the upper half of a word.  In a plane of ``b`` bits the codes of
unit u and pair f take the bits from ``(u * 4 + f) * b`` on, counted along the halves of a lane's ``2 * b`` words.  A block
holds its planes one after the other, each as vectors of at most four words: [vector][lane][word].

Rows are padded to 16 in every segment and columns to 128, with code 0 and group scale 1.  Group scales (minus 1) lie
apart: one word for every block and ``lane // 4``, four bits a unit, those of the two halves 16 bits apart.

Nothing is lost: ``unpack`` gives back what ``pack`` was given, so a GPU needs to hold no other form of a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mixcomp.format import BLOCK, GROUP, PLANES, blocks

if TYPE_CHECKING:
    from mixcomp.format import SiteFormat

ROWS, COLUMNS = BLOCK
#: words of a block for every bit of width
UNIT = 64
#: (row block, half, lane // 4, column block, group, lane % 4, k16, k2, k1) -> the order within a plane
_ORDER = (0, 3, 2, 5, 4, 1, 6, 7, 8)
_GROUPS = COLUMNS // GROUP


def pack(codes: torch.Tensor, scales: torch.Tensor, fmt: SiteFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8[rows, padded columns] and group scales uint8[rows, groups or one more] (1..16), rows in stored order.

    Returns:
        words int32[sum over segments of blocks * width * 64] and scale words int32[blocks, column blocks, 8], on the
        same device: the shapes of ``SiteFormat.fragments``.
    """
    across = blocks(fmt.columns, COLUMNS)
    words, nibbles = [], []
    for rows, segment in fmt.row_ranges():
        down = blocks(segment.rows, ROWS)
        held = _padded(codes[rows], down * ROWS, across * COLUMNS)
        held = held.view(down, 2, 8, across, _GROUPS, 4, 2, 2, 2).permute(_ORDER).reshape(down, across, 32, 32, 2)
        shift, planes = 0, []
        for bits in PLANES[segment.width]:
            planes.append(_plane((held >> shift) & (2**bits - 1), bits))
            shift += bits
        words.append(torch.cat(planes, -1).flatten())
        m = _padded(scales[rows] - 1, down * ROWS, across * _GROUPS).view(down, 2, 8, across, _GROUPS)
        nibbles.append(_joined(m.permute(0, 3, 2, 1, 4).reshape(down, across, 8, 8), 4))
    return torch.cat(words), torch.cat(nibbles)


def unpack(words: torch.Tensor, nibbles: torch.Tensor, fmt: SiteFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of ``pack``: codes uint8[rows, padded columns], group scales uint8[rows, groups rounded up to even]."""
    across = blocks(fmt.columns, COLUMNS)
    codes, scales = [], []
    start = first = 0
    for _, segment in fmt.row_ranges():
        down = blocks(segment.rows, ROWS)
        size = down * across * UNIT * segment.width
        held = words[start : start + size].view(down, across, UNIT * segment.width)
        start += size
        code = torch.zeros(down, across, 32, 32, 2, dtype=torch.uint8, device=words.device)
        at = shift = 0
        for bits in PLANES[segment.width]:
            code |= _codes(held[..., at : at + UNIT * bits], bits) << shift
            at, shift = at + UNIT * bits, shift + bits
        inverse = sorted(range(9), key=_ORDER.__getitem__)
        code = code.view(down, across, 8, 4, _GROUPS, 2, 2, 2, 2).permute(inverse)
        codes.append(code.reshape(down * ROWS, across * COLUMNS)[: segment.rows, : fmt.padded_columns])
        m = _parted(nibbles[first : first + down], 4).view(down, across, 8, 2, _GROUPS).permute(0, 3, 2, 1, 4)
        scales.append(m.reshape(down * ROWS, across * _GROUPS)[: segment.rows, : fmt.groups + fmt.groups % 2] + 1)
        first += down
    return torch.cat(codes), torch.cat(scales).to(torch.uint8)


def _padded(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0]))


def _plane(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values [.., .., lane, unit and pair, k1] -> words int32[.., .., 64 * bits]."""
    down, across = values.shape[:2]
    halves = _joined(values.reshape(down, across, 32, 2 * bits, 16 // bits, 2).transpose(-1, -2), bits)
    words = halves[..., 0] | (halves[..., 1] << 16)
    each = min(4, 2 * bits)
    return words.view(down, across, 32, -1, each).transpose(2, 3).reshape(down, across, UNIT * bits)


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ``_plane``."""
    down, across = words.shape[:2]
    each = min(4, 2 * bits)
    words = words.view(down, across, -1, 32, each).transpose(2, 3).reshape(down, across, 32, 2 * bits)
    halves = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), -1)
    return _parted(halves, bits, 16).transpose(-1, -2).reshape(down, across, 32, 32, 2).to(torch.uint8)


def _joined(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Small numbers along the last axis into one int32, low bits first."""
    out = torch.zeros_like(values[..., 0], dtype=torch.int32)
    for i in range(values.shape[-1]):
        out |= values[..., i].int() << (bits * i)
    return out


def _parted(words: torch.Tensor, bits: int, of: int = 32) -> torch.Tensor:
    """Inverse of ``_joined`` for the lowest ``of`` bits of every word."""
    return torch.stack([(words >> shift) & (2**bits - 1) for shift in range(0, of, bits)], -1)
