"""Invariants of decisions and stored tensors, I09-I16.  Each check yields what is wrong; see ``verify``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import isfinite

import torch
from torch import fx

from mixcomp.budget import original_bits
from mixcomp.errors import FormatError
from mixcomp.format import ALL_WIDTHS, GROUP, GROUPS, NAMES, WIDTHS, SiteFormat
from mixcomp.packed import PackedWeight, check_values, pack_codes, unpack_codes
from mixcomp.printer import dtype_text
from mixcomp.profiles import layout, payload_bits, profiles
from mixcomp.program import Site
from mixcomp.snapshot import Case, Findings, arguments, is_mixed

#: sums of products in another order differ by this much of the largest entry at most
SYMMETRY = 1e-4
#: elements compared at once
STRIP = 1 << 22
#: a side branch may not lose more than fp32 sums can explain
NOT_WORSE = 1e-3


def table_sound(case: Case) -> Findings:
    """I09: every tensor of the table has an owner, is contiguous, finite, and never written in place."""
    owners = {*case.site_names, *(s.input for s in case.program.sites), "budget", *case.program.norms()}
    for key, tensor in case.program.tensors.items():
        owner = key.rpartition("/")[0]
        if owner not in owners:
            yield f"tensor {key!r} belongs to {owner!r}, which is neither a site nor an input", None
        if not tensor.is_contiguous():
            yield f"tensor {key!r} is not contiguous", None
        if not case.fresh(key):
            continue
        old = case.before.tensors.get(key) if case.before is not None else None
        if old is not None and old.address == tensor.data_ptr() and tensor.numel():
            yield f"tensor {key!r} was written in place; make a new one", None
        if tensor.is_floating_point() and not _finite(tensor):
            yield f"tensor {key!r} holds NaN or infinity", None
    for path, norm in case.program.norms().items():
        own = case.held.get(path)
        if own is None:
            yield f"tensor '{path}/norm' belongs to no parameter of the graph", None
        else:
            yield from _typed(f"{path}/norm", norm, own.dtype, tuple(own.shape))


def statistics(case: Case) -> Findings:
    """I10: sigma f32[columns, columns] symmetric with a diagonal >= 0, gamma f32[rows] >= 0."""
    for site in case.program.open_sites():
        sigma = case.program.tensor(site.input, "sigma")
        gamma = case.program.tensor(site.name, "gamma")
        yield from _typed(f"{site.input}/sigma", sigma, torch.float32, (site.columns, site.columns))
        yield from _typed(f"{site.name}/gamma", gamma, torch.float32, (site.rows,))
        if case.fresh(f"{site.name}/gamma") and bool((gamma < 0).any()):
            yield f"site {site.name}: gamma has negative entries; it is a mean of squares", None
        if case.fresh(f"{site.input}/sigma") and sigma.dim() == 2 and sigma.shape[0] == sigma.shape[1]:
            sigma = sigma.to(gamma.device)  # large ones wait in main memory, where this would take minutes
            diagonal = sigma.diagonal()
            if bool((diagonal < 0).any()):
                yield f"site {site.name}: sigma has negative entries on its diagonal", None
            elif _asymmetry(sigma) > SYMMETRY * float(diagonal.amax()):
                yield f"site {site.name}: sigma is not symmetric", None


def scales(case: Case) -> Findings:
    """I10: what channels are scaled by, columns f32[columns] > 0 and rows f32[rows] > 0, where they are."""
    for site in case.program.open_sites():
        for owner, what, size in ((site.input, "scale", site.columns), (site.name, "row_scale", site.rows)):
            scale = case.program.find(owner, what)
            if scale is None:
                continue
            yield from _typed(f"{owner}/{what}", scale, torch.float32, (size,))
            if case.fresh(f"{owner}/{what}") and not bool((scale > 0).all()):
                yield f"site {site.name}: {owner}/{what} has entries that are not positive", None


def _asymmetry(square: torch.Tensor) -> float:
    """Largest |s_ij - s_ji|, by strips, so that no second matrix is made."""
    step = max(1, STRIP // len(square))
    strips = range(0, len(square), step)
    return max(float((square[i : i + step] - square[:, i : i + step].T).abs().amax()) for i in strips)


def salience(case: Case) -> Findings:
    """I10: salience f32[rows, widths], finite and >= 0."""
    for site in case.program.open_sites():
        found = case.program.tensor(site.name, "salience")
        yield from _typed(f"{site.name}/salience", found, torch.float32, (site.rows, len(WIDTHS)))
        if case.fresh(f"{site.name}/salience") and not bool((found >= 0).all()):
            yield f"site {site.name}: salience is negative or NaN; it is a loss", None


def widths_allowed(case: Case) -> Findings:
    """I11: widths u8[rows] or u8[rows, groups], each one a width of the format; none for sites that are left alone."""
    for site in case.program.sites:
        if not site.open:
            if case.program.find(site.name, "widths") is not None:
                yield f"site {site.name}: is left alone and has widths", None
            continue
        widths = case.program.tensor(site.name, "widths")
        group, _ = case.program.stored_form(site)
        if group not in GROUPS:
            yield f"site {site.name}: groups of {group} columns are not among {GROUPS}", None
            continue
        shape = (site.rows,) if widths.dim() == 1 else (site.rows, -(-site.columns // group))
        yield from _typed(f"{site.name}/widths", widths, torch.uint8, shape)
        strange = sorted(set(widths.flatten().tolist()) - set(ALL_WIDTHS))
        if strange:
            yield f"site {site.name}: widths {strange} are not among {ALL_WIDTHS}", None


def within_budget(case: Case) -> Findings:
    """I12: bits of all sites in scope are at most the budget; stored bits are the planned ones."""
    planned = stored = payload = 0
    for site in case.program.sites:
        if not site.in_scope:
            continue
        if not site.open:
            planned, stored, payload = (n + original_bits(site) for n in (planned, stored, payload))
            continue
        promise = int(case.program.tensor(site.name, "planned_bits"))
        planned += promise
        group, _ = case.program.stored_form(site)
        payload += payload_bits(case.program.tensor(site.name, "widths"), site.columns, group)
        if site.format is None:
            continue
        bits = site.format.stored_bits()
        held = sum(8 * case.program.tensor(site.name, name).nbytes for name in site.format.tensors())
        stored += held
        if not promise == bits == held:
            yield f"site {site.name}: planned {promise} bits, its format says {bits}, its tensors {held}", None
    for name, bits in (("bits", max(planned, stored)), ("payload_bits", payload)):
        ceiling = case.program.find("budget", name)
        if ceiling is not None and bits > int(ceiling):
            yield f"{bits} {name} are in use, the budget is {int(ceiling)}", None
    if not any(case.program.find("budget", name) is not None for name in ("bits", "payload_bits")):
        yield "the table holds no budget/bits", None


def orders_are_bijections(case: Case) -> Findings:
    """I13: row and column orders are permutations, they gather segments, and absorptions agree."""
    for site in case.program.open_sites():
        for what, size in (("row_order", site.rows), ("column_order", site.columns)):
            order = case.program.find(site.name, what)
            if order is not None:
                yield from _typed(f"{site.name}/{what}", order, torch.int64, (size,))
                if not _is_permutation(order, size):
                    yield f"site {site.name}: {what} is not a permutation of 0..{size - 1}", None
    yield from _segments_in_order(case)
    yield from _absorbed(case)


def _segments_in_order(case: Case) -> Findings:
    """Sorting leaves no more segments than there were, and rows of one width stay in order.

    Absorbed orders serve several sites at once, so they are judged by the sum over those.
    """
    gained: Counter[str] = Counter()
    speaker: dict[tuple[int, ...], str] = {}
    for site in case.program.open_sites():
        order, widths = case.program.find(site.name, "row_order"), case.program.find(site.name, "widths")
        if order is None or widths is None or not len(order) == len(widths) == site.rows:
            continue
        kinds = profiles(widths)
        stored = kinds[order.to(kinds.device)]
        owner = site.name
        if case.program.find(site.name, "absorbed") is not None:
            owner = speaker.setdefault(tuple(order.tolist()), site.name)
        elif bool(((order[1:] < order[:-1]).to(stored.device) & (stored[1:] == stored[:-1])).any()):
            yield f"site {site.name}: row_order changes the order of rows inside a segment", None
        gained[owner] += len(stored.unique_consecutive()) - len(kinds.unique_consecutive())
    for owner in (name for name, count in gained.items() if count > 0):
        yield f"site {owner}: its row_order makes {gained[owner]} segments more than there were", None


def _absorbed(case: Case) -> Findings:
    """Absorbed row orders and the column orders that undo them come in pairs, up to repetition over heads."""
    find = case.program.find
    names = [s.name for s in case.program.open_sites()]
    absorbed = [n for n in names if find(n, "absorbed") is not None]
    given = {n: order for n in absorbed if (order := find(n, "row_order")) is not None}
    taken = {n: order for n in names if (order := find(n, "column_order")) is not None}
    wanted = {name: _blocks(columns, _block_size(columns)) for name, columns in taken.items()}
    sizes = {len(block) for blocks in wanted.values() for block in blocks}
    made = {n: _followed_by(order, sizes) for n, order in given.items()}
    followed, led = {*wanted.values()}, {blocks for found in made.values() for blocks in found}
    for name in (n for n, found in made.items() if found.isdisjoint(followed)):
        yield f"site {name}: its row order is absorbed and no consumer's columns follow it", None
    for name in (n for n, blocks in wanted.items() if blocks not in led):
        yield f"site {name}: its columns are permuted and no absorbed producer's rows are", None


def _followed_by(rows: torch.Tensor, sizes: set[int]) -> set[frozenset[tuple[int, ...]]]:
    """Blocks of the columns that can undo an order: its own; heads may be repeated, ones that stay may be left out."""
    found = {size: _blocks(rows, size) for size in sizes if len(rows) % size == 0}
    return {*found.values()} | {blocks - {tuple(range(size))} for size, blocks in found.items()}


def _block_size(order: torch.Tensor) -> int:
    """Smallest block length such that the order moves nothing across blocks."""
    reach = order.cummax(0).values.tolist()
    count = len(reach)
    divisors = (d for d in range(1, count + 1) if count % d == 0)
    return next(d for d in divisors if all(reach[i - 1] < i for i in range(d, count + 1, d)))


def _blocks(order: torch.Tensor, size: int) -> frozenset[tuple[int, ...]]:
    """Orders within the blocks, each counted from its block's start."""
    starts = torch.arange(0, len(order), size, device=order.device)[:, None]
    return frozenset(tuple(block) for block in (order.view(-1, size) - starts).tolist())


