"""What the compiler makes of the decode kernel for an H100, read without one.

Lanes execute some instructions together, so element ``i`` of every value has to belong to thread ``i``: Triton does not
promise it, and a new release could choose otherwise.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import Any

import pytest
import torch

from mixcomp.format import PLANES, WIDTHS
from mixcomp.kernels import expand, gemm, int8, lanes, launch, tiles
from mixcomp.kernels.tiles import Tile

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton exists for Linux only"),
    pytest.mark.filterwarnings("default"),  # Triton's own
]

NUMBERS = (
    "across", "tokens", "columns", "rank", "x_token", "x_column", "out_token", "token_tiles", "splits", "scatter", "biased",
)  # fmt: skip
POINTERS = {"words": "i32", "nibbles": "i32", "factors": "fp16", "row_index": "i16", "table": "i32", "partial": "fp32",
            "counters": "i32"}  # fmt: skip
SMALL = Tile(blocks=1, along=4, down=1, tokens=8, stages=2, programs=1)
#: what would pass values between threads
SHARING = re.compile(r"\b(shfl|bar\.sync|barrier|ldmatrix|[ls]t\.shared)")


@cache
def compiled(width: int, tile: Tile, dtype: str = "fp16", kernel: Any = gemm.mixed_linear_kernel) -> dict[str, str]:
    """Every stage of the kernel of one width: ``ttgir``, ``ptx``, ..."""
    constants = {
        "branch_a": None, "projected": None, "WIDTHS": 1 << width, "ALIGNED": True, "BLOCKS": tile.blocks,
        "ALONG": tile.along, "DOWN": tile.down, "TOKENS": tile.tokens, "STAGES": tile.stages,
    }  # fmt: skip
    pointers = POINTERS | dict.fromkeys(("x", "bias", "out"), dtype)
    return assembled(kernel, pointers, NUMBERS, constants, num_warps=tile.along * tile.down)


def assembled(
    kernel: Any, pointers: dict[str, str], numbers: tuple[str, ...], constants: dict[str, Any], **options: Any
) -> dict[str, str]:
    """Every stage of a kernel whose tensors start at 16 bytes."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(numbers, "i32")
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {stage: text for stage, text in made.asm.items() if isinstance(text, str)}


def before_the_sum(ptx: str) -> str:
    """Up to the last multiplication."""
    assert "mma.sync" in ptx, "no tensor core is used"
    return ptx[: ptx.rindex("mma.sync")]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_weight_is_multiplied_once_and_nothing_is_shared(width: int, dtype: str) -> None:
    ptx = compiled(width, SMALL, dtype)["ptx"]
    parts = sum(-(-bits // 4) for bits in PLANES[width]) if dtype == "bf16" else 1
    assert ptx.count("mma.sync") == 8 * SMALL.blocks * parts
    assert not SHARING.findall(before_the_sum(ptx))


@pytest.mark.parametrize("tile", sorted({t for row in tiles.TABLE.values() for t in row.values()}, key=str), ids=str)
def test_element_i_belongs_to_thread_i(tile: Tile) -> None:
    code = compiled(4, tile)
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<\{.*\}>)", code["ttgir"], re.MULTILINE))
    spelled = [line for line in code["ttgir"].splitlines() if "elementwise_inline_asm" in line]
    used = set(re.findall(r"tensor<\d+x\w+, (#\w+)>", "\n".join(spelled)))
    warps = tile.along * tile.down
    wanted = f"#ttg.blocked<{{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [{warps}], order = [0]}}>"
    assert len(spelled) > 50
    assert {layouts[name] for name in used} == {wanted}
    assert not re.findall(r"tensor<\d+x\d+x", "\n".join(spelled)), "an axis beside the threads"
    assert code["ptx"].count("mma.sync") == 8 * tile.blocks * (tile.tokens // 8)
    assert not SHARING.findall(before_the_sum(code["ptx"]))


@pytest.mark.parametrize("value", [0.0, 1.0, 16, -23.5, -127, 0.375, -384, -(2.0**-9)])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_constant_lies_in_both_halves(value: float, kind: torch.dtype) -> None:
    both = torch.tensor([value, value], dtype=kind)
    assert both[0].item() == value
    assert both.view(torch.int32).item() == lanes.twice(value, kind is torch.bfloat16)


def test_whole_tiles_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop for fp32 and the interpreter hands values around: these tests would tell."""
    from triton import jit
    from triton.language import constexpr

    monkeypatch.setattr(gemm, "WARPS", constexpr(False))
    other = jit(do_not_specialize=NUMBERS)(gemm.mixed_linear_kernel.fn)
    assert SHARING.findall(before_the_sum(compiled(4, SMALL, kernel=other)["ptx"]))


def test_what_becomes_a_code_is_rounded_before_it_is_rounded_to_an_integer() -> None:
    """A fused multiply-add would give other codes than plain torch does, where the product is close to a half."""
    pointers, numbers = {"x": "fp16", "codes": "i8", "scales": "fp32"}, ("columns", "steps", "x_token", "x_column")
    given = int8.round_tokens_kernel, pointers, numbers, {"ALIGNED": True, "SPAN": 4096}
    code = assembled(*given, num_warps=4, **launch.SEPARATE)["ptx"]
    assert "mul.f32" in code or "mul.rn.f32" in code
    assert "fma.rn.f32" not in code
    assert "fma.rn.f32" in assembled(*given, num_warps=4, enable_fp_fusion=True)["ptx"]


@pytest.mark.parametrize("kind", ["i8", "fp16", "bf16"])
def test_an_expanded_weight_is_stored_by_vectors_as_it_lies_in_the_lanes(kind: str) -> None:
    pointers = {"words": "i32", "nibbles": "i32", "factors": "fp16", "row_index": "i16", "out": kind, "table": "i32"}
    constants = {"WIDTHS": 1 << 5, "ALIGNED": True, "WARPS": 4}
    if kind == "i8":
        pointers["units"] = "fp32"
    else:
        constants["units"] = None
    code = assembled(expand.expand_kernel, pointers, ("across", "columns", "scatter"), constants, num_warps=4)["ptx"]
    assert code.count("st.global.v2.b32" if kind == "i8" else "st.global.v4.b32") == 8
    assert not SHARING.findall(code)


def test_integers_are_multiplied_by_whole_warp_groups_and_stored_by_vectors() -> None:
    pointers = {"codes": "i8", "scales": "fp32", "weight": "i8", "units": "fp32", "bias": "fp16", "out": "fp16"}
    tile = int8.choose(4096)
    constants = {"ALIGNED": True, "TOKENS": tile.tokens, "ROWS": tile.rows, "STAGES": tile.stages}
    numbers = ("tokens", "rows", "steps", "biased")
    code = assembled(int8.int8_linear_kernel, pointers, numbers, constants, num_warps=tile.warps)["ptx"]
    assert re.search(r"wgmma\.mma_async\S*\.s32\.s8\.s8", code)
    assert not re.findall(r"st\.global\.b16", code)
    assert "st.global.v4.b32" in code
