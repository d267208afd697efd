"""Time of the linears of one decoding step on a CPU: original weights against compiled ones.

Random weights in the shapes of SmolLM2-135M (30 layers, hidden 576, keys and values 192, intermediate 1536).  Prints
one JSON object.  Every figure is the minimum over ``--repeats`` steps: other work on the machine only ever adds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import torch
from torch import nn

from mixcomp.format import Segment, SiteFormat
from mixcomp.lowering.cpu import table_form
from mixcomp.lowering.module import MixedLinear
from mixcomp.packed import PackedWeight, pack_codes, pack_scales

HIDDEN, KEYS, INNER = 576, 192, 1536
#: (rows, columns) of a layer's linears
SHAPES = ((HIDDEN, HIDDEN),) * 2 + ((KEYS, HIDDEN),) * 2 + ((INNER, HIDDEN),) * 2 + ((HIDDEN, INNER),)
#: width -> share of the rows
MIX = {3: 0.25, 4: 0.5, 5: 0.25}


def random_site(rows: int, columns: int, draw: torch.Generator) -> MixedLinear:
    """A compiled linear with rows of the widths of ``MIX``, scattered."""
    counts = {width: int(rows * share) for width, share in MIX.items()}
    fmt = SiteFormat(rows, columns, tuple(Segment(n, width) for width, n in counts.items()), scatter=True)
    top = 2 ** torch.tensor(fmt.row_widths())[:, None]
    codes = torch.randint(0, 256, (rows, fmt.padded_columns), generator=draw) % top
    tensors = {
        "codes": pack_codes(codes.to(torch.uint8), fmt),
        "scales": pack_scales(torch.randint(1, 17, (rows, fmt.groups), generator=draw, dtype=torch.uint8)),
        "factors": torch.rand(rows, generator=draw).half() / 1000,
        "row_index": torch.randperm(rows, generator=draw).to(fmt.index_dtype),
    }
    return MixedLinear(PackedWeight.from_tensors(fmt, tensors))


def step_ms(modules: Sequence[nn.Module], inputs: Sequence[torch.Tensor], repeats: int) -> float:
    """Fewest milliseconds that one pass through all modules took."""
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for module, x in zip(modules, inputs, strict=True):
            module(x)
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def measure(layers: int, tokens: int, repeats: int) -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    shapes = SHAPES * layers
    out: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(tokens, columns, generator=draw).to(dtype) for _, columns in shapes]
        plain = [nn.Linear(columns, rows, bias=False, dtype=dtype) for rows, columns in shapes]
        name = str(dtype).removeprefix("torch.")
        out[f"original_{name}_ms"] = step_ms(plain, inputs, repeats)
        del plain
        compiled = [random_site(rows, columns, draw) for rows, columns in shapes]
        out[f"compiled_{name}_ms"] = step_ms(compiled, inputs, repeats)
    weights = sum(rows * columns for rows, columns in shapes)
    forms = [table_form(module.packed()) for module in compiled]
    out["stored_bits_per_weight"] = sum(m.fmt.stored_bits() for m in compiled) / weights
    out["table_bits_per_weight"] = 8 * sum(form.table.nbytes + form.scale.nbytes for form in forms) / weights
    return {key: round(value, 3) for key, value in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1, help="rows of activations per step")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        result = measure(options.layers, options.tokens, options.repeats)
    print(json.dumps({"torch": torch.__version__, **vars(options), **result}, indent=1))


if __name__ == "__main__":
    main()