def formats_match(case: Case) -> Findings:
    """I14: codes, scales, factors and index of a site are in one row order, that of its widths."""
    for site in case.program.sites:
        if not site.open:
            continue
        if site.format is None:
            yield f"site {site.name}: is open and has no format", None
            continue
        if (site.format.rows, site.format.columns) != site.weight.shape:
            shape = (site.format.rows, site.format.columns)
            yield f"site {site.name}: its format is {shape}, its weight {site.weight.shape}", None
            continue
        order = case.program.find(site.name, "row_order")
        widths = case.program.tensor(site.name, "widths")
        stored = widths if order is None else widths[order.to(widths.device)]
        group, scales = case.program.stored_form(site)
        if (site.format.group, site.format.scales) != (group, scales):
            yield f"site {site.name}: its format is not the planned one, {scales.text} in groups of {group}", None
            continue
        segments, index = layout(stored, site.columns, group)
        if site.format.segments != segments:
            yield f"site {site.name}: its segments are not the runs of its widths in stored order", None
        elif index is not None and not _equal(case.program.tensor(site.name, "group_index").long(), index):
            yield f"site {site.name}: group_index does not lead to the groups of its widths", None
        if site.format.scatter and order is None:
            yield f"site {site.name}: has a row index and no row order", None
        yield from _stored_values(case, site, site.format)


