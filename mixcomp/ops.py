"""The one canonical linear op of captured graphs.

Capture turns ``linear``, ``addmm``, Conv1D and ``matmul`` with a parameter into ``mixcomp::linear``; passes look for
nothing else.  It is a composite op: fake tensors, autograd and every device come from the ATen ops it calls.
"""

from __future__ import annotations

import torch

_library = torch.library.Library("mixcomp", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor")


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)


_library.impl("linear", _linear, "CompositeImplicitAutograd")

LINEAR = torch.ops.mixcomp.linear.default
