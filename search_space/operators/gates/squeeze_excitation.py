"""Squeeze-and-excitation: one factor per channel, from the output's mean."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.operators.gates.none import Mixer
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob, register


# The squeeze is a mean over all positions, which in a causal network would show the future.
@register(
    "gate",
    "se",
    kinds=("image", "sequence"),
    paper="Hu et al. 2018, Squeeze-and-Excitation Networks (arXiv 1709.01507), section 3",
    knobs={"reduction": Knob(4, low=1, high=64, doc="width over hidden width")},
)
class SqueezeExcitation(nn.Module):
    """Acts on the output: y * sigmoid(W2 relu(W1 mean(y))), one factor per channel."""

    def __init__(self, context: Context, *, reduction: int) -> None:
        super().__init__()
        hidden = max(1, context.width // reduction)
        self.squeeze = Linear(context.width, hidden)
        self.excite = Linear(hidden, context.width)

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        y = mixer(x)
        mean = y.mean(dim=tuple(range(1, y.dim() - 1)), keepdim=True)
        return y * self.excite(self.squeeze(mean).relu()).sigmoid()
