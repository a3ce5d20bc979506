"""Gates on the output, computed from the input."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.kernels.glu import glu
from mixnas.search_space.operators.gates.none import Mixer
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, register


@register(
    "gate",
    "output_sigmoid",
    paper="Qiu et al. 2025, Gated Attention for Large Language Models (arXiv 2505.06708), elementwise output gate",
    pointwise=True,
)
class OutputSigmoid(nn.Module):
    """Acts on the output, computed from the input: mixer(x) * sigmoid(W x), one factor per element."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.linear = Linear(context.width, context.width)

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        return glu(self.linear(x), mixer(x), "sigmoid")
