"""A policy with a parameter of its own, to test with: int8 weights, a learned step for each output channel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space import registry
from mixnas.search_space.architecture import Op
from mixnas.search_space.operators.layers import Conv, Linear
from mixnas.search_space.operators.quantization.policy import deployed_bytes, replace_projections

NAME = "toy_int8"
QUANT = Op(NAME)


class _Step(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.step = nn.Parameter(weight.detach().abs().flatten(1).amax(1).clamp(min=1e-8) / 127)

    def rounded(self, weight: Tensor) -> Tensor:
        """Whole numbers times steps; gradients pass the rounding."""
        step = self.step.view(-1, *[1] * (weight.dim() - 1))
        scaled = (weight / step).clamp(-127, 127)
        return (scaled + (scaled.round() - scaled).detach()) * step


def _product(layer: Linear | Conv, x: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 2:
        return F.linear(x, weight, layer.bias)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, layer.bias, layer.stride, layer.padding)
    return y.permute(0, 2, 3, 1)


class _Fake(nn.Module):
    """Computes with rounded weights, on the layer's own parameters."""

    def __init__(self, layer: Linear | Conv) -> None:
        super().__init__()
        self.stride, self.padding = getattr(layer, "stride", None), getattr(layer, "padding", None)
        self.weight, self.bias = layer.weight, layer.bias
        setattr(self, NAME, _Step(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        return _product(self, x, getattr(self, NAME).rounded(self.weight))


class _Stored(nn.Module):
    """Computes with what the device stores."""

    def __init__(self, fake: _Fake) -> None:
        super().__init__()
        self.stride, self.padding, self.bias = fake.stride, fake.padding, fake.bias
        step = getattr(fake, NAME).step.detach()
        self.register_buffer("scale", step.view(-1, *[1] * (fake.weight.dim() - 1)).clone())
        whole = (fake.weight.detach() / self.scale).clamp(-127, 127).round()
        self.register_buffer("weight", whole.to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return _product(self, x, self.weight * self.scale)


@dataclass(frozen=True)
class ToyInt8:
    """See the module."""

    def prepare(self, module: nn.Module) -> nn.Module:
        return replace_projections(module, _Fake)

    def deploy(self, module: nn.Module) -> nn.Module:
        for path, layer in [*module.named_modules()]:
            if isinstance(layer, _Fake):
                if not path:
                    return _Stored(layer)
                parent, _, name = path.rpartition(".")
                setattr(module.get_submodule(parent), name, _Stored(layer))
        return module

    def weight_bytes(self, module: nn.Module) -> int:
        return deployed_bytes(self, module)

    def why_not(self, device: str, runtime: str) -> str:
        return ""

    def instead(self, device: str, runtime: str) -> str:
        return "float32"


@contextmanager
def registered() -> Iterator[None]:
    """The policy stands in the registry only within it, so that no other test meets it."""
    registry.register("quant", NAME, paper="Esser et al. 2019, Learned Step Size Quantization (arXiv 1902.08153)")(
        ToyInt8
    )
    try:
        yield
    finally:
        del registry._operators["quant", NAME]
