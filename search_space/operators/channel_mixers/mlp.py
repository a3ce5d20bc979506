"""The feed-forward layer of transformers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob, register

EXPANSION = Knob(4.0, low=0.25, high=16, doc="hidden width over width")


@register(
    "channel_mixer",
    "mlp",
    paper="Vaswani et al. 2017 (arXiv 1706.03762), section 3.3, with GELU (arXiv 1606.08415)",
    knobs={"expansion": EXPANSION},
    pointwise=True,
)
class MLP(nn.Module):
    """W2 gelu(W1 x), with biases."""

    def __init__(self, context: Context, *, expansion: float) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        self.up = Linear(context.width, hidden)
        self.down = Linear(hidden, context.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.down(F.gelu(self.up(x)))
