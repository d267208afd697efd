"""A compiled weight: its format and the tensors that are stored, and the way back to ordinary numbers.

``pack`` and ``unpack`` are the reference for every other reader of the bytes (kernels, the CPU path).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mixcomp.errors import FormatError
from mixcomp.format import GROUP, MAX_GROUP_SCALE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mixcomp.format import SiteFormat


def pack_codes(codes: torch.Tensor, fmt: SiteFormat) -> torch.Tensor:
    """Codes uint8[rows, padded columns] in stored row order -> uint8[bytes]."""
    parts = []
    for plane in fmt.planes():
        bits = (codes[plane.first_row : plane.first_row + plane.rows] >> plane.shift) & (2**plane.bits - 1)
        per_byte = 8 // plane.bits
        bits = bits.reshape(plane.rows, plane.row_bytes, per_byte)
        packed = torch.zeros_like(bits[..., 0])
        for i in range(per_byte):
            packed |= bits[..., i] << (i * plane.bits)
        parts.append(packed.reshape(-1))
    return torch.cat(parts)


def unpack_codes(packed: torch.Tensor, fmt: SiteFormat) -> torch.Tensor:
    """uint8[bytes] -> codes uint8[rows, padded columns]; inverse of ``pack_codes``."""
    codes = torch.zeros(fmt.rows, fmt.padded_columns, dtype=torch.uint8, device=packed.device)
    for plane in fmt.planes():
        raw = packed[plane.offset : plane.offset + plane.rows * plane.row_bytes].view(plane.rows, plane.row_bytes, 1)
        shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=packed.device)
        bits = ((raw >> shifts) & (2**plane.bits - 1)).view(plane.rows, fmt.padded_columns)
        codes[plane.first_row : plane.first_row + plane.rows] |= bits << plane.shift
    return codes


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Group scales m in 1..16, uint8[rows, groups] -> uint8[rows, ceil(groups / 2)]."""
    nibbles = torch.nn.functional.pad(scales - 1, (0, scales.shape[1] % 2))
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_scales(packed: torch.Tensor, groups: int) -> torch.Tensor:
    """Inverse of ``pack_scales`` for rows of ``groups`` groups."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :groups] + 1


def levels(codes: torch.Tensor, fmt: SiteFormat) -> torch.Tensor:
    """Codes uint8[rows, padded] -> int16 levels: odd integers up to 6 bits, -128..127 at 8."""
    out = codes.to(torch.int16)
    first = 0
    for segment in fmt.segments:
        rows = out[first : first + segment.rows]
        if segment.width == 8:
            rows -= 128
        else:
            rows.mul_(2).sub_(2**segment.width - 1)
        first += segment.rows
    return out


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """One site as it is stored.  Rows are in stored order (segments); ``row_index`` leads back to output features."""

    fmt: SiteFormat
    codes: torch.Tensor
    scales: torch.Tensor
    factors: torch.Tensor
    row_index: torch.Tensor | None = None
    branch_a: torch.Tensor | None = None
    branch_b: torch.Tensor | None = None
    branch_scale: torch.Tensor | None = None

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
        return cls(fmt, **tensors)

    def stored_bits(self) -> int:
        """Bits counted from the tensors themselves; equals ``fmt.stored_bits()``."""
        return sum(8 * t.nbytes for t in self.tensors().values())

    def integers(self) -> torch.Tensor:
        """``m * level`` as int16[rows, columns] in stored row order: the weight up to its row factor."""
        groups = self.fmt.groups
        m = unpack_scales(self.scales, groups).to(torch.int16)
        lv = levels(unpack_codes(self.codes, self.fmt), self.fmt).view(self.fmt.rows, groups, GROUP)
        return (lv * m[..., None]).view(self.fmt.rows, -1)[:, : self.fmt.columns]

    def base(self) -> torch.Tensor:
        """Dequantized codes, fp32[rows, columns], stored row order, without the side branch."""
        return self.integers().float() * self.factors.float()[:, None]

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
        return PackedWeight(self.fmt, **{k: v.to(device) for k, v in self.tensors().items()})


def check_values(weight: PackedWeight) -> None:
    """Semantic checks on stored values (a digest cannot make them): finite factors, a row index that is a bijection."""
    if not torch.isfinite(weight.factors).all():
        raise FormatError("row factors hold NaN or infinity; they must be finite fp16 numbers")
    if weight.branch_scale is not None and not torch.isfinite(weight.branch_scale).all():
        raise FormatError("side-branch scales hold NaN or infinity; they must be finite")
    if weight.row_index is not None:
        seen = torch.sort(weight.row_index.long()).values
        if not torch.equal(seen, torch.arange(weight.fmt.rows, device=seen.device)):
            raise FormatError(f"row index is not a permutation of 0..{weight.fmt.rows - 1}")


def max_abs_level(width: int) -> int:
    """Largest |level| of a width; with the largest group scale it bounds ``integers()``."""
    return 128 if width == 8 else 2**width - 1


MAX_INTEGER = MAX_GROUP_SCALE * 128
