"""A compiled weight: its format and the tensors that are stored, and the way back to ordinary numbers.

``pack`` and ``unpack`` are the reference for every other reader of the bytes (kernels, the CPU path).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mixcomp.errors import FormatError
from mixcomp.format import MAX_GROUP_SCALE, ZERO_WIDTHS, Scales
from mixcomp.profiles import group_widths, layout, ordered, profile_widths, stored_columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mixcomp.format import Plane, SiteFormat

#: exponent of what the factor of a row that mixes widths is multiplied by
MIXED_UNIT = -7


def pack_codes(codes: torch.Tensor, fmt: SiteFormat, group_index: torch.Tensor | None = None) -> torch.Tensor:
    """Codes uint8[rows, padded columns], rows in stored and columns in original order -> uint8[bytes]."""
    if group_index is not None:
        arranged = torch.empty_like(codes)
        for rows, _, order in ordered(fmt, group_index):
            arranged[rows] = codes[rows] if order is None else codes[rows][:, stored_columns(fmt, order)]
        codes = arranged
    parts = []
    for plane in fmt.planes():
        bits = (codes[_rows(plane), _columns(plane)] >> plane.shift) & (2**plane.bits - 1)
        per_byte = 8 // plane.bits
        bits = bits.reshape(plane.rows, plane.row_bytes, per_byte)
        packed = torch.zeros_like(bits[..., 0])
        for i in range(per_byte):
            packed |= bits[..., i] << (i * plane.bits)
        parts.append(packed.reshape(-1))
    return torch.cat(parts)


def unpack_codes(packed: torch.Tensor, fmt: SiteFormat, group_index: torch.Tensor | None = None) -> torch.Tensor:
    """uint8[bytes] -> codes uint8[rows, padded columns]; inverse of ``pack_codes``."""
    codes = torch.zeros(fmt.rows, fmt.padded_columns, dtype=torch.uint8, device=packed.device)
    for plane in fmt.planes():
        raw = packed[plane.offset : plane.offset + plane.rows * plane.row_bytes].view(plane.rows, plane.row_bytes, 1)
        shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=packed.device)
        bits = ((raw >> shifts) & (2**plane.bits - 1)).view(plane.rows, plane.columns)
        codes[_rows(plane), _columns(plane)] |= bits << plane.shift
    for rows, _, order in ordered(fmt, group_index):
        if order is not None:
            codes[rows, stored_columns(fmt, order)] = codes[rows].clone()
    return codes


def _rows(plane: Plane) -> slice:
    return slice(plane.first_row, plane.first_row + plane.rows)


def _columns(plane: Plane) -> slice:
    return slice(plane.first_column, plane.first_column + plane.columns)


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Group scales m in 1..16, uint8[rows, groups] -> uint8[rows, ceil(groups / 2)]."""
    return _pack_nibbles(scales - 1)


def unpack_scales(packed: torch.Tensor, groups: int) -> torch.Tensor:
    """Inverse of ``pack_scales`` for rows of ``groups`` groups."""
    return _unpack_nibbles(packed, groups) + 1


def _pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    nibbles = torch.nn.functional.pad(values, (0, values.shape[1] % 2))
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :count]


def pack_zeros(zeros: torch.Tensor, fmt: SiteFormat) -> torch.Tensor:
    """Integer zeros uint8[rows, groups], 0 for groups that have none -> uint8[bytes]."""
    parts = [torch.empty(0, dtype=torch.uint8, device=zeros.device)]
    for rows, segment in fmt.row_ranges():
        bits = fmt.zero_bits(segment)
        if bits:
            parts.append((_pack_nibbles(zeros[rows]) if bits == 4 else zeros[rows]).reshape(-1))
    return torch.cat(parts)


