"""Windows whose taps differ from place to place: of each example, or of each token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mixnas.kernels.depthwise_conv1d import depthwise_conv1d
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d
from mixnas.kernels.dispatch import exporting


def shifted(x: Tensor, extent: int, *, causal: bool = False, dilation: int = 1) -> Iterator[Tensor]:
    """What each tap of a window sees: `x` moved against it, zeros where it has none.

    Args:
        x: (B, H, W, C) or (B, L, C).
        extent: Odd extent of the window along each axis.
        causal: On sequences, whether the window ends at the token.
        dilation: Distance between taps.

    Yields:
        A view of the shape of `x` for each tap, row by row.
    """
    reach = dilation * (extent - 1)
    before = reach if causal else reach // 2
    if x.dim() == 3:
        padded = F.pad(x, (0, 0, before, reach - before))
        for i in range(extent):
            yield padded[:, i * dilation : i * dilation + x.shape[1]]
        return
    padded = F.pad(x, (0, 0, before, before, before, before))
    for i in range(extent):
        rows = padded[:, i * dilation : i * dilation + x.shape[1]]
        for j in range(extent):
            yield rows[:, :, j * dilation : j * dilation + x.shape[2]]


def own_depthwise(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """A depthwise convolution with taps of their own for each example; stride 1, zeros outside.

    Args:
        x: (B, H, W, C) or (B, L, C).
        taps: (B, C, k, k) or (B, C, k), k odd.
        bias: (B, C).

    Returns:
        As `x`.
    """
    taps, bias = taps.to(x.dtype), bias.to(x.dtype)
    if exporting():  # runtimes know no number of groups that grows with the batch
        y, *places = (
            number.unsqueeze(1) if x.dim() == 3 else number.unsqueeze(1).unsqueeze(1)
            for number in (bias, *taps.flatten(2).unbind(-1))
        )
        for tap, moved in zip(places, shifted(x, taps.shape[-1]), strict=True):
            y = torch.addcmul(y, moved, tap)
        return y
    # The examples stand beside each other as channels: one convolution, that copies nothing for one example.
    together = x.movedim(0, -2).flatten(-2).unsqueeze(0)
    kernel, offset = taps.flatten(0, 1).unsqueeze(1), bias.flatten()
    if x.dim() == 3:
        y = depthwise_conv1d(together, kernel, offset, causal=False)
    else:
        y = depthwise_conv2d(together, kernel, offset)
    return y.squeeze(0).unflatten(-1, (x.shape[0], -1)).movedim(-2, 0).contiguous()


def own_dense(x: Tensor, taps: Tensor, extent: int) -> Tensor:
    """A convolution with taps of their own for each example; stride 1, zeros outside.

    Args:
        x: (B, H, W, C).
        taps: (B, k * k * C, C'): the taps row by row, and all channels of each.
        extent: k, odd.

    Returns:
        (B, H, W, C').
    """
    windows = torch.cat(list(shifted(x, extent)), dim=-1).flatten(1, 2)
    return (windows @ taps.to(x.dtype)).unflatten(1, x.shape[1:-1])
