"""Gated cross layers: products of the input with what was made of it, bit by bit."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.kernels.glu import glu
from mixnas.search_space.operators.gates.none import Mixer
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob, register


@register(
    "gate",
    "gated_cross",
    paper="Wang et al. 2023, Towards Deeper, Lighter and Interpretable Cross Network for CTR Prediction (GDCN, "
    "arXiv 2311.04635), section 3.1",
    knobs={"layers": Knob(1, low=1, high=4, doc="crossings, one on the other")},
)
class GatedCross(nn.Module):
    """Acts on the output y: for each layer y = x * cross(y) * sigmoid(gate(y)) + y, x the block's input."""

    def __init__(self, context: Context, *, layers: int) -> None:
        super().__init__()
        crosses = [Linear(context.width, context.width) for _ in range(layers)]
        self.gates = nn.ModuleList(Linear(context.width, context.width, bias=False) for _ in range(layers))
        for layer in crosses:
            nn.init.uniform_(layer.bias)
        self.crosses = nn.ModuleList(crosses)

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        y = mixer(x)
        for cross, gate in zip(self.crosses, self.gates, strict=True):
            y = x * glu(gate(y), cross(y), "sigmoid") + y
        return y