def unpack_zeros(packed: torch.Tensor, fmt: SiteFormat) -> torch.Tensor:
    """Inverse of ``pack_zeros``."""
    zeros = torch.zeros(fmt.rows, fmt.groups, dtype=torch.uint8, device=packed.device)
    start = 0
    for rows, segment in fmt.row_ranges():
        bits = fmt.zero_bits(segment)
        held = -(-fmt.groups * bits // 8)
        if bits:
            raw = packed[start : start + segment.rows * held].view(segment.rows, held)
            zeros[rows] = _unpack_nibbles(raw, fmt.groups) if bits == 4 else raw
            start += segment.rows * held
    return zeros


def levels(codes: torch.Tensor, fmt: SiteFormat, group_index: torch.Tensor | None = None) -> torch.Tensor:
    """Codes uint8[rows, padded] -> int16 levels of two-level scales: odd integers up to 6 bits, -128..127 at 8.

    In rows that mix widths they are those times 2**(7 - width), at 8 bits times 1: multiples of one unit.
    """
    out = codes.to(torch.int16)
    for rows, segment, order in ordered(fmt, group_index):
        if order is not None:
            widths = profile_widths(fmt, segment, order)[None].to(torch.int16)
            unit = per_column(2 ** (8 - widths), fmt, fmt.padded_columns)
            out[rows] = out[rows] * unit - (128 - unit // 2)
        elif segment.width == 8:
            out[rows] -= 128
        else:
            out[rows].mul_(2).sub_(2**segment.width - 1)
    return out


def per_column(values: torch.Tensor, fmt: SiteFormat, columns: int) -> torch.Tensor:
    """[rows, groups] -> [rows, columns]: the value of each column's group."""
    return values.repeat_interleave(fmt.group, 1)[:, :columns]


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """One site as it is stored.  Rows are in stored order (segments); ``row_index`` leads back to output features."""

    fmt: SiteFormat
    codes: torch.Tensor
    scales: torch.Tensor | None
    factors: torch.Tensor
    row_index: torch.Tensor | None = None
    branch_a: torch.Tensor | None = None
    branch_b: torch.Tensor | None = None
    branch_scale: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    group_index: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Stored tensors by name, in the order of ``SiteFormat.tensors``."""
        return {name: getattr(self, name) for name in self.fmt.tensors()}

    @classmethod
    def from_tensors(cls, fmt: SiteFormat, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
        """Check dtype and shape of every tensor against the format."""
        wanted = fmt.tensors()
        if set(tensors) != set(wanted):
            raise FormatError(f"site tensors {sorted(tensors)} differ from the format's {sorted(wanted)}")
        for name, (dtype, shape) in wanted.items():
            got = tensors[name]
            if got.dtype != dtype or tuple(got.shape) != shape:
                raise FormatError(f"tensor {name!r} is {got.dtype}{tuple(got.shape)}, the format wants {dtype}{shape}")
        return cls(fmt, **{"scales": None, **tensors})  # type: ignore[arg-type]

    def stored_bits(self) -> int:
        """Bits counted from the tensors themselves; equals ``fmt.stored_bits()``."""
        return sum(8 * t.nbytes for t in self.tensors().values())

    def unpacked(self) -> torch.Tensor:
        """Codes uint8[rows, padded columns]: rows in stored, columns in original order."""
        return unpack_codes(self.codes, self.fmt, self.group_index)

    def group_widths(self) -> torch.Tensor:
        """Widths uint8[rows, groups]: rows in stored, groups in original order."""
        return group_widths(self.fmt, self.group_index, self.codes.device)

    def group_scales(self) -> torch.Tensor:
        """Group scales m uint8[rows, groups] of a two-level site; FormatError where there are none."""
        if self.scales is None:
            raise FormatError(f"a site with {self.fmt.scales.text} scales has no group scales; read its factors")
        return unpack_scales(self.scales, self.fmt.groups)

    def group_offsets(self) -> torch.Tensor:
        """Offsets float16[rows, groups] of a float-group site, 0 for groups that have none."""
        if self.offsets is None:
            return torch.zeros(self.fmt.rows, self.fmt.groups, dtype=torch.float16, device=self.codes.device)
        held = self.group_widths() == 1
        place = (held.flatten().cumsum(0) - 1).clamp_(min=0).view_as(held)  # a mask would have to wait for the device
        return self.offsets[place] * held

    def integers(self) -> torch.Tensor:
        """The weight up to factors and offsets, int16[rows, columns], rows in stored order.

        Two-level: ``m * level``, where a row mixes widths times 2**(7 - width).  Float-group: code less zero.
        """
        fmt = self.fmt
        if fmt.scales is Scales.TWO_LEVEL:
            level = levels(self.unpacked(), fmt, self.group_index)[:, : fmt.columns]
            return level * per_column(self.group_scales().to(torch.int16), fmt, fmt.columns)
        widths = self.group_widths()
        zeros = (widths == 8).to(torch.int16) * 128
        if self.zeros is not None:
            zeros += unpack_zeros(self.zeros, fmt)
        codes = self.unpacked()[:, : fmt.columns].to(torch.int16)
        signs = per_column(widths == 1, fmt, fmt.columns)
        return torch.where(signs, 2 * codes - 1, codes - per_column(zeros, fmt, fmt.columns))

    def base(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dequantized codes, ``dtype``[rows, columns], stored row order, without the side branch.

        Exact in fp32 (an integer of at most 12 bits times a factor of 11) but for the sum with an offset.
        """
        fmt, out = self.fmt, self.integers().to(dtype)
        if fmt.scales is Scales.TWO_LEVEL:
            return out * self.row_factors(dtype)[:, None]
        out *= per_column(self.factors.to(dtype), fmt, fmt.columns)
        if self.offsets is not None:
            out += per_column(self.group_offsets().to(dtype), fmt, fmt.columns)
        return out

    def row_factors(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What ``integers`` of a two-level site are multiplied by, ``dtype``[rows]."""
        factors = self.factors.to(dtype, copy=True)
        for rows, segment in self.fmt.row_ranges():
            if segment.profile:
                factors[rows] *= 2.0**MIXED_UNIT
        return factors

    def side(self) -> torch.Tensor | None:
        """The side branch multiplied out, fp32[rows, columns], stored row order."""
        if self.branch_a is None or self.branch_b is None or self.branch_scale is None:
            return None
        return (self.branch_a.float() * self.branch_scale) @ self.branch_b.float()

    def dequantize(self) -> torch.Tensor:
        """The weight the site computes with, fp32[rows, columns], rows in output order."""
        weight = self.base()
        side = self.side()
        if side is not None:
            weight = weight + side
        if self.row_index is None:
            return weight
        out = torch.empty_like(weight)
        out[self.row_index.long()] = weight
        return out

    def to(self, device: torch.device | str) -> PackedWeight:
        return PackedWeight.from_tensors(self.fmt, {k: v.to(device) for k, v in self.tensors().items()})


def check_values(weight: PackedWeight) -> None:
    """Semantic checks on stored values (a digest cannot make them).

    Factors and offsets are finite, indices are bijections, groups of one width lie in their order, zeros are codes.
    """
    if not torch.isfinite(weight.factors).all():
        raise FormatError("row factors hold NaN or infinity; they must be finite fp16 numbers")
    if weight.offsets is not None and not torch.isfinite(weight.offsets).all():
        raise FormatError("group offsets hold NaN or infinity; they must be finite fp16 numbers")
    if weight.branch_scale is not None and not torch.isfinite(weight.branch_scale).all():
        raise FormatError("side-branch scales hold NaN or infinity; they must be finite")
    if weight.row_index is not None:
        seen = torch.sort(weight.row_index.long()).values
        if not torch.equal(seen, torch.arange(weight.fmt.rows, device=seen.device)):
            raise FormatError(f"row index is not a permutation of 0..{weight.fmt.rows - 1}")
    _check_groups(weight)


def _check_groups(weight: PackedWeight) -> None:
    fmt = weight.fmt
    for _, segment, order in ordered(fmt, weight.group_index):
        if order is None:
            continue
        if not torch.equal(order.sort().values, torch.arange(fmt.groups, device=order.device)):
            raise FormatError(f"group index {segment.order} is not a permutation of 0..{fmt.groups - 1}")
        (found,), index = layout(profile_widths(fmt, segment, order)[None], fmt.columns, fmt.group)
        if found.profile != segment.profile:
            raise FormatError(f"group index {segment.order} puts the short last group where its profile has none")
        if index is None or not torch.equal(index[0].to(order.device), order):
            raise FormatError(f"group index {segment.order} holds groups of one width out of their order")
    if weight.zeros is not None:
        widths = group_widths(fmt, weight.group_index, weight.zeros.device).int()
        has_zero = torch.isin(widths, torch.tensor(ZERO_WIDTHS, device=widths.device))
        if (unpack_zeros(weight.zeros, fmt).int() >= torch.where(has_zero, 2**widths, 1)).any():
            raise FormatError("zeros exceed the largest code of their group, or belong to a group that has none")


def max_abs_level(width: int) -> int:
    """Largest |level| of a width; with the largest group scale it bounds ``integers()``."""
    return 128 if width == 8 else 2**width - 1


MAX_INTEGER = MAX_GROUP_SCALE * 128
#: largest code of a weight or an activation that is multiplied in 8 bits
INT8_TOP = 127
#: width -> F: of ``integers()`` an 8-bit code counts 512 / F.  The largest even numbers that keep the largest integer within
#: ``INT8_TOP``; rows whose integers are small enough keep them all
INT8_FACTORS = {2: 512, 3: 512, 4: 270, 5: 130, 6: 64, 8: 30}
INT8_ONE = 512
