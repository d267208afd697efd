"""What flows between passes: a captured graph, its sites, a table of tensors, and the facts established so far.

All types are frozen; a pass makes the next value with ``dataclasses.replace``.  Big tensors live in ``Program.tensors``
under ``"<site>/<what>"``, ``"<input>/<what>"`` or ``"<parameter>/norm"`` and are never changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import fx

from mixcomp.errors import PassError
from mixcomp.format import GROUP, Scales

if TYPE_CHECKING:
    from mixcomp.format import SiteFormat

#: ``node.meta[META]`` holds the name of the node's site; nothing else of ours is kept in ``meta``
META = "mixcomp"


class Fact(Enum):
    """What is known about a program.  Every fact has an executable check in ``verify``."""

    STATISTICS = "statistics"  #: "<input>/sigma" and "<site>/gamma" of every open site
    SALIENCE = "salience"  #: "<site>/salience": loss of every row at every width
    ASSIGNED = "assigned"  #: "<site>/widths": one width per row, within the budget
    REORDERED = "reordered"  #: "<site>/row_order" and "<site>/column_order" where they are not the identity
    QUANTIZED = "quantized"  #: Site.format and the packed tensors
    BRANCHED = "branched"  #: side branches are final
    LOWERED = "lowered"  #: canonical linears of compiled sites are ``mixcomp::mixed_linear`` calls


@dataclass(frozen=True, slots=True)
class WeightRef:
    """A weight by identity, not by name.

    ``key`` is the parameter's path in the user's model, ``aliases`` every other path that shares its storage,
    ``shape`` is canonical (rows = output features, columns = input features); ``transposed`` says that the
    parameter itself is (columns, rows), as in GPT-2's Conv1D.
    """

    key: str
    aliases: tuple[str, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Site:
    """One linear weight and all its call nodes.

    ``name`` is the module path that owns the weight; ``input`` names the activation it reads (sites with the same
    ``input`` share second moments); ``reason`` is set where the site is left alone, and says why; ``in_scope`` tells
    whether its bits count against the budget; ``activations`` is what its lowered calls multiply with.
    """

    name: str
    calls: tuple[str, ...]
    weight: WeightRef
    bias: str | None
    input: str
    in_scope: bool = True
    reason: str | None = None
    format: SiteFormat | None = None
    activations: str = "native"

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    @property
    def layout(self) -> SiteFormat:
        """The site's format, for code that runs after ``quantize-weights``."""
        if self.format is None:
            raise PassError(f"site {self.name!r} is not quantized yet; run quantize-weights first")
        return self.format

    @property
    def open(self) -> bool:
        """Whether passes are to compile this site."""
        return self.reason is None and self.in_scope


@dataclass(frozen=True, slots=True)
class Step:
    """One line of history: a pass that ran."""

    spec: str
    seconds: float
    changed: bool


@dataclass(frozen=True, eq=False)
class Program:
    """A graph with its sites.  ``graph_module`` shares parameters with the user's model and never writes to them."""

    graph_module: fx.GraphModule
    sites: tuple[Site, ...]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))
    facts: frozenset[Fact] = frozenset()
    history: tuple[Step, ...] = ()

    def open_sites(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.open)

    def site(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise PassError(f"no site is called {name!r}; sites are {[s.name for s in self.sites][:5]} ...")

    def tensor(self, owner: str, what: str) -> torch.Tensor:
        key = f"{owner}/{what}"
        if key not in self.tensors:
            raise PassError(f"tensor {key!r} is not in the program; the pass that makes it has not run")
        return self.tensors[key]

    def find(self, owner: str, what: str) -> torch.Tensor | None:
        return self.tensors.get(f"{owner}/{what}")

    def norms(self) -> dict[str, torch.Tensor]:
        """New weights and biases of norms, ``<parameter>/norm``: the parameter's path -> its value to be."""
        split = ((key.rpartition("/"), tensor) for key, tensor in self.tensors.items())
        return {path: tensor for (path, _, what), tensor in split if what == "norm"}

    def stored_form(self, site: Site) -> tuple[int, Scales]:
        """Columns of a group and kind of scales: ``<site>/group`` and ``<site>/scale_kind``, where they are planned."""
        group, kind = self.find(site.name, "group"), self.find(site.name, "scale_kind")
        if kind is not None and int(kind) not in {*Scales}:
            raise PassError(
                f"site {site.name!r}: scale_kind {int(kind)} is none of {[f'{k:d} {k.text}' for k in Scales]}"
            )
        return GROUP if group is None else int(group), Scales.TWO_LEVEL if kind is None else Scales(int(kind))

    def weight(self, site: Site) -> torch.Tensor:
        """The original weight as (rows, columns); a view of the user's parameter, so read only."""
        parameter = self.graph_module.get_parameter(self.graph_key(site))
        return parameter.t() if site.weight.transposed else parameter

    def scaled_weight(self, site: Site, device: torch.device) -> torch.Tensor:
        """What is to be stored, fp32[rows, columns] on ``device``: the original with scaled channels, columns times
        ``<input>/scale`` and rows divided by ``<site>/row_scale``, where they are."""
        weight = self.weight(site).detach().to(device, torch.float32)
        columns, rows = self.find(site.input, "scale"), self.find(site.name, "row_scale")
        weight = weight if columns is None else weight * columns.to(device)
        return weight if rows is None else weight / rows.to(device)[:, None]

    def sigma(self, name: str, device: torch.device) -> torch.Tensor:
        """Second moments fp32[columns, columns] of what the sites with input ``name`` read, its channels scaled."""
        sigma, scale = self.tensor(name, "sigma").to(device), self.find(name, "scale")
        return sigma if scale is None else sigma / torch.outer(scale.to(device), scale.to(device))

    def gamma(self, site: Site, device: torch.device) -> torch.Tensor:
        """How strongly the loss reacts to a site's outputs fp32[rows], its rows scaled."""
        gamma, scale = self.tensor(site.name, "gamma").to(device), self.find(site.name, "row_scale")
        return gamma if scale is None else gamma * scale.to(device).square()

    def graph_key(self, site: Site) -> str:
        """Name under which the graph module holds the weight."""
        node = self.node(site.calls[0])
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            raise PassError(f"site {site.name!r}: node {node.name} does not take its weight from the module")
        return str(weight.target)

    def node(self, name: str) -> fx.Node:
        found: fx.Node | None = next((n for n in self.graph_module.graph.nodes if n.name == name), None)
        if found is None:
            raise PassError(f"graph has no node {name!r}")
        return found

    def with_sites(self, changed: Mapping[str, Site]) -> Program:
        return replace(self, sites=tuple(changed.get(s.name, s) for s in self.sites))

    def with_tensors(self, new: Mapping[str, torch.Tensor], drop: frozenset[str] = frozenset()) -> Program:
        kept = {k: v for k, v in self.tensors.items() if k not in drop}
        return replace(self, tensors=MappingProxyType({**kept, **new}))

    def clone(self) -> Program:
        """A program whose graph can be rewritten freely; parameters and tensors are shared."""
        graph = fx.Graph(tracer_cls=self.graph_module.graph._tracer_cls)
        output = graph.graph_copy(self.graph_module.graph, val_map={}, return_output_node=False)
        old = next(n for n in self.graph_module.graph.nodes if n.op == "output")
        graph.output(output)
        next(n for n in graph.nodes if n.op == "output").meta.update(old.meta)
        graph.set_codegen(self.graph_module.graph._codegen)
        return replace(
            self, graph_module=fx.GraphModule(self.graph_module, graph, self.graph_module.__class__.__name__)
        )
