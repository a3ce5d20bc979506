"""Attention rewritten as a feed-forward network over a window: keys and values are depthwise kernels."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear, normed
from mixnas.search_space.operators.mixers.large_kernel import Reparameterised
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, register

_SIZES = Knob(7, choices=(3, 7))


def _window(context: Context, extent: int) -> nn.Module:
    """The authors train the larger with one of 3 taps beside it, each with its norm."""
    return Reparameterised(context, 7, ((3, 1),)) if extent == 7 else DepthwiseConv(context, extent)


# Batch norms' statistics are over all positions, which in a causal network would show the future.
@register(
    "mixer",
    "ffnified_attention",
    kinds=("image", "sequence"),
    paper="Yun et al. 2024, MetaMixer Is All You Need (FFNet, arXiv 2406.02021), section 3",
    knobs={"key_size": _SIZES, "value_size": _SIZES},
)
class FFNifiedAttention(nn.Module):
    """values(gelu(keys(norm(mix(x))))): keys and values are depthwise windows, as keys and values of a feed-forward.

    A window of 7 is norm(depthwise 7) + norm(depthwise 3), in evaluation one kernel; one of 3 has a bias and no norm.
    """

    folds: ClassVar = (("norm", "mix"),)

    def __init__(self, context: Context, *, key_size: int, value_size: int) -> None:
        super().__init__()
        self.mix, self.norm = Linear(context.width, context.width, bias=False), BatchNorm(context)
        # Windows of different sizes are built differently: each has a name of its own.
        self.keys = nn.ModuleDict({f"size{key_size}": _window(context, key_size)})
        self.values = nn.ModuleDict({f"size{value_size}": _window(context, value_size)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        y: Tensor = normed(self.norm, self.mix(x))
        for keys in self.keys.values():
            y = nn.functional.gelu(keys(y))
        for values in self.values.values():
            y = values(y)
        return y
