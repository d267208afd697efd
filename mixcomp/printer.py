"""The one text form of a program: for people, golden tests, dumps, diffs and error messages alike.

::

    %0 = input(input_ids) : i64[s0,s1]
    %1 = aten.embedding(@model.embed_tokens.weight, %0) : bf16[s0,s1,2048]
    %2 = linear(%1, @layers.0.q_proj) : bf16[s0,s1,2048] {4x1920 8x128 rank 0 scatter}
    return %2

One line per node; weights are named where they are used.  Below the graph stand the sites in graph order, the
tensor table and the parameters, tensors as ``f32[2048]#a1b2c3d4`` (dtype, shape, first bytes of the sha256 of their
values).  The text is the same in every process: no addresses, no times, no dict order, symbolic sizes numbered as
they appear.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import fx

from mixcomp.format import GROUP, Scales, Segment
from mixcomp.profiles import layout, profiles
from mixcomp.program import META, Program, Site

#: bytes hashed at once; tensors are streamed, so a digest never needs room for a second copy
CHUNK_BYTES = 1 << 24
#: tensors up to this size are always hashed whole; of larger ones ``Digests.SAMPLED`` takes blocks
WHOLE_BYTES = 1 << 16
BLOCKS, BLOCK_BYTES = 16, 1 << 12
#: segments shown on a node's line
SHOWN_SEGMENTS = 8

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


class Digests(Enum):
    """How much of every tensor goes into its digest."""

    WHOLE = "#"  #: every byte
    SAMPLED = "~"  #: of large tensors evenly spaced blocks, marked ``~``: seconds for a model of any size
    NONE = ""  #: dtype and shape only, for texts that must not depend on floating-point details


def render(program: Program, digests: Digests = Digests.SAMPLED) -> str:
    """The whole program as text, facts first; ends with a newline."""
    facts = " ".join(sorted(f.value for f in program.facts))
    return f"facts: {facts or 'none'}\n{body(program, digests)}"


def body(program: Program, digests: Digests = Digests.SAMPLED) -> str:
    """``render`` without the facts: what a pass changed is a difference here."""
    text = Text(program)
    lines = [line for line in (text.line(n) for n in program.graph_module.graph.nodes) if line]
    lines += ["sites", *("  " + text.site(s) for s in _graph_order(program))]
    tables = {"tensors": program.tensors, "parameters": module_tensors(program.graph_module)}
    for title, table in tables.items():
        lines += [title, *(f"  {escape(k)} : {tensor_text(table[k], digests)}" for k in sorted(table))]
    return "\n".join(lines) + "\n"


def digest(program: Program, digests: Digests = Digests.WHOLE) -> str:
    """sha256 (hex) of ``body``: equal for equal programs, in every process."""
    return hashlib.sha256(body(program, digests).encode()).hexdigest()


def window(program: Program, node: fx.Node, lines: int = 3) -> str:
    """``lines`` printed lines around ``node``, the node itself marked ``>``; works on broken graphs too."""
    text = Text(program)
    shown = [(n, text.line(n) or f"@{escape(str(n.target))}") for n in program.graph_module.graph.nodes]
    at = next((i for i, (n, _) in enumerate(shown) if n is node), 0)
    first = max(0, min(at - lines // 2, len(shown) - lines))
    return "\n".join(f"{'>' if n is node else ' '} {line}" for n, line in shown[first : first + lines])


def dtype_text(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``f32``; rare types keep torch's own word."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def tensor_text(tensor: torch.Tensor, digests: Digests) -> str:
    """``f32[2048]#a1b2c3d4`` for a real tensor of any device; ``i64[]#a1b2c3d4 = 7`` for a single number."""
    shape = ",".join(str(d) for d in tensor.shape)
    head = f"{dtype_text(tensor.dtype)}[{shape}]"
    if digests is Digests.NONE or tensor.is_meta:
        return head
    sampled = digests is Digests.SAMPLED and tensor.nbytes > WHOLE_BYTES
    mark = (Digests.SAMPLED if sampled else Digests.WHOLE).value
    text = f"{head}{mark}{tensor_digest(tensor, whole=not sampled)[:8]}"
    return text if tensor.dim() else f"{text} = {number_text(tensor.item())}"


