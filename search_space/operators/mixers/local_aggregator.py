"""UniFormer's local relation aggregator."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "local_aggregator",
    paper="Li et al. 2023, UniFormer (arXiv 2201.09450), section 3.2, local MHRA",
    knobs={"kernel_size": Knob(5, choices=(3, 5, 7, 9), doc="extent of the depthwise window")},
)
class LocalAggregator(nn.Module):
    """out(depthwise(value(x))), with biases: attention whose weights are learned for each distance."""

    def __init__(self, context: Context, *, kernel_size: int) -> None:
        super().__init__()
        self.value, self.out = Linear(context.width, context.width), Linear(context.width, context.width)
        self.window = DepthwiseConv(context, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        y: Tensor = self.out(self.window(self.value(x)))
        return y
