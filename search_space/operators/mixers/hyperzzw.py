"""Context-generated kernels: a small network makes a kernel from coordinates, and each image scales it."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.depthwise_conv1d import depthwise_conv1d
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d
from mixnas.search_space.operators.layers import Linear, normed
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, register


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """(places, inputs) to (places, outputs). Not a matrix product: what depends on no example is not among an
    example's multiply-accumulates."""
    return (x.unsqueeze(1) * weight).sum(dim=-1)


# The mean and the norm's statistics are over all positions, which in a causal network would show the future.
@register(
    "mixer",
    "hyperzzw",
    kinds=("image", "sequence"),
    paper="Zhang 2024, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction (arXiv "
    "2401.17948), the local operator",
    knobs={
        "kernel_size": Knob(7, choices=(3, 5, 7, 9)),
        "hidden": Knob(16, choices=(8, 16, 32), doc="channels of what makes the kernel"),
        "layers": Knob(2, choices=(1, 2, 3), doc="products of sines in it"),
        "frequency": Knob(1.0, low=0.01, high=2000.0, doc="of its sines at first; the authors' is 2000"),
    },
)
class HyperZZW(nn.Module):
    """gelu(norm(mix(depthwise(x)))) with the depthwise kernel K * mean of x, K = last(h_n)(c) at the window's places c.

    h_0 = sin(sines_0(c)), h_i = sin(sines_i(c)) * steps_i(h_{i-1}), on places from -1 to 1: a multiplicative filter
    network. A kernel times a number for each channel is the convolution's answer times it, and so it is computed. Of
    the paper's nine branches this is the local one; the global one multiplies maps as matrices, on square grids only.
    Only `mix` is a projection.
    """

    folds: ClassVar = (("norm", "mix"),)

    places: Tensor

    def __init__(self, context: Context, *, kernel_size: int, hidden: int, layers: int, frequency: float) -> None:
        super().__init__()
        axes, width = len(context.size), context.width
        self.extents = (kernel_size,) * axes
        along = torch.arange(kernel_size) - float(kernel_size // 2)
        places = torch.stack(torch.meshgrid(*[along] * axes, indexing="ij"), dim=-1).flatten(0, -2)
        self.register_buffer("places", places, persistent=False)
        self.sines, self.phases, self.steps, self.biases = (nn.ParameterList() for _ in range(4))
        for i in range(layers + 1):
            # Of a gamma distribution of shape 6 / (i + 1): half a sum of squares.
            spread = torch.randn(hidden, 1, 12 // (i + 1)).square().sum(dim=-1) / 2
            self.sines.append(2 * math.pi * frequency * spread * torch.empty(hidden, axes).uniform_(-1, 1) / axes)
            self.phases.append(torch.empty(hidden).uniform_(-math.pi, math.pi))
        for _ in range(layers):
            self.steps.append(torch.empty(hidden, hidden).uniform_(-1, 1) * (3 / hidden) ** 0.5)
            self.biases.append(torch.zeros(hidden))
        self.last = nn.Parameter(torch.randn(width, hidden) * (2 / hidden / len(places)) ** 0.5)
        self.last_bias = nn.Parameter(torch.zeros(width))
        self.mix, self.norm = Linear(width, width, bias=False), BatchNorm(context)

    def _kernel(self) -> Tensor:
        """(C, 1, *taps)."""
        exact = torch.promote_types(self.last.dtype, torch.float32)
        places = self.places.to(exact) / (self.extents[0] // 2)
        sines = [
            torch.sin(_linear(places, weight.to(exact)) + phase)
            for weight, phase in zip(self.sines, self.phases, strict=True)
        ]
        h = sines[0]
        for sine, step, bias in zip(sines[1:], self.steps, self.biases, strict=True):
            h = sine * (_linear(h, step) + bias)
        made = _linear(h, self.last) + self.last_bias
        return made.T.unsqueeze(1).unflatten(2, self.extents)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        kernel, mean = self._kernel().to(x.dtype), x.mean(dim=tuple(range(1, x.dim() - 1)), keepdim=True)
        y = (depthwise_conv1d(x, kernel, causal=False) if x.dim() == 3 else depthwise_conv2d(x, kernel)) * mean
        return F.gelu(normed(self.norm, self.mix(y)))
