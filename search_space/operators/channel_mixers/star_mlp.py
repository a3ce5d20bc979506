"""The feed-forward layer of the MetaFormer baselines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.channel_mixers.mlp import EXPANSION
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, register


@register(
    "channel_mixer",
    "star_mlp",
    paper="Yu et al. 2024, MetaFormer Baselines for Vision (arXiv 2210.13452), section 3.1, StarReLU",
    knobs={"expansion": EXPANSION},
    pointwise=True,
)
class StarMLP(nn.Module):
    """W2 (scale * relu(W1 x)^2 + bias), without other biases; scale and bias are one learned number each."""

    def __init__(self, context: Context, *, expansion: float) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        self.up = Linear(context.width, hidden, bias=False)
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.down = Linear(hidden, context.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.down(self.up(x).relu().square() * self.scale + self.bias)
