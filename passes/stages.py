"""A captured graph cut at its decoder layers, so that one layer can be run, compared and differentiated at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mixcomp.errors import CalibrationError
from mixcomp.ops import LINEAR
from mixcomp.passes.causal import causal_attention
from mixcomp.program import META, Program

#: a module path down to the first number in it: ``model.layers.7`` of ``model.layers.7.mlp.up_proj``
_NUMBERED = re.compile(r"(.*?)\.(\d+)(?:\.|$)")

Values = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A run of the graph's nodes as a module of its own: ``module(*inputs, *weights of sites, *norms) -> outputs``.

    ``inputs`` and ``outputs`` are names of values; ``sites`` are the open sites called here, whose weights are handed in.
    ``norms`` maps the path of every norm's weight and bias read here to the original's, floating[n]; see ``_is_norm``.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sites: tuple[str, ...]
    norms: Mapping[str, torch.Tensor]

    def run(self, values: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> Values:
        """The outputs by name; ``weights`` maps a site to its weight in canonical order, floating[rows, columns], and
        may hold norms, which otherwise are the original's."""
        given = [values[name] for name in self.inputs]
        norms = (weights.get(path, original) for path, original in self.norms.items())
        made = self.module(*given, *(weights[name] for name in self.sites), *norms)
        return dict(zip(self.outputs, made, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """What comes before the first layer, every layer, and what comes after the last one."""

    parts: tuple[Stage, ...]
    tokens: str
    logits: str

    @property
    def layers(self) -> range:
        """Numbers of the parts that are decoder layers."""
        return range(1, len(self.parts) - 1)

    def forward(self, weights: Callable[[Stage], Mapping[str, torch.Tensor]], tokens: torch.Tensor) -> list[Values]:
        """What the last part reads, for each window of tokens int64[samples, length] by itself.

        All windows go through a part before the next one: ``weights`` are asked for once a part, and only what later
        parts read stays alive.
        """
        found: list[Values] = [{self.tokens: window} for window in tokens.split(1)]
        for k, part in enumerate(self.parts[:-1], start=1):
            own = weights(part)
            needed = {name for later in self.parts[k:] for name in later.inputs}
            for values in found:
                values.update(part.run(values, own))
                for name in values.keys() - needed:
                    del values[name]
            del own  # before the next part's are made
        return found

    def live(self, part: int) -> tuple[str, ...]:
        """Values made in layers before ``part`` and still needed by it or a later part: the hidden state, as a rule."""
        made = {name for one in self.parts[1:part] for name in one.outputs}
        needed = {name for one in self.parts[part:] for name in one.inputs}
        return tuple(sorted(made & needed))


def split(program: Program, *, layers: bool = True, length: int | None = None) -> Stages:
    """Cut a program's graph where a new decoder layer begins, by the module paths that capture left on the nodes.

    A graph without numbered layers becomes a single layer between an empty beginning and an empty end.  Without
    ``layers`` all of it is one part.  With ``length`` the parts are for windows of so many tokens, and attend to them
    faster where they can; see ``causal_attention``.
    """
    graph = program.graph_module.graph if length is None else causal_attention(program.graph_module, length)
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    number, last = _numbers(nodes) if layers else (dict.fromkeys(nodes, 0), 0)
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    logits = _first_tensor(result)
    if all(user.op == "output" for user in logits.users):
        number[logits] = last  # also where the last layer makes them: whoever reads ``logits`` finds them in one place
    sites = {s.name for s in program.open_sites()}
    parts = [[n for n in nodes if number[n] == i] for i in range(last + 1)]
    made = tuple(_part(program.graph_module, part, number, i, logits, sites) for i, part in enumerate(parts))
    tokens = next(n for n in graph.nodes if n.op == "placeholder")
    return Stages(made, tokens.name, logits.name)


def _numbers(nodes: list[fx.Node]) -> tuple[dict[fx.Node, int], int]:
    """Part of every node: 0 before the first layer, 1.. in the layers, one more after the last; and that last number."""
    places = [_NUMBERED.match(_path(n)) for n in nodes]
    counts = Counter(p[1] for p in places if p)
    if not counts:
        return dict.fromkeys(nodes, 1), 2
    stem = counts.most_common(1)[0][0]
    inside = [i for i, p in enumerate(places) if p and p[1] == stem]
    out: dict[fx.Node, int] = {}
    seen: list[str] = []
    for i, (node, place) in enumerate(zip(nodes, places, strict=True)):
        if i > inside[-1]:
            out[node] = len(seen) + 1
            continue
        if place and place[1] == stem and place[2] not in seen:
            seen.append(place[2])
        # sizes are not hidden states: a later layer may use what an earlier one worked out
        size = not isinstance(node.meta.get("val"), torch.Tensor) and all(
            out.get(a, 0) == 0 for a in node.all_input_nodes
        )
        out[node] = 0 if size else len(seen)
    return out, len(seen) + 1


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _first_tensor(result: object) -> fx.Node:
    if isinstance(result, fx.Node):
        return result
    if isinstance(result, (tuple, list)):
        return _first_tensor(result[0])
    raise CalibrationError(f"the model's output starts with {result!r:.80}, not with logits; MixComp needs logits")


def _part(
    owner: fx.GraphModule,
    nodes: list[fx.Node],
    number: Mapping[fx.Node, int],
    part: int,
    logits: fx.Node,
    sites: set[str],
) -> Stage:
    """One stage: values from outside become placeholders, parameters stay, weights of open sites and norms come last."""
    own = set(nodes)
    used = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in own))
    called = list(dict.fromkeys(n.meta[META] for n in nodes if n.target is LINEAR and n.meta.get(META) in sites))
    inputs = [n for n in used if n.op != "get_attr"]
    outputs = [n for n in nodes if n is logits or any(number[u] > part for u in n.users if u.op != "output")]
    read = {n: _attribute(owner, str(n.target)) for n in used if n.op == "get_attr"}
    # detached, so that the user's parameters collect no gradients
    held = {str(n.target): t.detach() if isinstance(t, torch.Tensor) else t for n, t in read.items()}
    norms = {str(n.target): held[str(n.target)] for n, t in read.items() if _is_norm(n, t)}
    graph = fx.Graph()
    copies = {n: graph.placeholder(n.name) for n in inputs}
    weights = {name: graph.placeholder(f"weight_{i}") for i, name in enumerate(called)}
    given = {path: graph.placeholder(f"norm_{i}") for i, path in enumerate(norms)}
    copies |= {n: given.get(str(n.target)) or graph.get_attr(str(n.target)) for n in read}
    for node in nodes:
        new = graph.node_copy(node, lambda n: copies[n])
        if node.target is LINEAR and node.meta.get(META) in weights:
            new.args = (new.args[0], weights[node.meta[META]], new.args[2], False)
        copies[node] = new
    graph.output(tuple(copies[n] for n in outputs))
    graph.eliminate_dead_code()
    module = fx.GraphModule(held, graph, "Stage")
    return Stage(module, tuple(n.name for n in inputs), tuple(n.name for n in outputs), tuple(called), norms)


def _attribute(owner: fx.GraphModule, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(owner.get_submodule(path), name)


def _is_norm(node: fx.Node, read: Any) -> bool:
    """Whether a node reads the weight or bias of a norm: a one-dimensional parameter that no call of a site reads."""
    vector = isinstance(read, nn.Parameter) and read.dim() == 1 and read.is_floating_point()
    return vector and not any(META in user.meta for user in node.users)
