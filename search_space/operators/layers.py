"""Layers that several operators share; channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.depthwise_conv1d import depthwise_conv1d
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d
from mixnas.kernels.epilogue import activation_function
from mixnas.search_space.registry import Context

KERNEL_SIZES = tuple(range(3, 32, 2))
"""Extents of a window around a token that operators offer."""


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

    def forward(self, x: Tensor, activation: str = "none", gate: Tensor | None = None) -> Tensor:
        """See the class; activation(conv(x)) * gate, as in `kernels.depthwise_conv2d`, fused on a GPU."""
        if x.dim() == 3:
            return depthwise_conv1d(x, self.weight, self.bias, gate, activation, self.causal)
        if self.weight.shape[-1] == self.weight.shape[-2]:
            return depthwise_conv2d(x, self.weight, self.bias, gate, activation)
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=self.padding, groups=x.shape[-1])
        y = activation_function(y.permute(0, 2, 3, 1), activation)
        return y if gate is None else y * gate

    def own_macs(self, x: Tensor, activation: str = "none", gate: Tensor | None = None) -> int:
        """One window per output element."""
        return x.numel() * self.weight[0].numel()