def number_text(number: float) -> str:
    """Floats with 6 digits, everything else as it is."""
    return f"{number:.6g}" if isinstance(number, float) else str(number)


def tensor_digest(tensor: torch.Tensor, *, whole: bool) -> str:
    """sha256 (hex) of the values in row-major order; with ``whole=False`` of 16 blocks of 4 KiB spread over them."""
    state = hashlib.sha256()
    tensor = tensor.detach()
    for part in _chunks(tensor) if whole else (torch.cat(list(_blocks(tensor))),):
        state.update(part.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return state.hexdigest()


def escape(text: str) -> str:
    """Names from outside as plain printable ASCII; control characters and look-alikes become visible."""
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if tensor.dim() == 0 or not tensor.numel():
        yield tensor
        return
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor
    yield from torch.split(flat, max(1, CHUNK_BYTES * len(flat) // tensor.nbytes))


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor
    size = max(1, BLOCK_BYTES * len(flat) // max(tensor.nbytes, 1))
    last = len(flat) - size
    for i in range(BLOCKS):
        start = last * i // (BLOCKS - 1)
        yield flat[start : start + size]


def module_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by path, every alias listed."""
    held = dict(module.named_parameters(remove_duplicate=False))
    return {**held, **dict(module.named_buffers(remove_duplicate=False))}


def _graph_order(program: Program) -> list[Site]:
    place = {n.name: i for i, n in enumerate(program.graph_module.graph.nodes)}
    last = len(place)
    return sorted(program.sites, key=lambda s: (min((place.get(c, last) for c in s.calls), default=last), s.name))


class Text:
    """Numbering of one program's nodes and symbols, and the text of its pieces."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sites = {s.name: s for s in program.sites}
        self.symbols: dict[Any, Any] = {}
        printed = (n for n in program.graph_module.graph.nodes if n.op not in ("get_attr", "output"))
        self.names = {node: f"%{i}" for i, node in enumerate(printed)}
        self.by_name = {node.name: text for node, text in self.names.items()}

    def line(self, node: fx.Node) -> str:
        """A node's line; empty for ``get_attr``, which is printed where it is used."""
        if node.op == "get_attr":
            return ""
        if node.op == "output":
            return f"return {self.value(node.args[0])}"
        return f"{self.names[node]} = {self.call(node)}{self.type_of(node)}{self.note(node)}"

    def call(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"input({escape(str(node.target))})"
        name = target_text(node.target)
        if name in ("linear", "mixed_linear") and node.meta.get(META) in self.sites:
            return f"{name}({self.value(node.args[0])}, @{escape(node.meta[META])})"
        words = [self.value(a) for a in node.args] + [f"{k}={self.value(v)}" for k, v in node.kwargs.items()]
        return f"{name}({', '.join(words)})"

    def value(self, value: Any) -> str:
        """An argument: nodes by number, module tensors by path, numbers with 6 digits."""
        if isinstance(value, fx.Node):
            return f"@{escape(str(value.target))}" if value.op == "get_attr" else self.names.get(value, "%?")
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(self.value(v) for v in value)}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{escape(str(k))}: {self.value(v)}' for k, v in value.items())}}}"
        if isinstance(value, slice):
            return ":".join("" if v is None else self.value(v) for v in (value.start, value.stop, value.step))
        if isinstance(value, float):
            return number_text(value)
        if isinstance(value, torch.dtype):
            return dtype_text(value)
        return escape(str(value))

    def type_of(self, node: fx.Node) -> str:
        return f" : {self.type_text(node.meta['val'])}" if "val" in node.meta else ""

    def type_text(self, value: Any) -> str:
        """The type of a fake value: ``bf16[s0,s1,2048]``, tuples in parentheses, sizes as ``int s0``."""
        if isinstance(value, torch.Tensor):
            return f"{dtype_text(value.dtype)}[{','.join(self.size(d) for d in value.shape)}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.type_text(v) for v in value)})"
        if isinstance(value, (int, torch.SymInt)):
            return f"int {self.size(value)}"
        return type(value).__name__

    def size(self, size: int | torch.SymInt) -> str:
        """A dimension; symbols are renamed s0, s1 ... in order of appearance, as torch's own names vary."""
        if isinstance(size, int):
            return str(size)
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            name = f"s{len(self.symbols)}"
            self.symbols.setdefault(symbol, type(symbol)(name, integer=True, positive=True))
        return str(expression.xreplace(self.symbols)).replace(" ", "")

    def note(self, node: fx.Node) -> str:
        """What is decided about the site behind a node: ``{4x1920 8x128 rank 0 scatter}``."""
        site = self.sites.get(node.meta.get(META, ""))
        if site is None:
            return ""
        words = [*self.widths(site), *self.orders(site)]
        if not site.open:
            words = ["left alone"]
        return f" {{{' '.join(words)}}}" if words else ""

    def widths(self, site: Site) -> Iterable[str]:
        if site.format is not None:
            fmt, rank = site.format, f"rank {site.format.rank}"
            form = form_text(fmt.group, fmt.scales)
            return [*segments_text(fmt.segments), *form, rank, *(["scatter"] if fmt.scatter else [])]
        widths = self.program.find(site.name, "widths")
        if widths is None:
            return []
        group, scales = self.program.stored_form(site)
        ordered = widths[profiles(widths).argsort(stable=True)]
        return [*segments_text(layout(ordered, site.columns, group)[0]), *form_text(group, scales)]

    def orders(self, site: Site) -> Iterable[str]:
        """Orders that the format does not show by itself."""
        held = (("absorbed", "rows absorbed"), ("row_order", "rows reordered"), ("column_order", "columns reordered"))
        words = {key: text for key, text in held if self.program.find(site.name, key) is not None}
        if site.format is not None or "absorbed" in words:
            words.pop("row_order", None)
        return words.values()

    def site(self, site: Site) -> str:
        """One line of the sites table."""
        weight = site.weight
        words = [f"@{escape(site.name)}", f"{dtype_text(weight.dtype)}[{site.rows},{site.columns}]"]
        words += ["weight", escape(weight.key), *(["transposed"] if weight.transposed else [])]
        words += [f"also {escape(alias)}" for alias in weight.aliases]
        words += ["bias " + escape(site.bias)] if site.bias is not None else []
        words += ["input", self.by_name.get(site.input, escape(site.input))]
        words += ["calls", *(self.by_name.get(c, escape(c)) for c in site.calls)]
        if site.format is not None:
            words += [f"stored {site.format.rows}x{site.format.columns} in {site.format.stored_bits()} bits"]
        words += [] if site.in_scope else ["out of scope"]
        words += [f"left alone: {escape(site.reason)}"] if site.reason is not None else []
        return " ".join(words)


def segments_text(segments: Sequence[Segment]) -> list[str]:
    """``["4x1920", "2+8x128"]`` (width or widths x rows), cut after eight."""
    shown = [f"{s.label}x{s.rows}" for s in segments[:SHOWN_SEGMENTS]]
    return [*shown, *([f"+{len(segments) - SHOWN_SEGMENTS}"] if len(segments) > SHOWN_SEGMENTS else [])]


def form_text(group: int, scales: Scales) -> list[str]:
    """``["float-group", "groups of 64"]``; nothing for the default."""
    kind = [] if scales is Scales.TWO_LEVEL else [scales.text]
    return [*kind, *([f"groups of {group}"] if group != GROUP else [])]


def target_text(target: Any) -> str:
    """``aten.add.Tensor``, ``linear`` for our own ops, ``getitem`` for plain functions."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default").removeprefix("mixcomp.")
    return escape(str(getattr(target, "__name__", target)))
