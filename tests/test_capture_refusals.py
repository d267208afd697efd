"""What capture leaves alone, with a reason, and what it refuses, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from mixcomp.capture import capture
from mixcomp.errors import CaptureError, InputError, MixCompError, WeightError
from mixcomp.format import Segment, SiteFormat
from mixcomp.lowering.module import MixedLinear
from mixcomp.packed import PackedWeight, pack_codes
from mixcomp.program import META
from nets import Branching, Net, ids, open_names, run

pytest_plugins = ["nets"]
pytestmark = pytest.mark.usefixtures("seeded")


# ---- left alone, with a reason


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) * 1.5


class Clamped(nn.Linear):
    """On small inputs the same as a Linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias).clamp(-1e6, 1e6)


class Listed(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) if x.dim() == 3 else [super().forward(x)]


class Computed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * 2, self.bias)


class Raw(nn.Module):
    """A parameter of a module that does more."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(32, 48))
        self.norm = nn.LayerNorm(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x @ self.up)


class Backwards(nn.Module):
    """The activation on the right."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight @ x.mT).mT


class Unturned(nn.Linear):
    """A permutation that changes nothing is no transpose."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.permute(0, 1)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.stack[0] + x @ self.stack[1]) / 2


class Foreign(nn.Module):
    """Reads the weight of a child instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x @ self.weight, self.weight)


class Measured(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.weight.mean()


def buffered() -> nn.Module:
    layer = nn.Linear(32, 32, bias=False)
    weight = layer.weight.data
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


def expanded() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(torch.randn(1, 32).expand(32, 32))
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.register_forward_hook(lambda module, args, out: None)
    return layer


def overridden() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.forward = layer.forward  # type: ignore[method-assign]
    return layer


def overlapping() -> nn.Module:
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    memory = torch.randn(48, 32)
    first.weight, second.weight = nn.Parameter(memory[:32]), nn.Parameter(memory[16:])
    return nn.Sequential(first, second)


def differing_biases() -> nn.Module:
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    return nn.Sequential(first, second)


def quantized() -> nn.Module:
    class Int8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-128, 127, (32, 32), dtype=torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.codes.float() * 0.01)

    return Int8()


ALONE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "fp64": (lambda: nn.Linear(32, 32).double(), "layers.0", "torch.float64, none of float32"),
    "small": (lambda: nn.Linear(32, 15), "layers.0", "15 x 32 is too small: a side is below 16"),
    "buffer": (buffered, "layers.0", "not a plain parameter"),
    "expanded": (expanded, "layers.0", "an expanded weight"),
    "overlapping": (overlapping, "layers.0.1", "shares part of its memory"),
    "biases": (differing_biases, "layers.0.0", "different biases share the weight: layers.0.0.bias, layers.0.1.bias"),
    "hooks": (hooked, "layers.0", "layers.0 has hooks"),
    "overridden": (overridden, "layers.0", "forward of layers.0 is overridden"),
    "scaled": (lambda: Scaled(32, 32), "layers.0", "a Scaled, is not x W^T + b: it also calls mul"),
    "clamped": (lambda: Clamped(32, 32), "layers.0", "a Clamped, is not x W^T + b: it also calls clamp"),
    "listed": (lambda: Listed(32, 32), "layers.0", "a Listed, is not x W^T + b"),
    "computed": (lambda: Computed(32, 32), "layers.0", "a computed weight"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(32, 32)), "layers.0", "a computed weight"),
    "int8": (quantized, "layers.0.codes", "a computed weight"),
    "raw": (Raw, "layers.0.up", "holds more than a weight and a bias"),
    "backwards": (Backwards, "layers.0", "an unusual product: matmul"),
    "unturned": (lambda: Unturned(32, 32, bias=False), "layers.0", "a computed weight or an unusual product"),
    "experts": (Experts, "layers.0.stack", "a stacked weight [2, 32, 32] read by matmul"),
    "foreign": (Foreign, "layers.0.inner", "is multiplied in layers.0, not in the module"),
    "both ways": (BothWays, "layers.0", "both as it is and transposed"),
    "also read": (lambda: Measured(32, 32), "layers.0", "also read by mean"),
}


