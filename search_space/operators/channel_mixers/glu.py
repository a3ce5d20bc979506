"""Feed-forward layers with a gated linear unit."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.kernels.glu import glu
from mixnas.search_space.operators.channel_mixers.mlp import EXPANSION
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, register


@register(
    "channel_mixer",
    "swiglu",
    paper="Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202), equation 6",
    knobs={"expansion": EXPANSION},
    pointwise=True,
)
class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x), without biases."""

    def __init__(self, context: Context, *, expansion: float) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        self.gate = Linear(context.width, hidden, bias=False)
        self.up = Linear(context.width, hidden, bias=False)
        self.down = Linear(hidden, context.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.down(glu(self.gate(x), self.up(x)))
