"""Transforms that leave the function of a model alone, applied before it is compiled: do they help ``joint``?

    python benchmarks/transforms.py MODEL --calibration calib_c4.txt calib_wikipedia.txt --text wikitext2_raw_test.txt \
        --out benchmarks/transforms_h100.json

    plain          nothing
    channels       the product's own scale-channels
    scale          AWQ's channel scaling (Lin et al. 2024): columns times s, the operation before them by 1/s: norms into
                   q/k/v and gate/up, rows of up into down, rows of v into o (shared by the heads that read them).
                   s = E[x^2]^(alpha/2), alpha searched for every group of sites that read one activation, by the
                   weighted second-order loss of GPTQ at the width next to the budget
    rotate         the residual stream times an orthogonal matrix (QuaRot, SpinQuant): random signs, a Hadamard matrix
                   over the power of two in its size and a random orthogonal one over the rest; norms' weights are folded
                   into the linears first, the head is untied
    rotate heads   values and what o reads of them, inside every head
    rotate both    the last two

Everything runs in fp32, so that a transformed weight is no coarser than the original; KL is against the original model,
and ``kl_uncompressed`` shows what the transform alone does (rounding).  Effort fast.  Needs a Llama-like module tree.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from common import Results, Setting, parser

from mixcomp.config import Budget
from mixcomp.format import WIDTHS
from mixcomp.passes import AnnotateSalience, AssignPrecision, ScaleChannels
from mixcomp.passes.directions import error_loss
from mixcomp.passes.gptq import Task, feedback, gptq
from mixcomp.passes.stacks import Stack, batches, stack
from mixcomp.program import Program
from mixcomp.protocol import Context
from mixcomp.quant import concatenate, dequantize, fit_grid
from mixcomp.sources import load_original, pick_device

METHODS = ("plain", "channels", "scale", "rotate", "rotate heads", "rotate both")
EXPONENTS = tuple(i / 10 for i in range(11))
#: of E[x^2] next to its mean: channels that are never used are not blown up
LEAST_ENERGY = 1e-6


def orthogonal(size: int, draw: torch.Generator) -> torch.Tensor:
    """fp64[size, size]: signs x (orthogonal over the odd part of the size (x) Hadamard over the power of two)."""
    power = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1))) / 2**0.5
    odd, _ = torch.linalg.qr(torch.randn(size // power, size // power, generator=draw, dtype=torch.float64))
    signs = torch.randint(0, 2, (size, 1), generator=draw).double() * 2 - 1
    return signs * torch.kron(odd.contiguous(), hadamard)  # qr hands out columns first


def _product(*factors: torch.Tensor) -> torch.Tensor:
    """Multiplied in fp64, back in the first one's dtype."""
    dtype = factors[0].dtype if factors[0].dtype != torch.float64 else factors[1].dtype
    return torch.linalg.multi_dot([f.double() for f in factors]).to(dtype)


