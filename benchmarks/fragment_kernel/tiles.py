"""Which tile a launch uses and where every tile finds its blocks: pure functions, tested without a GPU.

A *tile* is the block of stored rows and tokens one program computes.  Its rows share a width, so every segment is
cut separately and may end in a smaller tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fragment_kernel import fragments

if TYPE_CHECKING:
    from mixcomp.format import SiteFormat


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program of ``along * down`` warps computes; all but ``programs`` and ``stages`` are powers of two.

    A warp multiplies ``blocks`` row blocks by every ``along``-th column block; ``down`` warps have other rows of the same
    columns.  ``stages`` steps are in flight at a time.  Columns are split until there are ``programs`` programs.
    """

    blocks: int
    along: int
    down: int
    tokens: int
    stages: int
    programs: int

    @property
    def rows(self) -> int:
        """Rows of a program's tile."""
        return fragments.ROWS * self.blocks * self.down


#: most tokens -> tile, for activations of two bytes
SMALL = {
    8: Tile(blocks=2, along=4, down=1, tokens=8, stages=3, programs=264),
    16: Tile(blocks=4, along=4, down=1, tokens=16, stages=3, programs=264),
    32: Tile(blocks=2, along=1, down=4, tokens=32, stages=3, programs=264),
}
LARGE = Tile(blocks=2, along=1, down=4, tokens=64, stages=3, programs=264)
#: exact fp32 products do not run on tensor cores; registers bound the tile
FP32 = Tile(blocks=1, along=4, down=1, tokens=8, stages=2, programs=264)


def choose(tokens: int, element_bytes: int) -> Tile:
    """The tile for ``tokens`` tokens of activations that take ``element_bytes`` bytes each."""
    if element_bytes == 4:
        return FP32
    return next((tile for most, tile in SMALL.items() if tokens <= most), LARGE)


def splits(tile: Tile, tiles: int, fmt: SiteFormat) -> int:
    """How many programs share the columns of each of ``tiles`` tiles."""
    steps = -(-fragments.blocks(fmt.columns, fragments.COLUMNS) // tile.along)
    each = -(-steps // max(1, min(tile.programs // tiles, steps)))
    return -(-steps // each)


def tile_table(fmt: SiteFormat, rows: int) -> list[tuple[int, int, int, int, int]]:
    """Row tiles of at most ``rows`` rows: (width, first stored row, rows held, first words, first row block).

    Words count in ``fragments.UNIT``, so that they fit 32 bits where bytes do not.  The widest rows come first, because
    they take longest.
    """
    across = fragments.blocks(fmt.columns, fragments.COLUMNS)
    entries = []
    unit = block = 0
    for held, segment in fmt.row_ranges():
        for start in range(0, segment.rows, rows):
            down = start // fragments.ROWS
            place = unit + down * across * segment.width, block + down
            entries.append((segment.width, held.start + start, min(rows, segment.rows - start), *place))
        down = fragments.blocks(segment.rows, fragments.ROWS)
        unit, block = unit + down * across * segment.width, block + down
    return sorted(entries, key=lambda entry: -entry[0])
