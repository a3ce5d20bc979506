"""Efficient channel attention: one factor per channel, from the means of the channels beside it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.gates.none import Mixer
from mixnas.search_space.registry import Context, Knob, register


def adaptive_kernel_size(width: int) -> int:
    """The odd number at (log2 C + 1) / 2, rounded down and then up to an odd one (the paper's equation 12)."""
    nearest = int((math.log2(width) + 1) / 2)
    return nearest if nearest % 2 else nearest + 1


# The means are over all positions, which in a causal network would show the future.
@register(
    "gate",
    "eca",
    kinds=("image", "sequence"),
    paper="Wang et al. 2020, ECA-Net (arXiv 1910.03151), section 3.2",
    knobs={"kernel_size": Knob(0, choices=(0, 3, 5, 7, 9), doc="channels that make a factor; 0: by the width")},
)
class ECA(nn.Module):
    """Acts on the output: y * sigmoid(conv(mean(y))), where one kernel without bias slides over the channels.

    It has no projections: policies leave it as it is.
    """

    def __init__(self, context: Context, *, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size or adaptive_kernel_size(context.width)
        self.weight = nn.Parameter(torch.empty(1, 1, self.kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        y = mixer(x)
        mean = y.mean(dim=tuple(range(1, y.dim() - 1))).unsqueeze(1)
        factors = F.conv1d(mean, self.weight.to(mean.dtype), padding=self.kernel_size // 2).sigmoid()
        return y * factors.view(y.shape[0], *(1,) * (y.dim() - 2), y.shape[-1])
