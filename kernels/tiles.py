"""Which tile a launch uses and where every tile finds its blocks: pure functions, tested without a GPU.

A *tile* is the block of stored rows and tokens one program computes.  Its rows share a width, so every segment is
cut separately and may end in a smaller tile.  ``benchmarks/kernel_times.py --sweep`` times tiles on a GPU and prints
``TABLE`` anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixcomp.format import BLOCK, WIDTHS, blocks

if TYPE_CHECKING:
    from mixcomp.format import SiteFormat

ALL_WIDTHS = sum(1 << width for width in WIDTHS)


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
        return BLOCK[0] * self.blocks * self.down


#: shape class (``shape_class``) -> most tokens -> tile, for activations of two bytes; the last row serves any number.
#: Swept on an H100 (benchmarks/kernel_times_h100.json).
TABLE: dict[str, dict[int, Tile]] = {
    "small": {
        1: Tile(blocks=1, along=8, down=1, tokens=8, stages=2, programs=1),
        8: Tile(blocks=1, along=8, down=1, tokens=8, stages=2, programs=1),
        16: Tile(blocks=1, along=4, down=1, tokens=16, stages=2, programs=528),
        32: Tile(blocks=2, along=4, down=1, tokens=32, stages=1, programs=264),
        64: Tile(blocks=2, along=4, down=1, tokens=32, stages=1, programs=1),
    },
    "middle": {
        1: Tile(blocks=1, along=8, down=1, tokens=8, stages=2, programs=1),
        8: Tile(blocks=1, along=8, down=1, tokens=8, stages=2, programs=1),
        16: Tile(blocks=1, along=4, down=1, tokens=16, stages=2, programs=1),
        32: Tile(blocks=1, along=4, down=1, tokens=32, stages=1, programs=1),
        64: Tile(blocks=2, along=4, down=1, tokens=32, stages=1, programs=1),
    },
    "large": {
        1: Tile(blocks=1, along=2, down=2, tokens=8, stages=2, programs=1),
        8: Tile(blocks=1, along=2, down=2, tokens=8, stages=2, programs=1),
        16: Tile(blocks=2, along=2, down=2, tokens=16, stages=1, programs=1),
        32: Tile(blocks=2, along=4, down=1, tokens=32, stages=1, programs=1),
        64: Tile(blocks=2, along=2, down=2, tokens=32, stages=1, programs=1),
    },
    "deep": {
        1: Tile(blocks=1, along=2, down=1, tokens=8, stages=3, programs=1056),
        8: Tile(blocks=1, along=2, down=1, tokens=8, stages=3, programs=1056),
        16: Tile(blocks=2, along=4, down=1, tokens=16, stages=1, programs=528),
        32: Tile(blocks=2, along=4, down=1, tokens=32, stages=1, programs=264),
        64: Tile(blocks=2, along=2, down=2, tokens=64, stages=1, programs=264),
    },
}
#: exact fp32 products do not run on tensor cores; registers bound the tile
FP32 = Tile(blocks=1, along=4, down=1, tokens=8, stages=2, programs=264)


def shape_class(rows: int, columns: int) -> str:
    """Which row of ``TABLE`` serves a weight: that of the swept shape whose number of tiles and steps is nearest.

    Swept are, of Llama-3.1-8B, o (4096 x 4096, "small"), qkv (6144 x 4096), gate_up (28672 x 4096) and down
    (4096 x 14336, "deep").
    """
    if columns >= 2 * rows:
        return "deep"
    return "small" if rows <= 5120 else "middle" if rows <= 12288 else "large"


def choose(fmt: SiteFormat, tokens: int, element_bytes: int) -> Tile:
    """The tile for ``tokens`` tokens of activations that take ``element_bytes`` bytes each."""
    if element_bytes == 4:
        return FP32
    table = TABLE[shape_class(fmt.rows, fmt.columns)]
    return next((tile for most, tile in table.items() if tokens <= most), table[max(table)])


@dataclass(frozen=True, slots=True)
class Projection:
    """``ranks`` x ``tokens`` inner products of the side branch per program, ``columns`` per step."""

    ranks: int
    tokens: int
    columns: int


#: up to here the side branch's inner product is one program per token and rank
FEW = 8


def choose_projection(tokens: int) -> Projection:
    """The tile for the side branch's inner product."""
    return Projection(1, 1, 1024) if tokens <= FEW else Projection(16, 64, 64)


def width_mask(fmt: SiteFormat) -> int:
    """Bit ``w`` set where the kernel needs code for width ``w``: the site's only width, or all of them.

    A kernel for every set of widths would be leaner, and there would be up to 63 to compile for each tile.
    """
    widths = {segment.width for segment in fmt.segments}
    return 1 << widths.pop() if len(widths) == 1 else ALL_WIDTHS


def splits(tile: Tile, tiles: int, fmt: SiteFormat) -> int:
    """How many programs share the columns of each of ``tiles`` tiles."""
    steps = -(-blocks(fmt.columns, BLOCK[1]) // tile.along)
    each = -(-steps // max(1, min(tile.programs // tiles, steps)))
    return -(-steps // each)


def tile_table(fmt: SiteFormat, rows: int) -> list[tuple[int, int, int, int, int]]:
    """Row tiles of at most ``rows`` rows: (width, first stored row, rows held, first words, first row block).

    Words count in ``fragments.UNIT``, so that they fit 32 bits where bytes do not.  The widest rows come first, because
    they take longest.
    """
    across = blocks(fmt.columns, BLOCK[1])
    entries = []
    unit = block = 0
    for held, segment in fmt.row_ranges():
        for start in range(0, segment.rows, rows):
            down = start // BLOCK[0]
            place = unit + down * across * segment.width, block + down
            entries.append((segment.width, held.start + start, min(rows, segment.rows - start), *place))
        down = blocks(segment.rows, BLOCK[0])
        unit, block = unit + down * across * segment.width, block + down
    return sorted(entries, key=lambda entry: -entry[0])
