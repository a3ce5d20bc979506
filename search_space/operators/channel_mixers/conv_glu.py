"""Feed-forward layers whose gate sees the tokens beside it."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.registry import Context, Knob, register

_WINDOW = Knob(3, choices=(3, 5, 7, 9, 11), doc="extent of the depthwise window")


@register(
    "channel_mixer",
    "conv_glu",
    paper="Shi 2024, TransNeXt (arXiv 2311.17132), section 3.4",
    knobs={"expansion": Knob(3.0, low=0.25, high=16, doc="of its 2/3: 3 is twice the width"), "kernel_size": _WINDOW},
)
class ConvGLU(nn.Module):
    """down(gelu(depthwise(gate(x))) * up(x)), with biases; 2/3 of the expansion's channels, as the paper counts it."""

    def __init__(self, context: Context, *, expansion: float, kernel_size: int) -> None:
        super().__init__()
        hidden = max(1, 2 * int(context.width * expansion) // 3)
        self.gate, self.up = Linear(context.width, hidden), Linear(context.width, hidden)
        self.depthwise = DepthwiseConv(Context(hidden, context.size, context.kind), kernel_size)
        self.down = Linear(hidden, context.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.down(self.depthwise(self.gate(x), "gelu", self.up(x)))


@register(
    "channel_mixer",
    "gdfn",
    paper="Zamir et al. 2022, Restormer (arXiv 2111.09881), section 3.2",
    knobs={
        "expansion": Knob(2.0, low=0.25, high=16, doc="hidden width over width; 2.66 in the paper"),
        "kernel_size": _WINDOW,
    },
)
class GDFN(nn.Module):
    """down(gelu(depthwise(gate(x))) * depthwise'(up(x))), without biases."""

    def __init__(self, context: Context, *, expansion: float, kernel_size: int) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        inside = Context(hidden, context.size, context.kind)
        self.gate, self.up = (Linear(context.width, hidden, bias=False) for _ in range(2))
        self.gate_depthwise, self.up_depthwise = (DepthwiseConv(inside, kernel_size, bias=False) for _ in range(2))
        self.down = Linear(hidden, context.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.down(self.gate_depthwise(self.gate(x), "gelu", self.up_depthwise(self.up(x))))
