"""Which tile a launch uses and where every tile finds its bytes: pure functions, tested without a GPU.

A *tile* is the block of stored rows and tokens one program computes.  Its rows share a width, so every segment is
cut separately and may end in a smaller tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from mixcomp.format import WIDTHS

if TYPE_CHECKING:
    from mixcomp.format import SiteFormat

ALL_WIDTHS = sum(1 << width for width in WIDTHS)


@dataclass(frozen=True, slots=True)
class Tile:
    """``rows`` x ``tokens`` outputs per program, ``columns`` (at least 64) per step: all powers of two.

    ``tokens == 1`` multiplies and sums without tensor cores.  ``stages`` steps are in flight at a time.
    """

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int


#: most tokens -> tile, for activations of two bytes
SMALL = {
    1: Tile(rows=8, tokens=1, columns=1024, warps=4, stages=3),
    16: Tile(rows=64, tokens=16, columns=128, warps=4, stages=3),
    64: Tile(rows=64, tokens=64, columns=128, warps=4, stages=3),
}
LARGE = Tile(rows=128, tokens=128, columns=64, warps=8, stages=3)
#: exact fp32 products do not run on tensor cores; registers bound the tile
FP32 = Tile(rows=32, tokens=16, columns=64, warps=4, stages=2)
#: up to here the side branch's inner product is one program per token and rank
FEW = 8
#: every number of rows a tile may have
ROW_TILES = tuple(sorted({tile.rows for tile in (*SMALL.values(), LARGE, FP32)}))


def choose(tokens: int, element_bytes: int) -> Tile:
    """The tile for ``tokens`` tokens of activations that take ``element_bytes`` bytes each."""
    if tokens > 1 and element_bytes == 4:
        return FP32
    return next((tile for most, tile in SMALL.items() if tokens <= most), LARGE)


def choose_projection(tokens: int) -> Tile:
    """The tile for the side branch's inner product; its rows are ranks."""
    if tokens <= FEW:
        return Tile(rows=1, tokens=1, columns=1024, warps=4, stages=1)
    return Tile(rows=16, tokens=64, columns=64, warps=4, stages=2)


def width_mask(fmt: SiteFormat) -> int:
    """Bit ``w`` set where the kernel needs code for width ``w``: the site's only width, or all of them.

    A kernel for every set of widths would be leaner, and there would be up to 63 to compile for each tile.
    """
    widths = {segment.width for segment in fmt.segments}
    return 1 << widths.pop() if len(widths) == 1 else ALL_WIDTHS


def tile_table(fmt: SiteFormat, rows: int) -> list[tuple[int, int, int, int, int]]:
    """Row tiles of at most ``rows`` rows: (width, first stored row, rows held, wide plane, narrow plane).

    A plane is given by the *bit-row* at which the tile starts in ``codes``: one bit of every column of a row, which
    is ``4 * groups`` bytes.  Bit-rows fit 32 bits where bytes do not, and they show the compiler how rows are aligned.
    A width of one plane repeats it.  The widest rows come first, because they take longest.
    """
    bit_row = 4 * fmt.groups
    entries = []
    for first, group in groupby(fmt.planes(), key=lambda plane: plane.first_row):
        planes = tuple(group)
        width, held = sum(plane.bits for plane in planes), planes[0].rows
        for start in range(0, held, rows):
            wide, narrow = [plane.offset // bit_row + start * plane.bits for plane in (planes + planes)[:2]]
            entries.append((width, first + start, min(rows, held - start), wide, narrow))
    return sorted(entries, key=lambda entry: -entry[0])