@torch.no_grad()
def untie(model: Any) -> None:
    """A head of its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False


@torch.no_grad()
def fold_norms(model: Any) -> None:
    """Weights of norms into the linears that read them; the norms are left with ones."""
    untie(model)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        _fold(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    _fold(model.model.norm, model.get_output_embeddings())


def _fold(norm: Any, *readers: Any) -> None:
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1.0)


@torch.no_grad()
def rotate_residual(model: Any, draw: torch.Generator) -> None:
    """Hidden states h become h Q: RMSNorm without weights commutes with Q."""
    fold_norms(model)
    device = model.get_input_embeddings().weight.device
    q = orthogonal(model.config.hidden_size, draw).to(device)
    readers, writers = [model.get_output_embeddings()], []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers += [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
        writers += [attention.o_proj, mlp.down_proj]
    for reader in (model.get_input_embeddings(), *readers):
        reader.weight.copy_(_product(reader.weight, q))
    for writer in writers:
        writer.weight.copy_(_product(q.T, writer.weight))
        if writer.bias is not None:
            writer.bias.copy_((writer.bias.double() @ q).to(writer.bias.dtype))


@torch.no_grad()
def rotate_heads(model: Any, draw: torch.Generator) -> None:
    """Values v of a head become v Q, and o reads v Q Q^T; attention only mixes values of different tokens."""
    for layer in model.model.layers:
        v, o = layer.self_attn.v_proj, layer.self_attn.o_proj
        size = layer.self_attn.head_dim
        q = orthogonal(size, draw).to(v.weight.device)
        heads = v.weight.view(-1, size, v.weight.shape[1])
        v.weight.copy_((q.T @ heads.double()).to(v.weight.dtype).reshape(v.weight.shape))
        if v.bias is not None:
            v.bias.copy_((v.bias.view(-1, size).double() @ q).to(v.bias.dtype).flatten())
        columns = o.weight.view(len(o.weight), -1, size)
        o.weight.copy_((columns.double() @ q).to(o.weight.dtype).reshape(o.weight.shape))


def shared_energy(energy: torch.Tensor, name: str, model: Any) -> torch.Tensor:
    """E[x^2] of a site's columns, fp32[columns]; for o the mean over the heads that read the same values."""
    if name.endswith("o_proj"):
        size, values, _ = _heads(model)
        mean = energy.view(values, -1, size).mean(1, keepdim=True)
        energy = mean.expand(-1, energy.numel() // (values * size), -1).flatten()
    return energy.clamp_min(float(energy.mean()) * LEAST_ENERGY)


def _heads(model: Any) -> tuple[int, int, int]:
    """(features of a head, heads of values, heads of queries)."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size, config.num_key_value_heads, config.num_attention_heads


def factors_of(energy: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = energy^(alpha/2), geometric mean 1."""
    logs = energy.log() * (alpha / 2)
    return (logs - logs.mean()).exp()


@torch.no_grad()
def search(program: Program, context: Context, model: Any, width: int) -> dict[str, tuple[float, torch.Tensor]]:
    """First site of every activation -> the exponent that loses least at one width, and its factors fp32[columns]."""
    found: dict[str, tuple[float, torch.Tensor]] = {}
    for batch in batches(program, context.device, 1):
        stacks = [stack(program, *one, context.device) for one in batch]
        energies = [shared_energy(rows.sigma.diagonal(), rows.sites[0].name, model) for rows in stacks]
        least = [float("inf")] * len(stacks)
        for alpha in EXPONENTS:
            scaled = [_scaled(rows, factors_of(e, alpha)) for rows, e in zip(stacks, energies, strict=True)]
            for i, loss in enumerate(_losses(program, context, scaled, width)):
                if loss < least[i]:
                    least[i] = loss
                    found[stacks[i].sites[0].name] = (alpha, factors_of(energies[i], alpha))
    return found


def _scaled(rows: Stack, s: torch.Tensor) -> Stack:
    return Stack(rows.sites, rows.weight * s, rows.sigma / torch.outer(s, s))


def _losses(program: Program, context: Context, stacks: list[Stack], width: int) -> list[float]:
    """Weighted second-order loss of every stack at one width; scaling rows by 1/s changes nothing, their factors do it."""
    tasks = []
    for rows in stacks:
        energy = rows.sigma.diagonal()
        grid = concatenate([fit_grid(w, energy, width, site.name) for site, w in rows.split(rows.weight)])
        tasks.append(Task(rows.weight, grid, feedback(rows.sigma, rows.sites[0].name)))
    out = []
    for rows, task, (codes, _) in zip(stacks, tasks, gptq(tasks), strict=True):
        gamma = torch.cat([program.tensor(s.name, "gamma") for s in rows.sites]).to(context.device)
        out.append(float(error_loss(rows.weight - dequantize(codes, task.grid), rows.sigma, gamma)))
    return out


@torch.no_grad()
def scale(model: Any, factors: dict[str, torch.Tensor]) -> None:
    """Columns of sites times s, what comes before them by 1/s; ``factors`` by the first site of every activation."""
    size, values, queries = _heads(model)
    for i, layer in enumerate(model.model.layers):
        attention, mlp, path = layer.self_attn, layer.mlp, f"model.layers.{i}"
        s = factors[f"{path}.self_attn.q_proj"]
        _columns(s, attention.q_proj, attention.k_proj, attention.v_proj)
        layer.input_layernorm.weight.div_(s)
        s = factors[f"{path}.mlp.gate_proj"]
        _columns(s, mlp.gate_proj, mlp.up_proj)
        layer.post_attention_layernorm.weight.div_(s)
        s = factors[f"{path}.mlp.down_proj"]
        _columns(s, mlp.down_proj)
        _rows(s, mlp.up_proj)
        s = factors[f"{path}.self_attn.o_proj"]
        _columns(s, attention.o_proj)
        _rows(s.view(values, queries // values, size)[:, 0].flatten(), attention.v_proj)


def _columns(s: torch.Tensor, *readers: Any) -> None:
    for reader in readers:
        reader.weight.mul_(s)


def _rows(s: torch.Tensor, writer: Any) -> None:
    writer.weight.div_(s[:, None])
    if writer.bias is not None:
        writer.bias.div_(s)


def next_width(budget: float) -> int:
    """The width whose stored bits are next to a budget: scales take about 0.15 bits."""
    return min(WIDTHS, key=lambda width: abs(width + 0.15 - budget))


class Bench:
    """The original in fp32, and models made of it, captured once each."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.original = load_original(arguments.model, pick_device(arguments.device)).float()
        self.settings: dict[Any, tuple[Setting, Program, dict[str, Any]]] = {}

    def prepared(self, method: str, width: int) -> tuple[Setting, Program, dict[str, Any]]:
        """A transformed model with prices, and what is to be told of the transform."""
        key = (method, width if method == "scale" else 0)
        if key not in self.settings:
            model, more = copy.deepcopy(self.original), {}
            draw = Context(seed=self.arguments.seed).generator("rotation")
            if method in ("rotate", "rotate both"):
                rotate_residual(model, draw)
            if method in ("rotate heads", "rotate both"):
                rotate_heads(model, draw)
            if method == "scale":
                plain, _, _ = self.prepared("plain", width)
                found = search(plain.program, plain.context, plain.model, width)
                more["exponents"] = {name: alpha for name, (alpha, _) in found.items()}
                scale(model, {name: s for name, (_, s) in found.items()})
            setting = Setting.start(self.arguments, model, self.original)
            scores = setting.judge.score_model(model)
            more["kl_uncompressed"] = {name: score["kl"] for name, score in scores.items()}
            first = (ScaleChannels(),) if method == "channels" else ()
            self.settings[key] = (setting, setting.run(setting.program, *first, AnnotateSalience()), more)
        return self.settings[key]

    def row(self, method: str, budget: float) -> dict[str, Any]:
        setting, priced, more = self.prepared(method, next_width(budget))
        return {**setting.judged(setting.quantize(setting.run(priced, AssignPrecision(Budget(budget))))), **more}


def main(given: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--budgets", type=float, nargs="+", default=[4.4, 3.35, 2.6])
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    arguments = made.parse_args(given)
    results = Results(arguments, "python benchmarks/transforms.py")
    bench = Bench(arguments)
    for method in arguments.methods:
        for budget in arguments.budgets:
            results.make({"method": method, "budget": budget}, partial(bench.row, method, budget))
    results.finish()


if __name__ == "__main__":
    main()
