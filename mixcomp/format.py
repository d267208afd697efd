"""The stored format, version 1, as data: what bytes a compiled linear consists of and where each of them lies.

A site (one linear) is a list of *segments*, runs of stored rows that share a width, or a *profile* of several widths
along the columns.  Columns come in groups of 32 (64, 128).  Per row and group a code ``c`` of ``width`` bits and a 4-bit
group scale ``m`` (1..16) stand for the weight

    w = factor[row] * m[row, group] * level(c),      level(c) = 2 c - (2**width - 1)   (mid-rise, width <= 6)
                                                     level(c) = c - 128                (mid-tread, width 8)

with one fp16 ``factor`` per row ("two-level" scales).  Mid-rise levels are the odd integers: no zero level, and
``m * level`` is an integer of at most 11 bits, exact in fp16.  Rows that mix widths need steps that one factor serves:

    w = factor[row] * 2**-7 * (m * level(c) * 2**(7 - width))      a step is factor * m / 2**(width - 1),
    w = factor[row] * 2**-7 * (m * level(c))                       at 8 bits too

again an integer of at most 12 bits, and one exact product.  With "float-group" scales the fp16 factor stands for a row
and a group:

    w = factor[row, group] * (c - zero[row, group])                 width 2 to 6, zero an integer of ``width`` bits
    w = factor[row, group] * (c - 128)                              width 8, no zero
    w = factor[row, group] * (2 c - 1) + offset[row, group]         width 1, offset fp16

Tensors of a site (see ``SiteFormat.tensors``)::

    codes         uint8[bytes]             bit planes, segment after segment, width after width; little-endian bits
                                           along a row; a segment with a profile holds its groups by ascending width
    scales        uint8[rows, groups/2]    two-level: two group scales m - 1 to a byte, even group in the low nibble
    factors       float16[rows]            two-level; float-group: [rows, groups]
    zeros         uint8[bytes]             float-group, segment after segment: two to a byte as in ``scales`` where no
                                           group with a zero is wider than 4 bits, else one; 0 for groups without one
    offsets       float16[n]               float-group: of the groups of width 1, row after row
    group_index   uint8|uint16[orders, groups]   stored group -> original group, one row for every profile
    row_index     int16|int32[rows]        stored row -> output feature; only where rows have to be scattered
    branch_a      int8[rows, rank]         side branch: + branch_scale * (branch_a @ branch_b)
    branch_b      int8[rank, columns]
    branch_scale  float32[rank]

All but ``codes`` lies in original group order, as the activations do.  A row of codes is padded to 32 columns (not to a
whole group: that would cost a 576-column row of 128-column groups a tenth), at the end of its last original group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from mixcomp.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

VERSION = 1
#: what the default allocation chooses among
WIDTHS = (2, 3, 4, 5, 6, 8)
#: what a format may hold
ALL_WIDTHS = (1, *WIDTHS)
GROUP = 32
#: columns that a group may have
GROUPS = (32, 64, 128)
MAX_GROUP_SCALE = 16
MAX_RANK = 256

#: bits of each plane, low bits first: a 5-bit code is a 4-bit plane and a 1-bit plane
PLANES: Mapping[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
#: widths whose float-group has an integer zero
ZERO_WIDTHS = (2, 3, 4, 5, 6)
#: rows and columns of a block of codes in the form that a GPU holds (``kernels.fragments``)
BLOCK = (16, 128)

#: every tensor that a site may store, as the operator takes them
NAMES = (
    "codes", "scales", "factors", "row_index", "branch_a", "branch_b", "branch_scale", "zeros", "offsets", "group_index",
)  # fmt: skip


class Scales(IntEnum):
    """Kinds of scales; the numbers are those of ``<site>/scale_kind``."""

    TWO_LEVEL = 0
    FLOAT_GROUP = 1

    @property
    def text(self) -> str:
        return self.name.lower().replace("_", "-")

    @classmethod
    def _missing_(cls, value: object) -> Scales:
        raise FormatError(f"kind of scales {value!r} is none of {[int(one) for one in cls]}: give one of them")


@dataclass(frozen=True, slots=True)
class Segment:
    """``rows`` consecutive stored rows whose codes are ``width`` bits wide.

    With a ``profile`` the rows mix widths: (width, columns) pairs, widths ascending; ``width`` is then the widest, and
    ``order`` the row of ``group_index`` that says where the groups come from.
    """

    rows: int
    width: int
    profile: tuple[tuple[int, int], ...] = ()
    order: int = 0

    def __post_init__(self) -> None:
        for width in (self.width, *(w for w, _ in self.profile)):
            if width not in ALL_WIDTHS:
                raise FormatError(f"segment width {width!r} is not one of {ALL_WIDTHS}")
        if not isinstance(self.rows, int) or self.rows < 1:
            raise FormatError(f"segment rows {self.rows!r} must be a positive integer")
        widths = [w for w, _ in self.profile]
        if self.profile and (len(widths) < 2 or widths != sorted({*widths}) or widths[-1] != self.width):
            raise FormatError(f"profile {self.profile} must have two or more ascending widths up to {self.width}")
        if any(columns < 1 for _, columns in self.profile) or self.order < 0 or (self.order and not self.profile):
            raise FormatError(
                f"profile {self.profile} with order {self.order} holds no columns, or order is not its own"
            )

    @property
    def label(self) -> str:
        """``"4"``, or ``"2+4"`` for rows that mix widths."""
        return "+".join(str(w) for w, _ in self.profile) or str(self.width)


@dataclass(frozen=True, slots=True)
class Plane:
    """One bit plane of one width of one segment: bytes ``offset .. offset + rows * row_bytes`` of ``codes``.

    Its columns start at ``first_column`` of the stored row.
    """

    first_row: int
    rows: int
    bits: int
    shift: int
    offset: int
    row_bytes: int
    first_column: int = 0

    @property
    def columns(self) -> int:
        return self.row_bytes * 8 // self.bits


@dataclass(frozen=True, slots=True)
class SiteFormat:
    """The layout of one site.  Everything about its bytes follows from these few integers.

    ``rows`` x ``columns`` is the weight's shape; a row is padded to a multiple of 32 columns with code 0.
    ``scatter`` says that a row index is stored; without it stored row i is output feature i.
    """

    rows: int
    columns: int
    segments: tuple[Segment, ...]
    scatter: bool = False
    rank: int = 0
    group: int = GROUP
    scales: Scales = Scales.TWO_LEVEL
    #: what the default format does not have, in words, or None; asked at every call, so it is found once
    departure: str | None = field(init=False, compare=False, repr=False)
    #: formats are looked up at every launch, and hashing many segments takes longer than the launch
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise FormatError(f"a site of {self.rows} x {self.columns} holds no weight; rows and columns must be >= 1")
        held = sum(s.rows for s in self.segments)
        if held != self.rows:
            raise FormatError(f"segments hold {held} rows, the weight has {self.rows}")
        if not 0 <= self.rank <= min(self.rows, self.columns, MAX_RANK):
            raise FormatError(f"side-branch rank {self.rank} is outside 0..{min(self.rows, self.columns, MAX_RANK)}")
        if self.group not in GROUPS:
            raise FormatError(f"group of {self.group!r} columns: a group has one of {GROUPS}")
        orders: list[tuple[tuple[int, int], ...]] = []
        for segment in (s for s in self.segments if s.profile):
            parts = [columns for _, columns in segment.profile]
            short = [columns for columns in parts if columns % self.group]
            if sum(parts) != self.columns or len(short) > 1:
                raise FormatError(f"profile {segment.profile} is no {self.columns} columns in groups of {self.group}")
            if segment.order == len(orders):
                orders.append(segment.profile)
            if segment.order >= len(orders) or orders[segment.order] != segment.profile:
                raise FormatError(
                    f"order {segment.order} of profile {segment.profile}: orders count from 0 as they come"
                )
        object.__setattr__(self, "departure", self._departure())
        form = (self.rows, self.columns, self.segments, self.scatter, self.rank, self.group, int(self.scales))
        object.__setattr__(self, "_hash", hash(form))

    def __hash__(self) -> int:
        return self._hash

    @property
    def groups(self) -> int:
        """Column groups per row, a short last one included."""
        return -(-self.columns // self.group)

    @property
    def padded_columns(self) -> int:
        return _padded(self.columns)

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def index_dtype(self) -> torch.dtype:
        return torch.int16 if self.rows <= 2**15 else torch.int32

    def _departure(self) -> str | None:
        if self.scales is not Scales.TWO_LEVEL:
            return f"{self.scales.text} scales"
        if self.group != GROUP:
            return f"groups of {self.group} columns"
        if any(s.profile for s in self.segments):
            return "several widths along a row"
        return "rows of 1 bit" if any(s.width not in WIDTHS for s in self.segments) else None

    def row_ranges(self) -> Iterator[tuple[slice, Segment]]:
        """Every segment with the stored rows it holds."""
        first = 0
        for segment in self.segments:
            yield slice(first, first + segment.rows), segment
            first += segment.rows

    def runs(self, segment: Segment) -> tuple[tuple[int, int], ...]:
        """(width, columns) of a segment in storage order."""
        return segment.profile or ((segment.width, self.columns),)

    def group_runs(self, segment: Segment) -> tuple[tuple[int, int], ...]:
        """(width, groups) of a segment in storage order; only the last original group may be short."""
        return tuple((width, -(-columns // self.group)) for width, columns in self.runs(segment))

    def planes(self) -> Iterator[Plane]:
        """Every bit plane in storage order."""
        offset = 0
        for rows, segment in self.row_ranges():
            first_column = 0
            for width, columns in self.runs(segment):
                shift = 0
                for bits in PLANES[width]:
                    row_bytes = _padded(columns) * bits // 8
                    yield Plane(rows.start, segment.rows, bits, shift, offset, row_bytes, first_column)
                    offset += segment.rows * row_bytes
                    shift += bits
                first_column += _padded(columns)

    def zero_bits(self, segment: Segment) -> int:
        """Bits of a stored zero in the rows of a segment: 4, 8, or 0 where there is none."""
        held = [width for width, _ in self.runs(segment) if width in ZERO_WIDTHS]
        return 0 if not held else 4 if max(held) <= 4 else 8

    def row_widths(self) -> list[int]:
        """Width of every stored row; the widest where a row has several."""
        return [s.width for s in self.segments for _ in range(s.rows)]

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of everything stored for the site, in storage order."""
        code_bytes = sum(p.rows * p.row_bytes for p in self.planes())
        out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"codes": (torch.uint8, (code_bytes,))}
        if self.scales is Scales.TWO_LEVEL:
            out["scales"] = (torch.uint8, (self.rows, -(-self.groups // 2)))
            out["factors"] = (torch.float16, (self.rows,))
        else:
            out["factors"] = (torch.float16, (self.rows, self.groups))
            zeros = sum(s.rows * -(-self.groups * self.zero_bits(s) // 8) for s in self.segments)
            offsets = sum(s.rows * n for s in self.segments for width, n in self.group_runs(s) if width == 1)
            out |= {"zeros": (torch.uint8, (zeros,))} if zeros else {}
            out |= {"offsets": (torch.float16, (offsets,))} if offsets else {}
        orders = 1 + max((s.order for s in self.segments if s.profile), default=-1)
        if orders:
            out["group_index"] = (torch.uint8 if self.groups <= 2**8 else torch.uint16, (orders, self.groups))
        if self.scatter:
            out["row_index"] = (self.index_dtype, (self.rows,))
        if self.rank:
            out["branch_a"] = (torch.int8, (self.rows, self.rank))
            out["branch_b"] = (torch.int8, (self.rank, self.columns))
            out["branch_scale"] = (torch.float32, (self.rank,))
        return out

    def fragments(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The same for a site of the default format on a GPU, which holds codes and scales as ``kernels.fragments``."""
        down = [(blocks(s.rows, BLOCK[0]), s.width) for s in self.segments]
        across = blocks(self.columns, BLOCK[1])
        words = sum(count * width for count, width in down) * across * BLOCK[0] * BLOCK[1] // 32
        scales = sum(count for count, _ in down), across, 8
        return self.tensors() | {"codes": (torch.int32, (words,)), "scales": (torch.int32, scales)}

    def stored_bits(self) -> int:
        """Bits of all tensors of the site, padding included.  The one definition of what a site costs."""
        return sum(8 * dtype.itemsize * prod(shape) for dtype, shape in self.tensors().values())

    def payload_bits(self) -> int:
        """Bits of the codes of real weights only (no scales, no padding): what papers quote."""
        return sum(s.rows * width * columns for s in self.segments for width, columns in self.runs(s))

    def bits(self, count: str) -> int:
        """Bits as a budget counts them: ``"stored"`` or ``"payload"``."""
        return self.payload_bits() if count == "payload" else self.stored_bits()

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``group`` and ``scales`` are given where they are not the default."""
        out: dict[str, Any] = {
            "rows": self.rows,
            "columns": self.columns,
            "segments": [_segment_json(s) for s in self.segments],
            "scatter": self.scatter,
            "rank": self.rank,
        }
        out |= {"group": self.group} if self.group != GROUP else {}
        return out | ({"scales": self.scales.text} if self.scales is not Scales.TWO_LEVEL else {})

    @classmethod
    def from_json(cls, data: object) -> SiteFormat:
        """Read what ``to_json`` wrote; anything else is a ``FormatError`` that names the field."""
        wanted = {"rows": int, "columns": int, "segments": list, "scatter": bool, "rank": int}
        optional = {"group": int, "scales": str}
        if not isinstance(data, dict) or not wanted.keys() <= data.keys() <= wanted.keys() | optional.keys():
            raise FormatError(f"a site format has the fields {sorted(wanted)}, got {data!r:.200}")
        for name, kind in (wanted | optional).items():
            if name in data and type(data[name]) is not kind:
                raise FormatError(f"site format field {name!r} must be {kind.__name__}, got {data[name]!r:.200}")
        segments = tuple(_segment(item) for item in data["segments"])
        scales = {kind.text: kind for kind in Scales}.get(data.get("scales", Scales.TWO_LEVEL.text))
        if scales is None:
            raise FormatError(
                f"site format field 'scales' is one of {[k.text for k in Scales]}, got {data['scales']!r}"
            )
        group = data.get("group", GROUP)
        out = cls(data["rows"], data["columns"], segments, data["scatter"], data["rank"], group, scales)
        if out.to_json() != data:
            raise FormatError(f"site format spells out a default: {data!r:.200}; leave the field out")
        return out

    def constants(self) -> list[int]:
        """Segments as the operator takes them: rows and width, or rows, 0, order, number of pairs, pairs."""
        out: list[int] = []
        for s in self.segments:
            pairs = [n for pair in s.profile for n in pair]
            out += [s.rows, 0, s.order, len(s.profile), *pairs] if s.profile else [s.rows, s.width]
        return out


def from_constants(
    constants: Sequence[int], columns: int, scatter: bool, rank: int, group: int = GROUP, scales: int = 0
) -> SiteFormat:
    """The format that the constants of an operator call describe; inverse of ``SiteFormat.constants``.

    Raises:
        FormatError: they describe none.
    """
    segments: list[Segment] = []
    numbers = iter(constants)
    try:
        for rows in numbers:
            width, order, profile = next(numbers), 0, []
            if width == 0:
                order = next(numbers)
                profile = [(next(numbers), next(numbers)) for _ in range(next(numbers))]
            segments.append(Segment(rows, width or max(profile)[0], tuple(profile), order))
    except (StopIteration, RuntimeError, ValueError) as error:
        raise FormatError(f"constants {list(constants)[:20]} describe no segments") from error
    return SiteFormat(sum(s.rows for s in segments), columns, tuple(segments), scatter, rank, group, Scales(scales))


def blocks(count: int, size: int) -> int:
    """How many blocks ``count`` rows or columns take."""
    return -(-count // size)


def _padded(columns: int) -> int:
    """Columns that codes are stored for: a multiple of 32, so that every plane consists of whole words."""
    return -(-columns // GROUP) * GROUP


def _segment_json(segment: Segment) -> list[Any]:
    if not segment.profile:
        return [segment.rows, segment.width]
    return [segment.rows, [list(pair) for pair in segment.profile], segment.order]


def _segment(item: object) -> Segment:
    match item:
        case [int(rows), int(width)] if bool not in (type(rows), type(width)):
            return Segment(rows, width)
        case [int(rows), list(pairs), int(order)] if pairs and bool not in (type(rows), type(order)):
            if all(isinstance(p, list) and len(p) == 2 and all(type(n) is int for n in p) for p in pairs):
                profile = tuple((width, columns) for width, columns in pairs)
                return Segment(rows, max(profile)[0], profile, order)
    raise FormatError(f"site format: 'segments' holds [rows, width] pairs or [rows, profile, order], got {item!r:.200}")


def runs(widths: list[int]) -> tuple[Segment, ...]:
    """Segments of a list of row widths: one per run of equal widths."""
    return tuple(Segment(len(list(rows)), width) for width, rows in groupby(widths))
