"""Parameterised hypercomplex convolution: a dense kernel from a few smaller ones and a learned algebra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import window_conv
from mixnas.search_space.registry import Context, Knob, Value, register


def _divides(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if context.width % int(knobs["parts"]):
        return f"{knobs['parts']} parts do not divide width {context.width}"
    return None


@register(
    "mixer",
    "hypercomplex_conv",
    kinds=("image", "sequence"),
    paper="Grassucci et al. 2022, PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions "
    "(arXiv 2110.04176), section 3",
    knobs={
        "parts": Knob(4, choices=(1, 2, 3, 4, 6, 8), doc="dimensions of the algebra; parameters are divided by it"),
        "kernel_size": Knob(3, choices=(1, 3, 5), doc="1 is the linear layer"),
    },
    check=_divides,
)
class HypercomplexConv(nn.Module):
    """A convolution with bias whose kernel is the sum over i of algebra_i (n x n) kron filters_i (C/n x C/n x taps).

    It multiplies what a dense convolution does, with a fraction of the parameters. The taps are no projection: policies
    leave them as they are.
    """

    slicing: ClassVar = {"algebra": ("lead", "lead", "lead")}

    def __init__(self, context: Context, *, parts: int, kernel_size: int) -> None:
        super().__init__()
        taps, part = (kernel_size,) * len(context.size), context.width // parts
        self.algebra = nn.Parameter(torch.empty(parts, parts, parts))
        self.filters = nn.ParameterList(nn.Parameter(torch.empty(part, part, *taps)) for _ in range(parts))
        self.bias = nn.Parameter(torch.zeros(context.width))
        for weight in (self.algebra, *self.filters):
            nn.init.xavier_uniform_(weight)

    def _weight(self) -> Tensor:
        """(C, C, *taps)."""
        axes = self.filters[0].dim() - 2
        weight = self.algebra.new_zeros(())
        # Not a matrix product: what depends on no example is not among an example's multiply-accumulates.
        for algebra, filters in zip(self.algebra, self.filters, strict=True):
            scales = algebra.view(*(side for n in algebra.shape for side in (n, 1)), *(1,) * axes)  # (n, 1, n, 1, *1)
            weight = weight + scales * filters.unsqueeze(1).unsqueeze(0)
        return weight.flatten(2, 3).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return window_conv(x, self._weight(), self.bias)
