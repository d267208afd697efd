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
    compiled linears dispatch to their kernels, everything else runs eagerly.  Linears that ``mixcomp.compile`` has not
    touched stay plain; they are named in the log.  Shapes stay dynamic: Dynamo decides when to come back.

    Raises:
        InvariantError: the graph breaks an invariant, e.g. a call's segments do not add up to its rows.
    """
    program = capture_dynamo(module, example_inputs)
    verify.check(program)
    plain = [site.name for site in program.sites if site.format is None]
    if plain:
        log.warning("%d linears run uncompiled (first: %s); compile the model first", len(plain), plain[0])
    return program.graph_module.forward
