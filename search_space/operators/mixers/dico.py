"""Depthwise convolution between projections, with compact channel attention."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.operators.gates.compact_channel_attention import PAPER, CompactChannelAttention
from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.registry import Context, Knob, register


# Channel attention looks at all positions, which in a causal network would show the future.
@register(
    "mixer",
    "dico",
    kinds=("image", "sequence"),
    paper=f"{PAPER}, section 3.1, the block's first half without its conditioning",
    knobs={"kernel_size": Knob(3, choices=(3, 5, 7), doc="extent of the depthwise window")},
)
class DiCo(nn.Module):
    """out(attention(gelu(depthwise(up(x))))), with biases; the attention is the gate `compact_channel_attention`."""

    def __init__(self, context: Context, *, kernel_size: int) -> None:
        super().__init__()
        self.up, self.out = Linear(context.width, context.width), Linear(context.width, context.width)
        self.window = DepthwiseConv(context, kernel_size)
        self.attention = CompactChannelAttention(context)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        y: Tensor = self.out(self.attention(self.window(self.up(x), "gelu"), lambda t: t))
        return y
