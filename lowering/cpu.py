"""Compiled linears on a CPU: a run-time form made once from the stored bytes, and two ways to use it.

Torch's quantized embedding bags (fbgemm's just-in-time AVX2 and AVX-512 kernels) weigh and add rows of a table of
4- or 8-bit codes.  With one table row per input column and one bag per group of 32 columns::

    bags[g, r] = sum over columns j of group g of x[j] * level[r, j]          one call, fp32 throughout
    y[r]       = sum over groups g of bags[g, r] * scale[r, g]                scale = factor * m, exact in fp32

so group scales cost 1/32 of the work and activations are never rounded.  Bags of single columns expand the levels to
fp32 for a matrix product (``by_gemm``).  Both need no more than one site's numbers at a time.

Form of a site, per weight: 4 bits (rows of width 2-4) or 8 bits (width 5-8) and one bit of scales.  It lives as long as
its ``codes`` tensor and is made again if any stored tensor was written to or exchanged.

Rounding: a level is ``unit * code + offset``, and the bags add ``x * unit * code`` and ``x * offset`` one after the
other, so a sum of n products of width-w rows has the error of 2 n terms of size up to 15 (tables of nibbles) or 128.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mixcomp.format import GROUP
from mixcomp.packed import levels, unpack_codes, unpack_scales

if TYPE_CHECKING:
    from mixcomp.packed import PackedWeight

#: widest rows that fit a table of nibbles
NIBBLE = 4


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Some rows of a weight, transposed: one table row of codes per input column.

    ``data``: uint8[padded columns, bytes], each row followed by its unit and offset (fp16 for nibbles, else fp32);
    ``scale``: fp32[groups, rows].
    """

    data: torch.Tensor
    scale: torch.Tensor
    nibbles: bool

    def bags(self, indices: torch.Tensor, offsets: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """fp32[len(offsets), rows]: sums of ``x[i] * levels[indices[i]]`` over the runs that start at ``offsets``."""
        ops = torch.ops.quantized
        bag = ops.embedding_bag_4bit_rowwise_offsets if self.nibbles else ops.embedding_bag_byte_rowwise_offsets
        return bag.default(self.data, indices, offsets, False, 0, False, x, None, False)  # type: ignore[no-any-return]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x fp32[tokens, columns] -> fp32[tokens, rows]."""
        tokens, columns = x.shape
        sums = self.bags(*_groups(columns, tokens), x.reshape(-1))
        return sums.view(tokens, *self.scale.shape).mul_(self.scale).sum(1)

    def expand(self, columns: int) -> torch.Tensor:
        """The weights as fp32[columns, rows]."""
        each = _each(self.data.shape[0])
        weight = self.bags(each, each, None).view(-1, GROUP, self.scale.shape[1])
        return weight.mul_(self.scale[:, None]).view(-1, self.scale.shape[1])[:columns]


@dataclass(frozen=True, slots=True, eq=False)
class TableForm:
    """What a site computes with: its tables, the way back to output order, its side branch with ``A * scale`` in fp32.

    ``made_from`` and ``versions`` tell whether the stored tensors are still those the form was made from.
    """

    tables: tuple[Table, ...]
    order: torch.Tensor | None  # int64[rows]: place of output feature i in the tables' rows; None: in order
    branch: tuple[torch.Tensor, torch.Tensor] | None  # fp32[rank, columns], fp32[rank, rows]
    made_from: tuple[torch.Tensor | None, ...]
    versions: tuple[int, ...]


def by_bags(x: torch.Tensor, form: TableForm, bias: torch.Tensor | None) -> torch.Tensor:
    """x[tokens, columns] -> [tokens, rows] of x's dtype; reads every table once per token."""
    numbers = x.float()
    return _finish([t.product(numbers) for t in form.tables], numbers, form, bias, x.dtype)


def by_gemm(x: torch.Tensor, form: TableForm, bias: torch.Tensor | None) -> torch.Tensor:
    """The same by fp32 matrix products: each table is expanded, used and dropped."""
    numbers = x.float()
    return _finish([numbers @ t.expand(x.shape[1]) for t in form.tables], numbers, form, bias, x.dtype)


def _finish(
    parts: list[torch.Tensor], x: torch.Tensor, form: TableForm, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if form.order is not None:
        out = out.index_select(1, form.order)
    if form.branch is not None:
        b, a = form.branch
        out = out.addmm_(x @ b.t(), a)
    if bias is not None:
        out += bias
    return out.to(dtype)


_forms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_making = threading.Lock()


def table_form(weight: PackedWeight) -> TableForm:
    """The form of a site, made on first use; safe to call from several threads."""
    form = _forms.get(weight.codes)
    if form is not None and _current(form, weight):
        return form
    with _making:
        form = _forms.get(weight.codes)
        if form is None or not _current(form, weight):
            form = make_form(weight)
            _forms[weight.codes] = form
    return form


def _current(form: TableForm, weight: PackedWeight) -> bool:
    parts = _parts(weight)
    return all(map(_same, form.made_from, parts)) and form.versions == _versions(weight)


def _same(left: object, right: object) -> bool:
    return left is right


def _parts(weight: PackedWeight) -> tuple[torch.Tensor | None, ...]:
    """Everything but ``codes``, the weak key: held by the form, it would never be freed."""
    w = weight
    return w.scales, w.factors, w.row_index, w.branch_a, w.branch_b, w.branch_scale


def _versions(weight: PackedWeight) -> tuple[int, ...]:
    """Counters of writes in place; inference tensors keep none."""
    parts = (weight.codes, *_parts(weight))
    return tuple(p._version for p in parts if p is not None and not p.is_inference())


@torch.no_grad()
def make_form(weight: PackedWeight) -> TableForm:
    """Tables of the narrow and the wide rows, each in output order."""
    fmt = weight.fmt
    narrow = torch.tensor(fmt.row_widths()) <= NIBBLE
    target = torch.arange(fmt.rows) if weight.row_index is None else weight.row_index.long()
    stored = torch.argsort(target)  # stored row of every output feature
    order = torch.empty(fmt.rows, dtype=torch.int64)
    level = levels(unpack_codes(weight.codes, fmt), fmt)
    scale = unpack_scales(weight.scales, fmt.groups).float() * weight.factors.float()[:, None]
    tables, first = [], 0
    for nibbles in (True, False):
        rows = stored[narrow[stored] == nibbles]
        if len(rows):
            tables.append(_table(level[rows], scale[rows], nibbles))
            order[target[rows]] = torch.arange(first, first + len(rows))
            first += tables[-1].scale.shape[1]
    in_order = len(tables) == 1 and first == fmt.rows
    return TableForm(
        tuple(tables), None if in_order else order, _branch(weight, stored), _parts(weight), _versions(weight)
    )


def _table(level: torch.Tensor, scale: torch.Tensor, nibbles: bool) -> Table:
    """level int16[rows, padded columns] and scale fp32[rows, groups] to a table; an odd row of nibbles gets a partner."""
    if not nibbles:
        codes = (level + 128).to(torch.uint8).t()
        return Table(_headed(codes, torch.tensor([1.0, -128.0])), scale.t().contiguous(), nibbles)
    odd = (0, 0, 0, len(level) % 2)
    codes = torch.nn.functional.pad((level + 15) >> 1, odd).to(torch.uint8).t()
    pairs = codes[:, 0::2] | (codes[:, 1::2] << 4)
    header = torch.tensor([2.0, -15.0], dtype=torch.float16)
    return Table(_headed(pairs, header), torch.nn.functional.pad(scale, odd).t().contiguous(), nibbles)


def _headed(codes: torch.Tensor, header: torch.Tensor) -> torch.Tensor:
    """Every table row ends with its unit and offset."""
    return torch.cat((codes, header.view(torch.uint8).expand(len(codes), -1)), 1)


def _branch(weight: PackedWeight, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    if weight.branch_a is None or weight.branch_b is None or weight.branch_scale is None:
        return None
    return weight.branch_b.float(), (weight.branch_a[stored].float() * weight.branch_scale).t().contiguous()


@lru_cache(maxsize=64)
def _groups(columns: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, offsets), int32: a bag for every token and group of columns."""
    indices = torch.arange(columns, dtype=torch.int32).repeat(tokens)
    starts = torch.arange(0, columns, GROUP, dtype=torch.int32)
    return indices, (torch.arange(tokens, dtype=torch.int32)[:, None] * columns + starts).view(-1)


@lru_cache(maxsize=64)
def _each(columns: int) -> torch.Tensor:
    """A bag for every single column."""
    return torch.arange(columns, dtype=torch.int32)
