"""Coordinate descent on what GPTQ left: group scales and codes in turn, never to a greater loss.

GPTQ decides a column once, before it knows how later columns are rounded, and takes the scales as given.  With
``E = W - Q`` and ``G = E H`` the loss ``tr(E H E^T)`` is quadratic in every single stored number, so each can be set to
its best value while all others stand still (as QuantEase does for codes, Behdin et al. 2023):

    code          q + G_j / (H_jj step)           rounded to a level
    group scale   m + (G_g . u) / (u H_gg u^T)    rounded to 1..16; u: the group's weights at scale 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixcomp.format import GROUP, MAX_GROUP_SCALE
from mixcomp.passes.columns import BLOCK, round_columns
from mixcomp.passes.gptq import Task, numbers, restore

#: the first round takes 6 to 12 % of a layer's loss away, the next ones about 2.5, 1.2 and 0.8 %
ROUNDS = 4


def refine(
    tasks: Sequence[Task], codes: Sequence[torch.Tensor], scales: Sequence[torch.Tensor | None]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Better codes and group scales for matrices of one shape, side by side as in ``gptq``.

    Args:
        tasks: as ``gptq`` got them.
        codes: uint8[rows, columns] of each.
        scales: uint8[rows, groups] of each, or None where steps are not a multiple of a group scale per 32 columns.

    Returns:
        Per task what takes the place of codes and scales.
    """
    state = _State.of(tasks, codes, scales)
    for _ in range(ROUNDS):
        if any(own is not None for own in scales):
            state.fit_scales()
        state.fit_codes()
    return state.split(tasks, scales)


@dataclass(slots=True, eq=False)
class _State:
    """Columns in rounding order come first, so that one column of all rows lies together.

    codes fp32[tasks, columns, rows]; unit, scale, limit, offset, top fp32[tasks, blocks, rows]: the step of a block of
    32 columns is ``unit * scale``, and ``limit`` the largest scale allowed; hessian fp32[tasks, columns, columns];
    pull fp32[tasks, columns, rows] is G.
    """

    codes: torch.Tensor
    unit: torch.Tensor
    scale: torch.Tensor
    limit: torch.Tensor
    offset: torch.Tensor
    top: torch.Tensor
    hessian: torch.Tensor
    pull: torch.Tensor

    @classmethod
    def of(cls, tasks: Sequence[Task], codes: Sequence[torch.Tensor], scales: Sequence[torch.Tensor | None]) -> _State:
        step, offset, top = (torch.stack(part) for part in zip(*map(numbers, tasks), strict=True))
        scale, limit = torch.ones_like(step), torch.ones_like(step)
        for i, (task, own) in enumerate(zip(tasks, scales, strict=True)):
            if own is not None:
                scale[i], limit[i] = own[:, task.known.order[::GROUP] // GROUP].T, MAX_GROUP_SCALE
        held = torch.stack([c.T[t.known.order] for t, c in zip(tasks, codes, strict=True)]).float()
        weight = torch.stack([t.weight.T[t.known.order] for t in tasks])
        hessian = torch.stack([t.known.hessian for t in tasks])
        # a stored step is an fp16 factor times at most 16: fp32 holds it exactly, so dividing gives the factor back
        state = cls(held, step / scale, scale, limit, offset, top, hessian, weight)
        state.pull = hessian @ (weight - state._levels() * _columns(step, held))
        return state

    def fit_scales(self) -> None:
        """Every group's scale in turn, codes as they are."""
        levels = self._levels()
        for k in range(self.scale.shape[1]):
            own = slice(k * GROUP, (k + 1) * GROUP)
            moved = levels[:, own] * self.unit[:, k, None]
            curve = ((self.hessian[:, own, own] @ moved) * moved).sum(1)
            best = self.scale[:, k] + (self.pull[:, own] * moved).sum(1) / curve.clamp_min(_TINY)
            best = best.round_().clamp_(min=1).minimum(self.limit[:, k])
            change = (best - self.scale[:, k])[:, None] * moved
            self.scale[:, k] = best
            self.pull.baddbmm_(self.hessian[:, :, own], change, alpha=-1)

    def fit_codes(self) -> None:
        """Every code in turn, scales as they are."""
        step = self.unit * self.scale
        for start in range(0, self.codes.shape[1], BLOCK):
            change = round_columns(self.pull, self.codes, self.hessian, step, None, self.top, start)
            self.pull.baddbmm_(self.hessian[:, :, start : start + change.shape[1]], change, alpha=-1)

    def split(
        self, tasks: Sequence[Task], scales: Sequence[torch.Tensor | None]
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Codes and scales of every task in the order of its columns."""
        out: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for task, codes, scale, old in zip(tasks, self.codes, self.scale, scales, strict=True):
            new = None
            if old is not None:
                new = torch.empty_like(old)
                new[:, task.known.order[::GROUP] // GROUP] = scale.T.to(torch.uint8)
            out.append((restore(codes.to(torch.uint8), task.known.order), new))
        return out

    def _levels(self) -> torch.Tensor:
        return self.codes - _columns(self.offset, self.codes)


_TINY = torch.finfo(torch.float32).tiny


def _columns(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[tasks, blocks, rows] -> [tasks, columns, rows]."""
    return blocks.repeat_interleave(GROUP, 1)[:, : like.shape[1]]
