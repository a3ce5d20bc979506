"""Dense convolution whose taps have fixed weights by their distance from the middle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import window_conv
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "weighted_conv",
    kinds=("image", "sequence"),
    paper="Cammarasana and Patane 2025, Optimal Density Functions for Weighted Convolution in Learning Models "
    "(arXiv 2505.24527)",
    knobs={"density": Knob(0.75, low=0.5, high=1.5, doc="weight of the outer taps along an axis; the middle has 1")},
)
class WeightedConv(nn.Module):
    """A convolution of 3 taps along each axis without bias, its taps times the outer product of (density, 1, density).

    At a fixed density it is a convolution that is trained differently. Its taps are no projection: policies leave them.
    """

    density: Tensor

    def __init__(self, context: Context, *, density: float) -> None:
        super().__init__()
        axes = len(context.size)
        self.weight = nn.Parameter(torch.empty(context.width, context.width, *(3,) * axes))
        nn.init.kaiming_normal_(self.weight, mode="fan_out")
        along = torch.tensor([density, 1.0, density])
        self.register_buffer("density", torch.outer(along, along) if axes == 2 else along, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return window_conv(x, self.weight * self.density)
