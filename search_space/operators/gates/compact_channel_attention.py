"""Compact channel attention: one factor per channel, by one projection of the means."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.operators.gates.none import Mixer
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, register

PAPER = "Ai et al. 2025, DiCo: Revitalizing ConvNets for Scalable and Efficient Diffusion Modeling (arXiv 2505.11196)"


# The means are over all positions, which in a causal network would show the future.
@register("gate", "compact_channel_attention", kinds=("image", "sequence"), paper=f"{PAPER}, section 3.2")
class CompactChannelAttention(nn.Module):
    """Acts on the output: y * sigmoid(W mean(y)), with a bias."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.linear = Linear(context.width, context.width)

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        y = mixer(x)
        return y * self.linear(y.mean(dim=tuple(range(1, y.dim() - 1)), keepdim=True)).sigmoid()
