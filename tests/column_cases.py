"""Blocks of columns to round, for the eager code on a CPU and the kernel under the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixcomp.format import GROUP


@dataclass(frozen=True)
class Block:
    """Arguments of ``round_columns``; ``bases`` None is coordinate descent."""

    values: torch.Tensor
    codes: torch.Tensor
    matrix: torch.Tensor
    steps: torch.Tensor
    bases: torch.Tensor | None
    tops: torch.Tensor
    start: int

    def copy(self, device: str = "cpu") -> Block:
        """All tensors anew; what was one tensor stays one."""
        made = {k: v.to(device, copy=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        if self.values is self.codes:
            made["codes"] = made["values"]
        return Block(**{**vars(self), **made})

    def arguments(self) -> tuple:
        return tuple(vars(self).values())


def block(seed: int, tasks: int, columns: int, rows: int, start: int, *, feedback: bool, dyadic: bool) -> Block:
    """Random; ``dyadic``: every product and quotient on the way is exact in fp32, so that any order of sums is right."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-columns // GROUP)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    tops = torch.randint(2, 7, (tasks, groups, rows), generator=draw)
    tops = (2**tops - 1).float()
    if dyadic:
        values = torch.randint(-64, 65, (tasks, columns, rows), generator=draw) / 8
        # few couplings, powers of two: amounts keep their bits
        matrix = torch.randint(-1, 2, (tasks, columns, columns), generator=draw) / 2
        matrix *= torch.rand(matrix.shape, generator=draw) < 2 / columns
        steps = 2.0 ** torch.randint(-2, 2, (tasks, groups, rows), generator=draw)
        pivots = 2.0 ** torch.randint(-1, 2, (tasks, columns), generator=draw)
    else:
        values, matrix = normal(tasks, columns, rows), normal(tasks, columns, columns) / columns**0.5
        steps = normal(tasks, groups, rows).abs() / 4 + 0.05
        pivots = normal(tasks, columns).abs() + 0.5
    matrix.diagonal(dim1=1, dim2=2).copy_(pivots)
    bases = (tops / 2).floor() if dyadic else tops / 2
    if feedback:
        return Block(values, values, matrix, steps, bases, tops, start)
    codes = (torch.rand(values.shape, generator=draw) * 4).floor()
    return Block(values, codes, matrix, steps, None, tops, start)


#: tasks, columns, rows, start: whole blocks, short last ones, single columns, rows that fill no program
SHAPES = ((1, 64, 32, 0), (2, 160, 33, 64), (2, 160, 7, 128), (1, 65, 40, 64), (3, 100, 70, 64), (1, 31, 1, 0))
