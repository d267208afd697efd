"""The stored format, version 1, as data: what bytes a compiled linear consists of and where each of them lies.

A site (one linear) is a list of *segments*, runs of stored rows that share a width.  Per row and group of 32 columns
a code ``c`` of ``width`` bits and a 4-bit group scale ``m`` (1..16) stand for the weight

    w = factor[row] * m[row, group] * level(c),      level(c) = 2 c - (2**width - 1)   (mid-rise, width <= 6)
                                                     level(c) = c - 128                (mid-tread, width 8)

with one fp16 ``factor`` per row ("two-level" scales).  Mid-rise levels are the odd integers: no zero level, and
``m * level`` is an integer of at most 11 bits, exact in fp16.

Tensors of a site (see ``SiteFormat.tensors``)::

    codes         uint8[bytes]             bit planes, segment after segment; little-endian bits along a row
    scales        uint8[rows, groups/2]    two group scales m - 1 to a byte, even group in the low nibble
    factors       float16[rows]
    row_index     int16|int32[rows]        stored row -> output feature; only where rows have to be scattered
    branch_a      int8[rows, rank]         side branch: + branch_scale * (branch_a @ branch_b)
    branch_b      int8[rank, columns]
    branch_scale  float32[rank]
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from mixcomp.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VERSION = 1
WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP = 32
MAX_GROUP_SCALE = 16
MAX_RANK = 256

#: bits of each plane, low bits first: a 5-bit code is a 4-bit plane and a 1-bit plane
PLANES: Mapping[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


@dataclass(frozen=True, slots=True)
class Segment:
    """``rows`` consecutive stored rows whose codes are ``width`` bits wide."""

    rows: int
    width: int

    def __post_init__(self) -> None:
        if self.width not in WIDTHS:
            raise FormatError(f"segment width {self.width!r} is not one of {WIDTHS}")
        if not isinstance(self.rows, int) or self.rows < 1:
            raise FormatError(f"segment rows {self.rows!r} must be a positive integer")


@dataclass(frozen=True, slots=True)
class Plane:
    """One bit plane of one segment: bytes ``offset .. offset + rows * row_bytes`` of ``codes``."""

    first_row: int
    rows: int
    bits: int
    shift: int
    offset: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class SiteFormat:
    """The layout of one site.  Everything about its bytes follows from these few integers.

    ``rows`` x ``columns`` is the weight's shape; the last group of a row is padded to 32 columns with code 0.
    ``scatter`` says that a row index is stored; without it stored row i is output feature i.
    """

    rows: int
    columns: int
    segments: tuple[Segment, ...]
    scatter: bool = False
    rank: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise FormatError(f"a site of {self.rows} x {self.columns} holds no weight; rows and columns must be >= 1")
        held = sum(s.rows for s in self.segments)
        if held != self.rows:
            raise FormatError(f"segments hold {held} rows, the weight has {self.rows}")
        if not 0 <= self.rank <= min(self.rows, self.columns, MAX_RANK):
            raise FormatError(f"side-branch rank {self.rank} is outside 0..{min(self.rows, self.columns, MAX_RANK)}")

    @property
    def groups(self) -> int:
        """Column groups per row, the padded last one included."""
        return -(-self.columns // GROUP)

    @property
    def padded_columns(self) -> int:
        return self.groups * GROUP

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def index_dtype(self) -> torch.dtype:
        return torch.int16 if self.rows <= 2**15 else torch.int32

    def planes(self) -> Iterator[Plane]:
        """Every bit plane in storage order."""
        offset = first = 0
        for segment in self.segments:
            shift = 0
            for bits in PLANES[segment.width]:
                row_bytes = self.padded_columns * bits // 8
                yield Plane(first, segment.rows, bits, shift, offset, row_bytes)
                offset += segment.rows * row_bytes
                shift += bits
            first += segment.rows

    def row_widths(self) -> list[int]:
        """Width of every stored row."""
        return [s.width for s in self.segments for _ in range(s.rows)]

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of everything stored for the site, in storage order."""
        code_bytes = sum(p.rows * p.row_bytes for p in self.planes())
        out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (code_bytes,)),
            "scales": (torch.uint8, (self.rows, -(-self.groups // 2))),
            "factors": (torch.float16, (self.rows,)),
        }
        if self.scatter:
            out["row_index"] = (self.index_dtype, (self.rows,))
        if self.rank:
            out["branch_a"] = (torch.int8, (self.rows, self.rank))
            out["branch_b"] = (torch.int8, (self.rank, self.columns))
            out["branch_scale"] = (torch.float32, (self.rank,))
        return out

    def stored_bits(self) -> int:
        """Bits of all tensors of the site, padding included.  The one definition of what a site costs."""
        return sum(8 * dtype.itemsize * prod(shape) for dtype, shape in self.tensors().values())

    def payload_bits(self) -> int:
        """Bits of the codes of real weights only (no scales, no padding): what papers quote."""
        return self.columns * sum(s.rows * s.width for s in self.segments)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "columns": self.columns,
            "segments": [[s.rows, s.width] for s in self.segments],
            "scatter": self.scatter,
            "rank": self.rank,
        }

    @classmethod
    def from_json(cls, data: object) -> SiteFormat:
        """Read what ``to_json`` wrote; anything else is a ``FormatError`` that names the field."""
        wanted = {"rows": int, "columns": int, "segments": list, "scatter": bool, "rank": int}
        if not isinstance(data, dict) or set(data) != set(wanted):
            raise FormatError(f"a site format has the fields {sorted(wanted)}, got {data!r:.200}")
        for name, kind in wanted.items():
            if type(data[name]) is not kind:
                raise FormatError(f"site format field {name!r} must be {kind.__name__}, got {data[name]!r:.200}")
        for pair in data["segments"]:
            if not (isinstance(pair, list) and len(pair) == 2 and all(type(v) is int for v in pair)):
                raise FormatError(f"site format field 'segments' holds [rows, width] pairs, got {pair!r:.200}")
        segments = tuple(Segment(rows, width) for rows, width in data["segments"])
        return cls(data["rows"], data["columns"], segments, data["scatter"], data["rank"])


def runs(widths: list[int]) -> tuple[Segment, ...]:
    """Segments of a list of row widths: one per run of equal widths."""
    out: list[Segment] = []
    for width in widths:
        if out and out[-1].width == width:
            out[-1] = Segment(out[-1].rows + 1, width)
        else:
            out.append(Segment(1, width))
    return tuple(out)
