"""Depthwise convolution whose kernel is a mixture that each image chooses for itself."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, normed
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.operators.windows import own_depthwise
from mixnas.search_space.registry import Context, Knob, register


def _averages(parts: int, extent: int) -> Tensor:
    """(parts, extent): the mean over each part of an axis, as `torch.nn.functional.adaptive_avg_pool1d` parts it.

    As a matrix, because ONNX knows no pooling to a given size.
    """
    part, place = torch.arange(parts).unsqueeze(1), torch.arange(extent)
    inside = ((place >= part * extent // parts) & (place * parts < (part + 1) * extent)).float()
    return inside / inside.sum(dim=1, keepdim=True)


# The mixture is chosen by means over all positions, which in a causal network would show the future.
@register(
    "mixer",
    "dynamic_dwconv",
    kinds=("image", "sequence"),
    paper="Lou et al. 2023, TransXNet (arXiv 2310.19380), section 3.2, input-dependent depthwise convolution",
    knobs={
        "kernel_size": Knob(7, choices=(5, 7, 9)),
        "kernels": Knob(2, choices=(2, 3, 4), doc="that are mixed"),
    },
)
class DynamicDWConv(nn.Module):
    """A depthwise convolution with the taps sum over g of s_g taps_g, s = softmax over g of scales_g(z), for each tap.

    z = gelu(norm(squeeze(pooled x))), C / 4 channels, with x averaged over as many parts along each axis as the kernel
    has taps; the bias is mixed in the same way by the average of all of x. Both averages go through the batch norm
    together, in the authors' code one after the other: in evaluation that is the same.
    """

    folds: ClassVar = (("norm", "squeeze"),)

    down: Tensor
    across: Tensor

    def __init__(self, context: Context, *, kernel_size: int, kernels: int) -> None:
        super().__init__()
        axes, inside = len(context.size), Context(max(1, context.width // 4), context.size, context.kind)
        self.taps = nn.Parameter(torch.empty(kernels, context.width, *(kernel_size,) * axes))
        self.bias = nn.Parameter(torch.empty(kernels, context.width))
        for mixed in (self.taps, self.bias):
            nn.init.trunc_normal_(mixed, std=0.02)
        self.squeeze, self.norm = Linear(context.width, inside.width, bias=False), BatchNorm(inside)
        # A part for each kernel: a leading slice of each is a narrower layer.
        self.scales = nn.ModuleList(Linear(inside.width, context.width) for _ in range(kernels))
        self._set(context.size)

    def _set(self, size: tuple[int, ...]) -> None:
        self._size, extent = size, self.taps.shape[-1]
        down, across = (_averages(extent, n).to(self.taps.device) for n in (size[0], size[-1]))
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("across", across, persistent=False)

    def _pooled(self, x: Tensor) -> Tensor:
        """(B, taps + 1, C): of each part, and of all."""
        if tuple(x.shape[1:-1]) != self._size:
            self._set(tuple(x.shape[1:-1]))
        parts = (self.down.to(x.dtype) @ x.flatten(2)).unflatten(2, x.shape[2:])
        if x.dim() == 4:
            parts = (self.across.to(x.dtype) @ parts).flatten(1, 2)
        return torch.cat([parts, x.flatten(1, -2).mean(dim=1, keepdim=True)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        z = F.gelu(normed(self.norm, self.squeeze(self._pooled(x))))
        scales = torch.stack([scale(z) for scale in self.scales], dim=1).softmax(dim=1)  # (B, kernels, taps + 1, C)
        taps = (scales[:, :, :-1] * self.taps.flatten(2).transpose(1, 2)).sum(dim=1)
        bias = (scales[:, :, -1] * self.bias).sum(dim=1)
        return own_depthwise(x, taps.transpose(1, 2).unflatten(-1, self.taps.shape[2:]), bias)
