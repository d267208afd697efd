"""Learning one decoder layer at a time, by gradients of the error of its output: what the tune passes share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar

import torch

from mixcomp.passes.descent import descend
from mixcomp.passes.distill import Teacher, Texts
from mixcomp.passes.stages import Values
from mixcomp.passes.tunable import Quantized, Settled, stored_tensors
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context, Pass, Semantics


@dataclass(frozen=True)
class LayerByLayer(Pass):
    """Learn numbers of stored weights by gradients, one decoder layer after another.

    A layer's inputs come from the quantized layers before it, its targets from the original model; the squared error of
    every output feature counts by ``gamma``, how strongly the loss reacts to it, and that of every token by the norm of
    its gradient, ``Teacher.strengths``.  What was learned is kept only if
    KL(original || quantized) on calibration windows that took no part is smaller with it; a program without a site to
    learn comes back as it is.  Finished layers are kept in ``Context.memory``, and not learned again from there.

    Options:
        steps: of Adam per layer; rates fall linearly to 0.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS, Fact.BRANCHED})
    semantics: ClassVar[Semantics] = Semantics.LOSSY

    steps: int = 250

    @abstractmethod
    def learns(self, site: Site) -> bool:
        """Whether the form a site is stored in is one that this pass learns."""

    @abstractmethod
    def tunable(self, program: Program, site: Site, device: torch.device) -> Quantized:
        """What is learned of a site, at its start."""

    @abstractmethod
    def rates(self) -> dict[str, float]:
        """First full step of every learned tensor."""

    def run(self, program: Program, context: Context) -> Program:
        if not any(map(self.learns, program.open_sites())):
            return program
        texts = Texts.of(context)
        teacher = Teacher.of(program, texts.learn.shape[1])
        changed = program.with_tensors(self._layers(program, teacher, texts, context))
        ends = teacher.ends(texts.held)
        before, after = (teacher.distance(p, texts.held, ends) for p in (program, changed))
        return changed if after < before else program

    def _layers(self, program: Program, teacher: Teacher, texts: Texts, context: Context) -> dict[str, torch.Tensor]:
        stages, out = teacher.stages, dict[str, torch.Tensor]()
        strengths = teacher.strengths(texts, context.generator(self.name, "labels"))
        work = self._digest(program, texts, context) if context.memory else ""
        norms = program.norms()
        given: Values = {}
        exact: Values = {}
        for k in context.track(self.name.replace("-", " "), stages.layers):
            part = stages.parts[k]
            wanted = self._through(teacher, k, teacher.weights, exact, texts)
            tuned = {name: self._start(program, program.site(name), context.device) for name in part.sites}
            if any(one.learned() for one in tuned.values()):
                done = context.memory.load(f"{work}-{k}") if context.memory else None
                if done is None:
                    importance = _importance(program, part.sites, wanted)
                    batches = _Batches(teacher, k, texts, norms, given, wanted, importance, strengths)
                    self._learn(tuned, batches, context.generator(self.name, str(k)))
                    done = stored_tensors(tuned)
                    if context.memory:
                        context.memory.save(f"{work}-{k}", done)
                out |= {key: tensor.to(context.device) for key, tensor in done.items()}
            stored = program.with_tensors(out)
            weights = {name: Settled.of(stored, program.site(name), context.device).weight() for name in part.sites}
            given, exact = self._through(teacher, k, norms | weights, given, texts), wanted
        return out

    def _digest(self, program: Program, texts: Texts, context: Context) -> str:
        """Of all that learning depends on."""
        found = sha256(f"{self.spec()} {context.seed} {texts.given}".encode())
        for site in program.open_sites():
            own = (program.tensor(site.name, name) for name in site.layout.tensors())
            for tensor in (program.scaled_weight(site, context.device), *own):
                found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        found.update(texts.learn.cpu().numpy().data)
        return f"{self.name}-{found.hexdigest()[:32]}"

    def _start(self, program: Program, site: Site, device: torch.device) -> Quantized:
        return self.tunable(program, site, device) if self.learns(site) else Settled.of(program, site, device)

    def _learn(self, tuned: Mapping[str, Quantized], batches: _Batches, draw: torch.Generator) -> None:
        picks = batches.texts.picks(self.steps, draw)
        descend(tuned.values(), self.rates(), picks, lambda pick: batches.loss(tuned, pick).backward())

    @torch.no_grad()
    def _through(
        self, teacher: Teacher, k: int, weights: Mapping[str, torch.Tensor], given: Values, texts: Texts
    ) -> Values:
        """What layers up to ``k`` leave to later ones, for all windows."""
        found: dict[str, list[torch.Tensor]] = {}
        for rows in torch.arange(len(texts.learn)).split(texts.batch):
            values = _inputs(teacher, weights, given, texts, rows)
            values.update(teacher.stages.parts[k].run(values, weights))
            for name in teacher.stages.live(k + 1):
                found.setdefault(name, []).append(values[name])
        return {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Batches:
    """Inputs and targets of layer ``k``, beside ``norms``; ``importance`` fp32[features] weighs the features of its
    outputs, ``strengths`` fp32[windows, length] the tokens of each."""

    teacher: Teacher
    k: int
    texts: Texts
    norms: Mapping[str, torch.Tensor]
    given: Values
    wanted: Values
    importance: torch.Tensor | None
    strengths: Values

    def loss(self, tuned: Mapping[str, Quantized], rows: torch.Tensor) -> torch.Tensor:
        """Mean weighted squared error of the layer's outputs on some windows."""
        weights = {**self.norms, **{name: one.weight() for name, one in tuned.items()}}
        values = _inputs(self.teacher, self.norms, self.given, self.texts, rows)
        made = self.teacher.stages.parts[self.k].run(values, weights)
        total = torch.zeros((), device=self.texts.learn.device)
        for name in made.keys() & self.wanted.keys():
            error = (made[name].float() - self.wanted[name][rows].float()).square()
            error = error if self.importance is None else error * self.importance
            if name in self.strengths:
                error = error * self.strengths[name][rows, :, None]
            total = total + error.mean()
        return total


@torch.no_grad()
def _inputs(
    teacher: Teacher, weights: Mapping[str, torch.Tensor], given: Values, texts: Texts, rows: torch.Tensor
) -> Values:
    """Everything a layer may read: the part before the layers is run again, hidden states are looked up.  It calls no
    site, so ``weights`` need hold no more than new norms."""
    values = {teacher.stages.tokens: texts.learn[rows]}
    values.update(teacher.stages.parts[0].run(values, {**teacher.weights, **weights}))
    values.update({name: value[rows] for name, value in given.items()})
    return values


def _importance(program: Program, sites: tuple[str, ...], wanted: Values) -> torch.Tensor | None:
    """gamma of the layer's last linear, which writes into the residual stream; None where shapes say otherwise."""
    gamma = program.tensor(sites[-1], "gamma")
    fits = all(value.is_floating_point() and value.shape[-1] == len(gamma) for value in wanted.values())
    return gamma.to(next(iter(wanted.values())).device) / gamma.mean() if fits and float(gamma.mean()) > 0 else None
