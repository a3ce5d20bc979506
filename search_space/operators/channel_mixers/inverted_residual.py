"""A feed-forward layer with a depthwise convolution between its projections."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.channel_mixers.mlp import EXPANSION
from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.registry import Context, Knob, register


@register(
    "channel_mixer",
    "inverted_residual",
    paper="Sandler et al. 2018, MobileNetV2 (arXiv 1801.04381), section 3.3, pre-normalised, with GELU",
    knobs={
        "expansion": EXPANSION,
        "kernel_size": Knob(3, choices=(3, 5, 7, 9, 11), doc="extent of the depthwise window"),
    },
)
class InvertedResidual(nn.Module):
    """W2 gelu(depthwise(gelu(W1 x))), with biases; the residual is the block's."""

    def __init__(self, context: Context, *, expansion: float, kernel_size: int) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        self.up = Linear(context.width, hidden)
        self.depthwise = DepthwiseConv(Context(hidden, context.size, context.kind), kernel_size)
        self.down = Linear(hidden, context.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.down(self.depthwise(F.gelu(self.up(x)), "gelu"))
