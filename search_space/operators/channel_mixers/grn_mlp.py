"""A feed-forward layer whose channels compete by their strength over all positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.channel_mixers.mlp import EXPANSION
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, register


class GlobalResponseNorm(nn.Module):
    """x (1 + weight g / mean(g)) + bias, g each channel's norm over all positions, its mean over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        strength = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim() - 1)), keepdim=True)
        relative = strength / (strength.mean(dim=-1, keepdim=True) + 1e-6)
        return x + (self.weight * (x * relative) + self.bias)


# Strengths are over all positions, which in a causal network would show the future.
@register(
    "channel_mixer",
    "grn_mlp",
    kinds=("image", "sequence"),
    paper="Ding et al. 2024, UniRepLKNet (arXiv 2311.15599), section 3.1; the norm is Woo et al. 2023, ConvNeXt V2 "
    "(arXiv 2301.00808), section 3.2",
    knobs={"expansion": EXPANSION},
)
class GRNMLP(nn.Module):
    """W2 grn(gelu(W1 x)), with biases; grn is a global response norm, of no effect at first."""

    def __init__(self, context: Context, *, expansion: float) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        self.up = Linear(context.width, hidden)
        self.norm = GlobalResponseNorm(hidden)
        self.down = Linear(hidden, context.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.down(self.norm(F.gelu(self.up(x))))
