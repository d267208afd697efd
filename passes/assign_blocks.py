"""assign-blocks: SliM-LLM's widths, one per block of input columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mixcomp.errors import BudgetError, ConfigError
from mixcomp.format import GROUPS, Scales
from mixcomp.passes import slim
from mixcomp.passes.decision import Assignment, Decision, Decisions
from mixcomp.passes.directions import error_loss
from mixcomp.passes.gptq import Feedback, feedback
from mixcomp.passes.rounding import round_mix
from mixcomp.profiles import shared_format
from mixcomp.program import Program, Site
from mixcomp.protocol import Context

#: N whose neighbours N - 1 and N + 1 are widths too
MIDDLES = (2, 3, 4, 5)


@dataclass(frozen=True)
class AssignBlocks(Assignment):
    """As many blocks at N - 1 as at N + 1 bits, their number by a scan per site; N is the largest that the budget holds.

    The rest of the budget makes more N + 1 than N - 1 blocks, the same share of blocks in every site, most salient
    first, so that plans of equal bytes can be compared.  ``Budget(N, count="payload")`` is the paper's setting: exactly N
    code bits per weight, and no rest.

    Before: statistics and, for ``score="kl"``, samples.  After, the same graph and in the table::

        layers.0.q_proj/widths         uint8[576, 5]   width of every row and column group
        layers.0.q_proj/{group, scale_kind}            columns per group, 1: an fp16 scale and integer zero per group
        layers.0.q_proj/{planned_bits, planned_rank}
        budget/{bits, price, gap, loss}                price and gap are 0: nothing is priced

    Options:
        budget, fixed: see ``Assignment``.
        group: columns of a block: 32, 64 or 128.
        score: ``kl`` of softmaxed outputs of samples (the paper), or ``quadratic``: tr(E S E^T), second moments only.
        scale_kind: 1 (the paper) or 0, two-level scales.
    """

    name: ClassVar[str] = "assign-blocks"

    group: int = 128
    score: Literal["kl", "quadratic"] = "kl"
    scale_kind: int = 1

    def span(self, site: Site, index: bool) -> tuple[int, int]:
        if self.group not in GROUPS:
            raise ConfigError(f"group {self.group!r} of assign-blocks is not one of {GROUPS}")
        blocks = -(-site.columns // self.group)
        most = torch.full((blocks,), MIDDLES[-1] + 1)
        return self._bits(site, self._widest_split(site, MIDDLES[0])), self._bits(site, most)

    def decide(
        self, program: Program, sites: tuple[Site, ...], index: Mapping[str, bool], room: int, context: Context
    ) -> Decisions:
        salience, widths, middle = {}, {}, self._middle(sites, room)
        read, known = "", None
        for site in context.track("block widths", sites):
            if known is None or read != site.input:  # sites that read one activation follow each other
                sigma = program.sigma(site.input, context.device)
                read, known = site.input, feedback(sigma, site.name)
            salience[site.name], widths[site.name] = self._split(program, site, sigma, known, middle)
        chosen = self._spend_rest(sites, widths, salience, middle, room)
        scales = Scales(self.scale_kind)
        made = {n: Decision(w.repeat(program.site(n).rows, 1), 0, self.group, scales) for n, w in chosen.items()}
        return Decisions(made, sum(self._loss(program, s, chosen[s.name], context.device) for s in sites))

    def _bits(self, site: Site, widths: torch.Tensor) -> int:
        fmt = shared_format(site.rows, site.columns, tuple(widths.tolist()), self.group, Scales(self.scale_kind))
        return fmt.bits(self.budget.count)

    def _widest_split(self, site: Site, middle: int) -> torch.Tensor:
        """The split that costs most: all have as many bits of codes, but 1-bit groups need offsets and wide ones zeros."""
        pairs = slim.pairing(torch.zeros(-(-site.columns // self.group)), site.columns, self.group)
        return slim.split_widths(pairs, -(-site.columns // self.group), middle, len(pairs))

    def _middle(self, sites: tuple[Site, ...], room: int) -> int:
        fits = [n for n in MIDDLES if sum(self._bits(s, self._widest_split(s, n)) for s in sites) <= room]
        if not fits:
            raise BudgetError(
                f"budget {self.budget} does not hold {MIDDLES[0]} bits in blocks of {self.group}; raise it"
            )
        return fits[-1]

    def _split(
        self, program: Program, site: Site, sigma: torch.Tensor, known: Feedback, middle: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Salience fp64[blocks] and widths uint8[blocks]."""
        weight = program.scaled_weight(site, sigma.device)
        salience = slim.block_salience(slim.element_salience(weight, known), self.group)
        pairs = slim.pairing(salience, site.columns, self.group)
        if self.score == "kl":
            x = program.tensor(site.input, "samples").to(sigma.device)
            scores = slim.divergences(x, weight, pairs, middle, self.group)
        else:
            scores = slim.quadratic_errors(sigma, weight, pairs, middle, self.group)
        count = int(scores.argmin())
        return salience, slim.split_widths(pairs, len(salience), middle, count)

    def _spend_rest(
        self,
        sites: tuple[Site, ...],
        widths: Mapping[str, torch.Tensor],
        salience: Mapping[str, torch.Tensor],
        middle: int,
        room: int,
    ) -> dict[str, torch.Tensor]:
        """The largest common share of blocks, and then one more block here and there in graph order."""

        def wider(site: Site, extra: int) -> torch.Tensor:
            return slim.widened(widths[site.name], salience[site.name], middle, extra)

        def bits(share: float) -> int:
            return sum(self._bits(s, wider(s, int(share * len(widths[s.name])))) for s in sites)

        low, high = 0.0, 1.0
        for _ in range(20):
            share = (low + high) / 2
            low, high = (share, high) if bits(share) <= room else (low, share)
        out = {s.name: wider(s, int(low * len(widths[s.name]))) for s in sites}
        left = room - sum(self._bits(s, out[s.name]) for s in sites)
        for site in sites:
            more = wider(site, int(low * len(widths[site.name])) + 1)
            cost = self._bits(site, more) - self._bits(site, out[site.name])
            if cost <= left:
                out[site.name], left = more, left - cost
        return out

    def _loss(self, program: Program, site: Site, widths: torch.Tensor, device: torch.device) -> float:
        weight = program.scaled_weight(site, device)
        sigma, gamma = program.sigma(site.input, device), program.gamma(site, device)
        return float(error_loss(weight - round_mix(weight, self.group, widths.tolist()), sigma, gamma))
