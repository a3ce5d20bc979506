"""Attention to a coarser grid of keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Conv, Linear, normed
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.registry import Context, Knob, register


# Coarser keys hold several tokens, later ones too.
@register(
    "mixer",
    "spatial_reduction_attention",
    kinds=("image", "sequence"),
    paper="Wang et al. 2021, Pyramid Vision Transformer (arXiv 2102.12122), section 3.3",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width"),
        "reduction": Knob(
            2, choices=(1, 2, 4, 8), doc="tokens along each axis that are one key; not more than there are"
        ),
    },
    check=_heads_divide,
)
class SpatialReductionAttention(nn.Module):
    """Multi-head attention of x to norm(conv(x)): a dense convolution of kernel and stride `reduction`, layer norm.

    What is left at the ends of a grid that it does not divide is in no key. With reduction 1 it is attention.
    """

    def __init__(self, context: Context, *, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        width = context.width
        self.query, self.key, self.value, self.out = (Linear(width, width) for _ in range(4))
        height, across = (min(reduction, n) for n in (1, *context.size)[-2:])
        self.reduce = Conv(width, width, (height, across), (height, across)) if reduction > 1 else None
        self.norm = nn.LayerNorm(width) if reduction > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        coarse = x
        if self.reduce is not None and self.norm is not None:
            grid = x if x.dim() == 4 else x.unsqueeze(1)
            coarse = normed(self.norm, self.reduce(grid).flatten(1, -2))
        tokens, coarse = x.flatten(1, -2), coarse if coarse.dim() == 3 else coarse.flatten(1, -2)
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.query, tokens), (self.key, coarse), (self.value, coarse))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        out: Tensor = self.out(y)
        return out.view(x.shape)
