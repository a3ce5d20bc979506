"""A gated linear unit with a norm on both factors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, normed
from mixnas.search_space.registry import Context, Knob, register


@register(
    "channel_mixer",
    "activator",
    paper="Abdullah 2024, Activator: GLU Activation Function as the Core Component of a Vision Transformer "
    "(arXiv 2405.15953)",
    knobs={"expansion": Knob(2.0, low=0.25, high=16, doc="hidden width over width")},
    pointwise=True,
)
class Activator(nn.Module):
    """down(norm(gelu(gate(x))) * norm(up(x))), with biases; one layer norm for both. As released it mixes no tokens."""

    def __init__(self, context: Context, *, expansion: float) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        self.gate, self.up = Linear(context.width, hidden), Linear(context.width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.down = Linear(hidden, context.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        y: Tensor = self.down(normed(self.norm, F.gelu(self.gate(x))) * normed(self.norm, self.up(x)))
        return y
