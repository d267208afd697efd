"""Compiled linears on a CPU: a run-time form made once from the stored bytes, and two ways to use it.

Torch's quantized embedding bags (fbgemm's just-in-time AVX2 and AVX-512 kernels) weigh and add rows of a table of
4- or 8-bit codes.  With one table row per input column and one bag per group of 32 columns::

    bags[g, r] = sum over columns j of group g of x[j] * level[r, j]          one call, fp32 throughout
    y[r]       = sum over groups g of bags[g, r] * scale[g, r]                scale = factor * m, exact in fp32

so group scales cost 1/32 of the work, activations are not rounded, and rows lie in output order at no cost.  Bags of
single columns expand the levels to fp32 for a matrix product (``by_gemm``), one site at a time.

Form of a site, per weight: 4 bits where no row is wider, else 8 bits, and one bit of scales.  It lives as long as its
``codes`` tensor, and is made again when a stored tensor was written to or exchanged.

Rounding: the bags add ``x * unit * code`` and ``x * offset`` one after the other, so a sum of n products carries the
error of 2 n terms as large as those of the site's widest row.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from mixcomp.format import GROUP
from mixcomp.packed import levels, unpack_codes

if TYPE_CHECKING:
    from mixcomp.packed import PackedWeight

#: widest rows that fit a table of nibbles
NIBBLE = 4


@dataclass(frozen=True, slots=True, eq=False)
class TableForm:
    """A weight as a table: one table row per input column, rows of the weight in output order.

    ``made_from`` and ``versions`` tell whether the stored tensors are still those the form was made from.
    """

    table: torch.Tensor  # uint8[padded columns, bytes]: codes, then unit and offset
    nibbles: bool  # two codes to a byte, unit and offset in fp16; else one, in fp32
    scale: torch.Tensor  # fp32[groups, rows]: factor * m
    branch: tuple[torch.Tensor, torch.Tensor] | None  # fp32[columns, rank], fp32[rank, rows], the scale in the second
    made_from: tuple[torch.Tensor | None, ...]
    versions: list[int]

    def bags(self, indices: torch.Tensor, offsets: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """fp32[bags, rows]: sums of ``x[i] * level[indices[i]]`` over the runs of i that start at ``offsets``."""
        ops = torch.ops.quantized
        add = ops.embedding_bag_4bit_rowwise_offsets if self.nibbles else ops.embedding_bag_byte_rowwise_offsets
        return add.default(self.table, indices, offsets, False, 0, False, x, None, False)  # type: ignore[no-any-return]

    def expand(self, columns: int) -> torch.Tensor:
        """The weight without its side branch, fp32[columns, rows]."""
        each = _each(len(self.table))
        rows = self.scale.shape[1]
        return self.bags(each, each, None).view(-1, GROUP, rows).mul_(self.scale[:, None]).view(-1, rows)[:columns]

    def finish(self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Side branch, bias, and the only rounding to ``dtype``; ``out`` and ``x`` are fp32."""
        if self.branch is not None:
            out.addmm_(x @ self.branch[0], self.branch[1])
        if bias is not None:
            out += bias
        return out.to(dtype)


def by_bags(x: torch.Tensor, form: TableForm, bias: torch.Tensor | None) -> torch.Tensor:
    """x[tokens, columns] -> [tokens, rows] of x's dtype; reads the table once per token."""
    tokens, columns = x.shape
    numbers = x.float()
    sums = form.bags(*_groups(columns, tokens), numbers.reshape(-1))
    if tokens > 1:
        sums = sums.view(tokens, *form.scale.shape)
    out = sums.mul_(form.scale).sum(-2, keepdim=tokens == 1)
    return form.finish(out, numbers, bias, x.dtype)


def by_gemm(x: torch.Tensor, form: TableForm, bias: torch.Tensor | None) -> torch.Tensor:
    """The same as one fp32 matrix product with the weight expanded for its duration."""
    numbers = x.float()
    return form.finish(numbers @ form.expand(x.shape[1]), numbers, bias, x.dtype)


#: id of a site's ``codes`` -> (the tensor, weakly; its form).  A dict of weak tensor keys takes four times as long.
_forms: dict[int, tuple[weakref.ref[torch.Tensor], TableForm]] = {}
_making = threading.Lock()


def table_form(weight: PackedWeight) -> TableForm:
    """The form of a site, made on first use; safe to call from several threads."""
    form = _find(weight)
    if form is None:
        with _making:
            form = _find(weight) or make_form(weight)
            key = id(weight.codes)
            _forms[key] = weakref.ref(weight.codes, lambda _: _forms.pop(key, None)), form
    return form


def _find(weight: PackedWeight) -> TableForm | None:
    """The form at hand, unless a stored tensor is another or was written to since."""
    codes, form = _forms.get(id(weight.codes), (None, None))
    if codes is None or form is None or codes() is not weight.codes or form.versions != _versions(weight):
        return None
    return form if [*map(id, form.made_from)] == [*map(id, _parts(weight))] else None


def _parts(w: PackedWeight) -> tuple[torch.Tensor | None, ...]:
    """Everything but ``codes``, which a form must not keep alive."""
    return w.scales, w.factors, w.row_index, w.branch_a, w.branch_b, w.branch_scale


def _versions(weight: PackedWeight) -> list[int]:
    """Counters of writes in place; inference tensors have none."""
    parts = (weight.codes, *_parts(weight))
    return [p._version for p in parts if p is not None and not p.is_inference()]


@torch.no_grad()
def make_form(weight: PackedWeight) -> TableForm:
    """Unpack, put rows in output order, transpose."""
    fmt = weight.fmt
    widest = max(segment.width for segment in fmt.segments)
    nibbles = widest <= NIBBLE and fmt.rows % 2 == 0
    unit, offset = (1, -128) if widest == 8 else (2, 1 - 2 ** max(widest, NIBBLE))
    level = levels(unpack_codes(weight.codes, fmt), fmt)
    codes = _in_order(level.sub_(offset).div_(unit, rounding_mode="floor").to(torch.uint8), weight).t()
    if nibbles:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    header = torch.tensor([unit, offset], dtype=torch.float16 if nibbles else torch.float32).view(torch.uint8)
    table = torch.cat((codes, header.expand(len(codes), -1)), 1)
    scale = weight.group_scales().float() * weight.factors.float()[:, None]
    scale = _in_order(scale, weight).t().contiguous()
    return TableForm(table, nibbles, scale, _branch(weight), _parts(weight), _versions(weight))


def _in_order(stored: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Rows in stored order to output order."""
    if weight.row_index is None:
        return stored
    return torch.empty_like(stored).index_copy_(0, weight.row_index.long(), stored)


def _branch(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor] | None:
    if weight.branch_a is None or weight.branch_b is None or weight.branch_scale is None:
        return None
    a = _in_order(weight.branch_a.float() * weight.branch_scale, weight)
    return weight.branch_b.float().t().contiguous(), a.t().contiguous()


@lru_cache(maxsize=64)
def _groups(columns: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, offsets), int32: a bag for every token and group of columns."""
    indices = torch.arange(columns, dtype=torch.int32).repeat(tokens)
    starts = torch.arange(0, columns, GROUP, dtype=torch.int32)
    return indices, (torch.arange(tokens, dtype=torch.int32)[:, None] * columns + starts).view(-1)


@lru_cache(maxsize=64)
def _each(columns: int) -> torch.Tensor:
    """A bag for every single column, int32."""
    return torch.arange(columns, dtype=torch.int32)
