"""Layers that several operators share; channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.registry import Context


def same_padding(kernel_size: int | tuple[int, ...]) -> list[int]:
    """`F.pad` amounts that keep the size under an odd kernel, last dimension first."""
    sizes = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
    return [half for k in reversed(sizes) for half in (k // 2, k // 2)]


class DepthwiseConv(nn.Module):
    """Depthwise convolution of stride 1 that keeps the size: 2-D on images, 1-D on sequences, left-padded if causal.

    Args:
        context: Where it stands; `context.width` channels.
        kernel_size: Odd extent of a square (images) or one-dimensional window, or the two extents of an image window.
        bias: Whether a bias is added.

    Shape:
        Input and output (B, H, W, C) or (B, L, C); weight (C, 1, k, k) or (C, 1, k).
    """

    def __init__(self, context: Context, kernel_size: int | tuple[int, int], *, bias: bool = True) -> None:
        super().__init__()
        extents = (kernel_size,) * len(context.size) if isinstance(kernel_size, int) else kernel_size
        self.causal = context.kind == "causal"
        self.padding = tuple(k // 2 for k in extents)
        self.weight = nn.Parameter(torch.empty(context.width, 1, *extents))
        self.bias = nn.Parameter(torch.zeros(context.width)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        channels = x.shape[-1]
        if x.dim() == 4:
            y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=self.padding, groups=channels)
            return y.permute(0, 2, 3, 1)
        x_BCL = x.transpose(1, 2)
        if self.causal:
            x_BCL = F.pad(x_BCL, (self.weight.shape[-1] - 1, 0))
            return F.conv1d(x_BCL, self.weight, self.bias, groups=channels).transpose(1, 2)
        return F.conv1d(x_BCL, self.weight, self.bias, padding=self.padding, groups=channels).transpose(1, 2)

    def own_macs(self, x: Tensor) -> int:
        """One window per output element."""
        return x.numel() * self.weight[0].numel()
