"""scale-channels: channels of activations scaled against the widths of the weights that read them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch

from mixcomp.format import GROUP
from mixcomp.passes.channels import Channels, scalable
from mixcomp.passes.gptq import feedback
from mixcomp.passes.stacks import BATCH_BYTES, inputs, stack
from mixcomp.program import Fact, Program, Site
from mixcomp.protocol import Context, Pass
from mixcomp.quant import group_columns

#: the exponent of the mean that stands for the largest weight of a group: differentiable, and nearly as large
_SHARP = 12
#: a channel is scaled by this at most: fp16 norms and factors stay far from their ends
_MOST = 64.0
_TINY = torch.finfo(torch.float32).tiny
#: bits of a row whose width is not known
_USUAL = 4.0
#: squared step of a token's 8-bit codes over its mean square, the square of its largest number taken for 40 of them, over 12
_TOKENS = 40 / 127**2 / 12


@dataclass(frozen=True)
class ScaleChannels(Pass):
    """Multiply columns by s and divide by s where their channels are made: the same function, easier to quantize.

    AWQ's scaling (Lin et al. 2024), but with the best s instead of one power of the activations.  The weights of a group
    share a step, which the largest sets; D_j is what no other column makes good of column j's error, ``1 / U_jj^2`` of
    GPTQ's factor.  Rounding a row c costs it ::

        loss_c(s)  ~  sum_g max_{j in g} (w_cj s_j)^2 * sum_{j in g} D_j / s_j^2

    A row that costs less is given fewer bits, so where bits have a price ``sum_c log loss_c`` counts, and gamma drops out;
    at given widths ``sum_c gamma_c 4^-width_c loss_c`` does.  All factors are log-convex in log s, hence one optimum, found
    by Adam from s = 1.  What ``assign-precision`` predicts of SmolLM2-135M at 4.40 and 3.35 bits, two cores: as they are
    .03176, .1333; s = E[x^2]^(alpha/2) with the best alpha .02958, .1256; ``sum_c gamma_c loss_c`` .02979, .1265; this
    .02910, .1245.

    Where activations are to be 8-bit integers with one scale a token (``lowering.int8``), large channels cost every other
    one, which s evens out.  Both roundings of a row are then counted in one unit, with the token's largest number taken
    for sqrt(40) times its root mean square::

        loss_c(s) / (3 (2^w - 1)^2)  +  40 / (12 127^2) * mean_j S_jj / s_j^2 * sum_j (w_cj s_j)^2

    w is 4 where widths are free.  With the widths that rows were given, KL at 4.40 bits was .0467 on 8,192 tokens of
    validation text, with 4 for all .0454, and scaled as for other activations .0516 (with those: .0389, .0377, .0384).

    Nothing is lost: a norm's new weight w' is rounded to its dtype first, and s = w / w' then.  Groups form in stored
    order, so the pass runs again once columns are reordered; it always starts from the originals.

    Before: statistics.  After, for what ``channels.scalable`` finds in the graph, which stays as it is::

        mul_3/scale             fp32[1536]   columns of down are multiplied by it, see Program.scaled_weight
        layers.0.up/row_scale   fp32[1536]   rows of up are divided by it
        rms/scale               fp32[576]    columns of q, k, v; "<parameter>/norm" is the new weight of the norm before

    Options:
        widths: ``free``: rows are given widths by a price; ``given``: the table holds them.
        steps, rate: of Adam on log s; the rate falls linearly to 0.
        activations: ``int8`` counts their rounding too.
    """

    name: ClassVar[str] = "scale-channels"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS})
    clobbers: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED, Fact.BRANCHED})

    widths: Literal["free", "given"] = "free"
    steps: int = 60
    rate: float = 0.05
    activations: str = "native"

    def run(self, program: Program, context: Context) -> Program:
        made = (*(f"{s.input}/scale" for s in program.sites), *(f"{s.name}/row_scale" for s in program.sites))
        norms = (f"{path}/norm" for path in program.norms())
        program = program.with_tensors({}, drop=frozenset((*made, *norms)))
        found: dict[str, torch.Tensor] = {}
        for batch in context.track("scale channels", _batches(program, context.device)):
            problems = [_problems(program, channels, self, context.device) for channels in batch]
            logs = self._search([_Problem.together(own) for own in zip(*problems, strict=True)], batch[0].count)
            for channels, own in zip(batch, logs, strict=True):
                found.update(_folded(program, channels, own.exp().clamp(1 / _MOST, _MOST)))
        return program.with_tensors(found)

    def _search(self, problems: list[_Problem], count: int) -> torch.Tensor:
        """log s fp32[batch, channels] that loses least in all ``problems`` together."""
        batch, device = len(problems[0].column), problems[0].column.device
        logs = torch.zeros(batch, count, device=device, requires_grad=True)
        adam = torch.optim.Adam([logs], lr=self.rate, eps=1e-20)  # losses are tiny
        with torch.enable_grad():
            for done in range(self.steps):
                adam.param_groups[0]["lr"] = self.rate * (1 - done / self.steps)
                adam.zero_grad()
                torch.stack([own.loss(logs) for own in problems]).sum().backward()
                adam.step()
        return logs.detach()


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """The groups of one input in stored order, for all sites that read it; ``together``, a batch of those of one shape.

    ``reach`` fp32[batch, groups, rows, columns of a group]: |w|^p relative to the group's largest; ``size`` fp32[batch,
    groups, rows]: that largest squared; ``remains`` fp32[batch, groups, columns of a group]: D; ``column`` int64 of that
    shape: the channel that is read, one beyond the last where a short group ends; ``price`` fp32[batch, rows]: gamma, None
    where widths are free; ``noise`` fp32[batch, rows]: what a row's loss is multiplied by at its width, None where that
    does not matter.  With 8-bit activations ``power`` fp32[batch, groups, rows, columns of a group]: w^2, and ``energy``
    fp32[batch, groups, columns of a group]: S_jj over the number of columns; else None.
    """

    reach: torch.Tensor
    size: torch.Tensor
    remains: torch.Tensor
    column: torch.Tensor
    price: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    power: torch.Tensor | None = None
    energy: torch.Tensor | None = None

    @classmethod
    def together(cls, parts: tuple[_Problem, ...]) -> _Problem:
        every = ([getattr(part, f.name) for part in parts] for f in fields(cls))
        return cls(*(None if values[0] is None else torch.stack(values) for values in every))  # type: ignore[arg-type]

    def loss(self, logs: torch.Tensor) -> torch.Tensor:
        """What rounding loses with channels scaled by exp(logs), fp32[batch, channels]."""
        own = torch.nn.functional.pad(logs, (0, 1)).gather(1, self.column.flatten(1)).view(self.column.shape)
        grown = torch.matmul(self.reach, (own * _SHARP).exp()[..., None])[..., 0].pow(2 / _SHARP)
        rows = (self.size * grown * (self.remains * (-2 * own).exp()).sum(-1, keepdim=True)).sum(1)
        rows = rows if self.noise is None else rows * self.noise
        if self.power is not None and self.energy is not None:
            tokens = torch.matmul(self.power, (2 * own).exp()[..., None])[..., 0].sum(1)
            rows = rows + tokens * (self.energy * (-2 * own).exp()).sum((1, 2))[:, None] * _TOKENS
        return rows.clamp_min(_TINY).log().sum() if self.price is None else (rows * self.price).sum()


def _batches(program: Program, device: torch.device) -> list[list[Channels]]:
    """Channels whose problems have one shape, as many together as ``BATCH_BYTES`` allows: a GPU wants large steps."""
    rows = {name: sum(site.rows for site in sites) for name, sites in inputs(program).items()}
    waiting: dict[tuple[object, ...], list[Channels]] = {}
    out = []
    for channels in scalable(program):
        shape = (channels.count, channels.repeats, *(rows[name] for name in _inputs(program, channels)))
        batch = waiting.setdefault(shape, [])
        batch.append(channels)
        weights = sum(shape[2:]) * channels.count * channels.repeats
        if (len(batch) + 1) * weights * 4 > BATCH_BYTES[device.type]:
            out.append(waiting.pop(shape))
    return out + list(waiting.values())


def _inputs(program: Program, channels: Channels) -> tuple[str, ...]:
    return tuple(dict.fromkeys(program.site(reader).input for reader in channels.readers))


def _problems(program: Program, channels: Channels, how: ScaleChannels, device: torch.device) -> list[_Problem]:
    """One per activation that the readers read: most often it is a single one."""
    by_input = inputs(program)
    return [_problem(program, channels, name, by_input[name], how, device) for name in _inputs(program, channels)]


def _problem(
    program: Program, channels: Channels, name: str, sites: tuple[Site, ...], how: ScaleChannels, device: torch.device
) -> _Problem:
    rows = stack(program, name, sites, device)
    known = feedback(rows.sigma, sites[0].name)
    remains = torch.empty_like(known.factor[0])
    remains[known.order] = known.factor.diagonal().square().reciprocal()
    column, order = channels.columns().to(device), program.find(sites[0].name, "column_order")
    column = column if order is None else column[order.to(device)]
    weight = group_columns(rows.weight).transpose(0, 1).abs()
    largest = weight.amax(-1)
    reach = (weight / largest.clamp_min(_TINY)[..., None]).pow(_SHARP)
    column = torch.nn.functional.pad(column, (0, -len(column) % GROUP), value=channels.count).view(-1, GROUP)
    made = _Problem(reach, largest.square(), group_columns(remains[None])[0], column)
    width = torch.full((len(rows.weight),), _USUAL, device=device)
    if how.widths == "given":
        own = (program.tensor(s.name, "widths").to(device).float().view(s.rows, -1).mean(1) for s in sites)
        gamma, width = torch.cat([program.gamma(site, device) for site in sites]), torch.cat([*own])
        made = replace(made, price=gamma, noise=(-2 * width).exp2())
    if how.activations == "native":
        return made
    energy = rows.sigma.diagonal(dim1=-2, dim2=-1).flatten() / len(remains)
    noise = (2**width - 1).square().reciprocal() / 3
    return replace(made, noise=noise, power=weight.square(), energy=group_columns(energy[None])[0])


def _folded(program: Program, channels: Channels, s: torch.Tensor) -> dict[str, torch.Tensor]:
    """Factors s fp32[channels] in the table: where channels are made, and in the columns that read them."""
    out: dict[str, torch.Tensor] = {}
    for i, vector in enumerate(channels.norm):
        own = program.graph_module.get_parameter(vector.path).detach()
        exact = own.double() + vector.constant
        new = (exact / s.to(own.device) - vector.constant).to(own.dtype)
        if i == 0:  # a norm's weight says what s can be, its bias follows
            left = exact / (new.double() + vector.constant)
            sound = left.isfinite() & (left > 0) & new.isfinite()
            s, new = torch.where(sound, left, 1.0).float().to(s.device), torch.where(sound, new, own)
        out[f"{vector.path}/norm"] = new
    if channels.site is not None:
        out[f"{channels.site}/row_scale"] = s
    columns = s[channels.columns().to(s.device)]
    return out | {f"{program.site(reader).input}/scale": columns for reader in channels.readers}