def _stored_values(case: Case, site: Site, fmt: SiteFormat) -> Findings:
    try:
        stored = _packed(case, site, fmt)
        if any(case.fresh(f"{site.name}/{name}") for name in stored.tensors()):
            check_values(stored)
    except FormatError as error:
        yield f"site {site.name}: {error}", None
        return
    order = case.program.find(site.name, "row_order")
    if stored.row_index is not None and order is not None and not _equal(stored.row_index.long(), order):
        yield f"site {site.name}: row_index differs from row_order", None


def branches_pay(case: Case) -> Findings:
    """I15: a side branch is thinner than its weight and does not raise the site's loss."""
    for site in case.program.open_sites():
        if site.format is None or not site.format.rank:
            continue
        rank, most = site.format.rank, min(site.rows, site.columns)
        if rank >= most:
            yield f"site {site.name}: rank {rank} is no less than {most}, its smaller side", None
        before = float(case.program.tensor(site.name, "loss_before_branch"))
        after = float(case.program.tensor(site.name, "loss_after_branch"))
        if not after <= before * (1 + NOT_WORSE):
            yield f"site {site.name}: its side branch raises the loss from {before:.6g} to {after:.6g}", None


def lowered_whole(case: Case) -> Findings:
    """I16: lowered calls carry exactly what the table stores, and write every output row once."""
    for site in case.program.sites:
        if site.format is None:
            continue
        for call in site.calls:
            node = case.nodes[call]
            if not is_mixed(node):
                continue
            given = arguments(node)
            fmt = site.format
            found = [*given["segments"], given["columns"], given.get("group", GROUP), int(given.get("scale_kind", 0))]
            wanted = [*fmt.constants(), site.columns, fmt.group, int(fmt.scales)]
            if found != wanted:
                yield f"site {site.name}: {call} has segments {found}, the format {wanted}", node
            kind = given.get("activations", "native")
            if kind != site.activations:
                yield f"site {site.name}: {call} takes {kind} activations, the site {site.activations}", node
            yield from ((f"site {site.name}: {call}: {why}", node) for why in _operands(case, site, site.format, given))
        yield from _round_trip(case, site, site.format)
    for path, norm in case.program.norms().items():
        if not _equal(case.held[path], norm):
            yield f"parameter {path} of the lowered graph is not the norm that the table stores", None


