"""A depthwise window as one along the height and one along the width."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.operators.layers import KERNEL_SIZES, DepthwiseConv
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "pseudo_3d",
    kinds=("image",),
    paper="Qiu et al. 2017, Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks "
    "(arXiv 1711.10305), section 3.2, its three forms on height and width",
    knobs={
        "form": Knob("a", choices=("a", "b", "c"), doc="a: down(across(x)); b: across(x) + down(x); c: both in a row"),
        "kernel_size": Knob(7, choices=KERNEL_SIZES),
    },
)
class Pseudo3d(nn.Module):
    """With s = across(x), a window along the width, and a window `down` the height, depthwise, with biases.

    a: down(s); b: s + down(x); c: s + down(s).
    """

    def __init__(self, context: Context, *, form: str, kernel_size: int) -> None:
        super().__init__()
        self.form = form
        self.across = DepthwiseConv(context, (1, kernel_size))
        self.down = DepthwiseConv(context, (kernel_size, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        across: Tensor = self.across(x)
        down: Tensor = self.down(x if self.form == "b" else across)
        return (down if self.form == "a" else across + down).contiguous()
