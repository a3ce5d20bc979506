"""The universal inverted bottleneck: depthwise windows before and inside the expansion, each of them optional."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.operators.channel_mixers.mlp import EXPANSION
from mixnas.search_space.operators.layers import DepthwiseConv, Linear, normed
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, register


# Batch norms' statistics are over all positions, which in a causal network would show the future.
@register(
    "channel_mixer",
    "uib",
    kinds=("image", "sequence"),
    paper="Qin et al. 2024, MobileNetV4 (arXiv 2404.10518), section 4, without its stride and layer scale",
    knobs={
        "expansion": EXPANSION,
        "start_kernel_size": Knob(3, choices=(0, 3, 5), doc="extent of the window before the expansion; 0: none"),
        "kernel_size": Knob(3, choices=(0, 3, 5), doc="extent of the window inside the expansion; 0: none"),
    },
)
class UIB(nn.Module):
    """norm(down(relu(norm(depthwise(relu(norm(up(norm(depthwise(x))))))))) with batch norms, without biases.

    Without the first window it is an inverted residual, without the second a ConvNeXt-like block, without both a
    feed-forward layer, with both the block that the paper adds. The residual is the block's.
    """

    def __init__(self, context: Context, *, expansion: float, start_kernel_size: int, kernel_size: int) -> None:
        super().__init__()
        inside = Context(max(1, int(context.width * expansion)), context.size, context.kind)
        self.start = DepthwiseConv(context, start_kernel_size, bias=False) if start_kernel_size else None
        self.start_norm = BatchNorm(context) if start_kernel_size else None
        self.up, self.up_norm = Linear(context.width, inside.width, bias=False), BatchNorm(inside)
        self.depthwise = DepthwiseConv(inside, kernel_size, bias=False) if kernel_size else None
        self.depthwise_norm = BatchNorm(inside) if kernel_size else None
        self.down, self.down_norm = Linear(inside.width, context.width, bias=False), BatchNorm(context)
        layers = [name for name in ("start", "up", "depthwise", "down") if getattr(self, name) is not None]
        self.folds = tuple((f"{name}_norm", name) for name in layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if self.start is not None and self.start_norm is not None:
            x = normed(self.start_norm, self.start(x))
        x = normed(self.up_norm, self.up(x)).relu()
        if self.depthwise is not None and self.depthwise_norm is not None:
            x = normed(self.depthwise_norm, self.depthwise(x)).relu()
        return normed(self.down_norm, self.down(x))
