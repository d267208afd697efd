"""Backward passes of a captured model that keep the activations of one part of its graph at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

import torch

from mixcomp.ops import LINEAR
from mixcomp.passes.in_order import in_order
from mixcomp.passes.stages import Stage, Stages, Values, split
from mixcomp.passes.watch import FORWARD_TOKENS, Tap, Watch
from mixcomp.program import META, Program

#: bytes of activations that one backward pass may keep alive
BACKWARD_BYTES = 8 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Backward:
    """The parts of a graph, and how many ``tokens`` a pass may take.

    The whole graph is one part if its activations for the usual number of tokens fit into ``BACKWARD_BYTES``.  Otherwise
    every decoder layer is one, and all but the last are run twice: a third more arithmetic, but whole windows of a large
    model, many at a time.
    """

    stages: Stages
    weights: Mapping[str, torch.Tensor]
    tokens: int

    @classmethod
    def of(cls, program: Program, device: torch.device) -> Backward:
        usual = FORWARD_TOKENS[device.type]
        stages = split(program, layers=False)
        if usual * _token_bytes(program, stages) > BACKWARD_BYTES:
            stages = split(program)
        tokens = min(usual, BACKWARD_BYTES // max(1, _token_bytes(program, stages)))
        return cls(stages, {s.name: program.weight(s).detach() for s in program.open_sites()}, tokens)

    def run(self, tokens: torch.Tensor, residual: Callable[[torch.Tensor], torch.Tensor], see: Tap) -> None:
        """Send ``residual(logits)``, the loss's gradient there, back to every open site; tokens int64[windows, length].

        ``see(site, x, g)`` gets what every call of a site read, and the gradient of what it made.
        """
        tap = _hooked(self.weights, see)
        values: Values = {self.stages.tokens: tokens}
        gradients: Values = {}
        moved: set[str] = set()  # values that a site has a part in: only these need gradients
        *earlier, last = self.stages.parts
        for part in earlier:
            with torch.no_grad():
                values.update(self._watched(part, values, _ignore))
            if part.sites or not moved.isdisjoint(part.inputs):
                moved.update(part.outputs)
        for part in (last, *reversed(earlier)):
            leaves = {name: _leaf(values[name]) for name in moved.intersection(part.inputs)}
            with torch.enable_grad(), in_order(), warnings.catch_warnings():
                # torch's own thread meets the GPU here first, sets itself up and says so to the user
                warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
                made = self._watched(part, values | leaves, tap)
                if part is last:
                    logits = made[self.stages.logits]
                    gradients[self.stages.logits] = residual(logits.detach())
                reached = [name for name in part.outputs if name in gradients and made[name].requires_grad]
                torch.autograd.backward([made[n] for n in reached], [gradients[n] for n in reached])
            for name in part.outputs:  # the parts that read them are through
                values.pop(name, None)
                gradients.pop(name, None)
            for name, leaf in leaves.items():
                if isinstance(leaf, torch.Tensor) and leaf.grad is not None:
                    gradients[name] = gradients[name] + leaf.grad if name in gradients else leaf.grad

    def _watched(self, part: Stage, values: Mapping[str, torch.Tensor], tap: Tap) -> Values:
        watch = Watch(part.module, tap, values[self.stages.tokens].device)
        given = [values[name] for name in part.inputs]
        weights = (self.weights[name] for name in part.sites)
        made = watch.run(*given, *weights, *map(watch.wide, part.norms.values()))
        return dict(zip(part.outputs, made, strict=True))


def _hooked(sites: Container[str], see: Tap) -> Tap:
    """What shows ``see`` the inputs of sites and the gradients of their outputs."""

    def tap(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        if name not in sites:
            return
        if not y.requires_grad:  # nothing before it does
            y.requires_grad_()
        y.register_hook(lambda g: see(name, x, g))

    return tap


def _token_bytes(program: Program, stages: Stages) -> int:
    """Activations of a token in the largest part: inputs and outputs of linears, and twice as much beside them."""
    sites = {s.name: 3 * (s.rows + s.columns) * s.weight.dtype.itemsize for s in program.sites}
    calls = ([n.meta.get(META) for n in p.module.graph.nodes if n.target is LINEAR] for p in stages.parts)
    return max(sum(sites.get(name, 0) for name in names) for names in calls)


def _leaf(value: torch.Tensor) -> torch.Tensor:
    """A value from an earlier part as the start of a graph of its own; sizes and integers stay."""
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if floats else value


def _ignore(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
    """Nobody watches the first run."""
