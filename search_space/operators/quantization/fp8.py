"""Floating point of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mixnas.kernels.dispatch import keeping, use_triton
from mixnas.kernels.quantized_linear import FP8, epilogue, scaled_linear
from mixnas.search_space.operators.quantization.affine import EPSILON, straight_through
from mixnas.search_space.operators.quantization.projected import Projected, State
from mixnas.search_space.registry import register

GREATEST = 448.0
"""Of e4m3 without infinities."""


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, K) as e4m3, each scaled to the whole range: (M, K) float8, and (M, 1) float32."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).mul_(1 / GREATEST).clamp_min_(EPSILON)
    return (x * scale.reciprocal()).clamp_(-GREATEST, GREATEST).to(FP8), scale


def fake_fp8(x: Tensor) -> Tensor:
    """What `fp8_rows` stands for; gradients pass. (M, K) to the same."""
    rounded, scale = fp8_rows(x.detach())
    return straight_through(x, rounded.float() * scale)


@dataclass(frozen=True)
class _Ready:
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    made: dict[str, Tensor] = field(default_factory=dict)

    def widened(self) -> Tensor:
        """Float32, made once."""
        if "widened" not in self.made:
            with keeping():
                self.made["widened"] = self.weight.float()
        return self.made["widened"]


@register("quant", "fp8", paper="Micikevicius et al. 2022, FP8 Formats for Deep Learning (arXiv 2209.05433): e4m3")
@dataclass(frozen=True)
class E4M3(Projected):
    """Weights in e4m3 with a scale per output channel, activations with one per token that is found anew."""

    name: ClassVar[str] = "fp8"
    shares: ClassVar[bool] = True

    def store(self, weight: Tensor) -> State:
        """A byte a weight, four an output channel."""
        rounded, scale = fp8_rows(weight)
        return {"weight": rounded, "scale": scale.squeeze(1)}

    def ready(self, stored: State, bias: Tensor | None, inputs: int) -> _Ready:
        """See `Projected`."""
        return _Ready(stored["weight"], stored["scale"], bias)

    def enter(self, rows: Tensor, ready: _Ready) -> tuple[Tensor, Tensor]:
        """(M, K) float8 and (M, 1) scales."""
        return fp8_rows(rows)

    def product(self, entered: tuple[Tensor, Tensor], ready: _Ready) -> Tensor:
        """See `Projected`."""
        rounded, scale = entered
        if use_triton(scale):
            return scaled_linear(rounded, scale, ready.weight, ready.scale, ready.bias)
        return epilogue(F.linear(rounded.float(), ready.widened()), scale, ready.scale, ready.bias)

    def fake_weight(self, weight: Tensor) -> Tensor:
        """See `Projected`."""
        return fake_fp8(weight)

    def fake_input(self, rows: Tensor) -> Tensor:
        """See `Projected`."""
        return fake_fp8(rows)

    def instead(self, device: str, runtime: str) -> str:
        """Only a GPU's kernel multiplies fp8."""
        if device == "cuda" and runtime in ("eager", "graph"):
            return ""
        return "float32: what was rounded to fp8 is widened before it is multiplied"