def _operands(case: Case, site: Site, fmt: SiteFormat, given: dict[str, object]) -> Iterator[str]:
    wanted = fmt.tensors()
    for name in NAMES:
        source = given.get(name)
        tensor = case.parameter_of(source)
        if name not in wanted:
            if source is not None:
                yield f"{name} is given, the format has none"
        elif isinstance(source, fx.Node) and source.op == "placeholder":  # Dynamo hands buffers in as inputs
            forms = wanted[name], wanted[name] if fmt.departure else fmt.fragments()[name]  # as stored, as on a GPU
            if (source.meta["val"].dtype, tuple(source.meta["val"].shape)) not in forms:
                yield f"{name} is no {dtype_text(wanted[name][0])}{list(wanted[name][1])}"
        elif tensor is None:
            yield f"{name} does not come from the module"
        elif not _equal(tensor, case.program.tensor(site.name, name)):
            yield f"{name} differs from the table"


def _round_trip(case: Case, site: Site, fmt: SiteFormat) -> Findings:
    """That rows are written once follows: the index is the table's, and I14 says it is a permutation."""
    stored = case.program.find(site.name, "codes")
    if case.level < 2 or stored is None:
        return
    index = case.program.find(site.name, "group_index")
    codes = unpack_codes(stored, fmt, index)
    if not torch.equal(pack_codes(codes, fmt, index), stored):
        yield f"site {site.name}: unpacking and packing again changes the codes", None
    if bool(codes[:, site.columns :].any()):
        yield f"site {site.name}: codes of the padding are not zero", None


def _packed(case: Case, site: Site, fmt: SiteFormat) -> PackedWeight:
    return PackedWeight.from_tensors(fmt, {name: case.program.tensor(site.name, name) for name in fmt.tensors()})


def _typed(key: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Findings:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        got = f"{dtype_text(tensor.dtype)}{list(tensor.shape)}"
        yield f"tensor {key!r} is {got}, wanted {dtype_text(dtype)}{list(shape)}", None


def _finite(tensor: torch.Tensor) -> bool:
    """Without a temporary of the tensor's size: NaN passes through both ends of the range."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())
    return isfinite(float(low)) and isfinite(float(high))


def _is_permutation(order: torch.Tensor, size: int) -> bool:
    return _equal(order.sort().values, torch.arange(size))


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and bool(torch.equal(left, right.to(left.device)))