@pytest.mark.parametrize("case", ALONE)
def test_left_alone_with_a_reason(case: str) -> None:
    build, name, reason = ALONE[case]
    layer = build()
    dtype = torch.float64 if case == "fp64" else torch.float32
    model = Net(layer)
    model.embed.to(dtype)
    program = capture(model, min_coverage=0)
    site = program.site(name)
    assert reason in (site.reason or "")
    assert site.in_scope
    assert not program.open_sites()
    if case == "experts":
        assert site.weight.shape == (2 * 32, 32)
    assert all(program.node(call).meta[META] == name for call in site.calls)
    torch.testing.assert_close(run(program, ids(2, 3)), model(ids(2, 3)), rtol=1e-6, atol=1e-6)
    with pytest.raises(CaptureError, match=r"only 0\.0%"):
        capture(model)


# ---- refusals


def compiled_before() -> nn.Module:
    fmt = SiteFormat(32, 32, (Segment(32, 4),))
    codes, scales = torch.zeros(32, 32, dtype=torch.uint8), torch.zeros(32, 1, dtype=torch.uint8)
    return Net(MixedLinear(PackedWeight(fmt, pack_codes(codes, fmt), scales, torch.ones(32).half())))


class ShortOnly(Net):
    """Takes another way beyond 64 tokens."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * (2 if ids.shape[1] > 64 else 1)


class Constant(nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float()


def in_place_compiled() -> nn.Module:
    model = Net(nn.Linear(32, 32))
    model.layers[0].compile(backend="eager")
    return model


def with_value(value: float) -> nn.Module:
    model = Net(nn.Linear(32, 32))
    with torch.no_grad():
        model.layers[0].weight[3, 5] = model.layers[0].weight[9, 0] = value
    return model


REFUSED: dict[str, tuple[Callable[[], Any], type[MixCompError], str]] = {
    "a path": (lambda: "model.pt", InputError, "a str, not a torch.nn.Module"),
    "a class": (lambda: Net, InputError, r"the class Net; pass an instance"),
    "torch.compile": (
        lambda: torch.compile(Net(nn.Linear(32, 32)), backend="eager"),
        InputError,
        "the model has been through torch.compile",
    ),
    "compile()": (in_place_compiled, InputError, r"layers\.0 has been through torch.compile"),
    "compiled before": (compiled_before, InputError, r"layers\.0 is a MixedLinear"),
    "meta": (lambda: Net(nn.Linear(32, 32)).to("meta"), InputError, r"3 tensors .* embed\.weight, layers\.0\.weight"),
    "no linear": (Constant, InputError, "no linear layer"),
    "NaN": (lambda: with_value(torch.nan), WeightError, r"layers\.0\.weight holds 2 values .* the first at \(3, 5\)"),
    "infinity": (lambda: with_value(-torch.inf), WeightError, r"layers\.0\.weight holds 2 values"),
    "branch on data": (lambda: Branching(nn.Linear(32, 32)), CaptureError, r"(?s)nets\.py.*if ids\.sum\(\) > 0"),
    "branch on length": (lambda: ShortOnly(nn.Linear(32, 32)), CaptureError, "graph and model differ by"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    build, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        capture(build())


def test_several_devices_are_named() -> None:
    model = Net(nn.Linear(32, 32))
    model.layers[0].register_buffer("elsewhere", torch.zeros(1))
    devices = {id(model.layers[0].elsewhere): torch.device("cuda", 1)}
    with pytest.MonkeyPatch.context() as patch:
        real = torch.Tensor.device
        fake = property(lambda t: devices.get(id(t)) or real.__get__(t))  # no second device here: one that claims to be
        patch.setattr(torch.Tensor, "device", fake)
        with pytest.raises(InputError, match=r"2 devices \(embed\.weight on cpu, layers\.0\.elsewhere on cuda:1\)"):
            capture(model)


def test_excluding_a_broken_layer_leaves_it_alone() -> None:
    model = with_value(torch.nan)
    model.layers.append(nn.Linear(32, 32))
    assert open_names(capture(model, exclude=["layers.0"])) == ["layers.1"]
