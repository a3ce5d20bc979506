"""Attention on a grid that a strided window has made smaller, and a transposed one back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear, normed
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, Value, register

_CHANNELS_PER_HEAD = 30
_EXTENTS = {1: (3, 3), 2: (5, 4), 4: (5, 8)}
"""Of the window and of the transposed one, by stride."""


class _Reduce(DepthwiseConv):
    """A depthwise window of some stride, without bias."""

    def __init__(self, context: Context, kernel_size: int, stride: int) -> None:
        super().__init__(context, kernel_size, bias=False)
        self.stride = stride

    def forward(self, x: Tensor, activation: str = "none", gate: Tensor | None = None) -> Tensor:
        """(B, ..., C) to (B, fewer ..., C)."""
        assert activation == "none" and gate is None
        convolve = F.conv2d if x.dim() == 4 else F.conv1d
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = convolve(x.movedim(-1, 1), self.weight.to(x.dtype), bias, self.stride, self.padding, 1, x.shape[-1])
        return y.movedim(1, -1)


class _Restore(nn.Module):
    """A transposed convolution of some stride, depthwise where it has as many inputs as outputs a channel."""

    def __init__(self, inputs: int, outputs: int, groups: int, kernel_size: int, stride: int, dims: int) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.padding = stride // 2 if stride > 1 else 1
        self.weight = nn.Parameter(torch.empty(inputs, outputs // groups, *(kernel_size,) * dims))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """(B, ..., C) to (B, *size, C'): what is over at the ends is left out."""
        convolve = F.conv_transpose2d if x.dim() == 4 else F.conv_transpose1d
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = convolve(x.movedim(-1, 1), weight, bias, self.stride, self.padding, 0, self.groups).movedim(1, -1)
        return y[:, : size[0], : size[1]] if x.dim() == 4 else y[:, : size[0]]


def _heads_of(width: int, ratio: float) -> tuple[int, int]:
    """Heads and channels of each, as the authors count them."""
    heads = max(1, int(width * ratio) // _CHANNELS_PER_HEAD)
    return heads, int((width // heads) * ratio)


def _has_channels(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if not _heads_of(context.width, float(knobs["ratio"]))[1]:
        return f"ratio {knobs['ratio']} of width {context.width} leaves a head no channel"
    return None


# The batch norm's statistics and the strided window are over later tokens too.
@register(
    "mixer",
    "low_res_attention",
    kinds=("image", "sequence"),
    paper="Nottebaum et al. 2025, LowFormer (arXiv 2409.03460), section 3.2, lightweight attention",
    knobs={
        "stride": Knob(2, choices=tuple(_EXTENTS), doc="of the window: how much coarser the grid is"),
        "ratio": Knob(0.5, choices=(0.25, 0.5, 1.0), doc="channels that are attended over width"),
        "fused": Knob(False, doc="whether the output projection is in the transposed convolution, which is then dense"),
    },
    check=_has_channels,
)
class LowResAttention(nn.Module):
    """restore(out(softmax(q k^T d^-1/2) v)), q, k and v projections without bias of norm(depthwise(x)), strided.

    A batch norm behind a depthwise window of 5 (3 where the stride is 1), a head for each 30 attended channels, a
    depthwise transposed convolution of twice the stride, cut to the grid.
    """

    folds = (("norm", "reduce"),)

    def __init__(self, context: Context, *, stride: int, ratio: float, fused: bool) -> None:
        super().__init__()
        width, dims = context.width, len(context.size)
        window, back = _EXTENTS[stride]
        self.heads, part = _heads_of(width, ratio)
        attended = self.heads * part
        self.reduce = _Reduce(context, window, stride)
        self.norm = BatchNorm(context)
        self.query, self.key, self.value = (Linear(width, attended, bias=False) for _ in range(3))
        self.out = None if fused else Linear(attended, width)
        inputs, groups = (attended, 1) if fused else (width, width)
        self.restore = _Restore(inputs, width, groups, back, stride, dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        coarse = normed(self.norm, self.reduce(x))
        tokens = coarse.flatten(1, -2)
        q, k, v = (
            p(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        if self.out is not None:
            y = self.out(y)
        return self.restore(y.unflatten(1, coarse.shape[1:-1]), x.shape[1:-1]).contiguous()
