"""Slots that tokens are grouped into, attend to each other and are spread again, beside a local window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.operators.mixers.window_attention import as_grid
from mixnas.search_space.registry import Context, Knob, register


# Slots are sums over later tokens too.
@register(
    "mixer",
    "glmix",
    kinds=("image", "sequence"),
    paper="Zhu et al. 2024, Revisiting the Integration of Convolution and Attention for Vision Backbone (GLMix, "
    "arXiv 2411.14429), section 3",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads of the attention between slots; divides the width"),
        "slots": Knob(64, choices=(16, 36, 64, 100), doc="of an image, a square number; of a sequence"),
        "initial": Knob("pooled", choices=("pooled", "learned"), doc="the slots that tokens are first compared with"),
        "kernel_size": Knob(5, choices=(3, 5, 7), doc="extent of the window beside"),
    },
    check=_heads_divide,
)
class GLMix(nn.Module):
    """A^T attention(B x) + local_out(depthwise(local_in(x))), logits s cos(slot, token) in both A and B.

    B is their softmax over tokens, A the one over slots. Slots are means over a grid of cells, at most one for each
    token, or learned, as in the authors' second model. Theirs pool what the block reads, before its norm: a mixer is
    given what is behind it, and pools that.
    """

    def __init__(self, context: Context, *, heads: int, slots: int, initial: str, kernel_size: int) -> None:
        super().__init__()
        width = context.width
        self.heads = heads
        self.cells = (1, slots) if len(context.size) == 1 else (round(slots**0.5),) * 2
        self.query, self.key, self.value, self.out = (Linear(width, width) for _ in range(4))
        self.scale = nn.Parameter(torch.tensor(float(width) ** -0.5))
        self.slots = nn.Parameter(0.02 * torch.randn(slots, width)) if initial == "learned" else None
        self.local_in, self.local_out = Linear(width, width), Linear(width, width)
        self.window = DepthwiseConv(context, kernel_size)

    def pooled(self, x: Tensor) -> Tensor:
        """(B, ..., C) to (B, slots, C): means over cells."""
        grid = as_grid(x)
        rows, columns = (min(n, cells) for n, cells in zip(grid.shape[1:3], self.cells, strict=True))
        return F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), (rows, columns)).flatten(2).transpose(1, 2)

    def _updated(self, slots: Tensor) -> Tensor:
        q, k, v = (p(slots).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return y

    def mixed(self, x: Tensor, slots: Tensor) -> Tensor:
        """(B, ..., C) with these slots to compare with, (slots, C) or (B, slots, C)."""
        tokens = x.flatten(1, -2)
        # The few slots bear the scale, and both softmaxes read the one product.
        compared = F.normalize(slots.to(tokens.dtype), dim=-1) * self.scale.to(tokens.dtype)
        logits = compared @ F.normalize(tokens, dim=-1).transpose(-1, -2)
        updated = self._updated(logits.softmax(dim=-1) @ tokens).to(tokens.dtype)
        y = (logits.softmax(dim=-2).transpose(-1, -2) @ updated).view(x.shape)
        out: Tensor = y + self.local_out(self.window(self.local_in(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.mixed(x, self.pooled(x) if self.slots is None else self.slots)
