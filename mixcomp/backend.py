"""``torch.compile(model, backend="mixcomp")``: a compiled model's Dynamo graph through the same program and verifier."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mixcomp import verify
from mixcomp.capture import capture_dynamo

log = logging.getLogger("mixcomp")


def mixcomp_backend(module: fx.GraphModule, example_inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """The Dynamo backend (registered by entry point).

    The graph becomes a program whose ``mixed_linear`` calls are its sites, passes the verifier, and runs as it is:
    compiled linears dispatch to their kernels, everything else runs eagerly.  A graph without a single compiled linear is
    worth a warning: the model was not compiled.  Shapes stay dynamic: Dynamo decides when to come back.

    Raises:
        InvariantError: the graph breaks an invariant, e.g. a call's segments do not add up to its rows.
    """
    program = capture_dynamo(module, example_inputs)
    verify.check(program)
    if program.sites and all(site.format is None for site in program.sites):
        first = program.sites[0].name
        log.warning("none of %d linears (%s ...) is compiled: call mixcomp.compile first", len(program.sites), first)
    return program.graph_module.forward
