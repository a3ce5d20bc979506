"""Heads: from the last stage's tokens, normalised, to a task's answers. The task names its head (`IOSpec.head`).

A head takes the contexts before and after it. `out_size(size, **knobs)` tells the grid that it answers on; the task's
targets must have that grid (`IOSpec.grid`). Its knobs are the task's (`IOSpec.head_knobs`). Where the last layer is
linear, `features(x)` is what it reads and `linear` the layer, so that a probe can be fitted in its place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, WindowConv
from mixnas.search_space.registry import Context, Knob, Value, register


class _LinearHead(nn.Module):
    def __init__(self, before: Context, after: Context) -> None:
        super().__init__()
        self.linear = Linear(before.width, after.width)

    def features(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """What the last layer reads; `valid` (B, L, 1): which tokens count, where several are read together."""
        return x

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *size, C) to the answers."""
        return self.linear(self.features(x, valid))


@register("head", "pool", paper="Lin et al. 2013, Network In Network (arXiv 1312.4400), section 3.2")
class Pool(_LinearHead):
    """Mean over positions, then linear: (B, *size, C) to (B, outputs)."""

    @staticmethod
    def out_size(size: tuple[int, ...]) -> tuple[int, ...]:
        """One answer."""
        return ()

    def features(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *size, C) to (B, C)."""
        if valid is not None:
            return (x * valid).sum(dim=1) / valid.sum(dim=1)
        return x.flatten(1, -2).mean(dim=1)


@register(
    "head",
    "attsets",
    paper="Yang et al. 2020, AttSets, Robust Attentional Aggregation of Deep Feature Sets (arXiv 1808.00758)",
)
class AttSets(_LinearHead):
    """Weighted mean over positions, then linear: each channel has weights of its own, softmax over positions of W x.

    (B, *size, C) to (B, outputs). A bias of the weights would cancel. With W = 0 it is `pool`, on one position as well.
    """

    def __init__(self, before: Context, after: Context) -> None:
        super().__init__(before, after)
        self.weights = Linear(before.width, before.width, bias=False)

    out_size = Pool.out_size

    def features(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *size, C) to (B, C)."""
        tokens = x.flatten(1, -2)
        weights = self.weights(tokens)
        if valid is not None:
            weights = weights.masked_fill(~valid, -torch.inf)
        return (weights.softmax(dim=1) * tokens).sum(dim=1)


@register(
    "head",
    "token",
    paper="Long et al. 2015, Fully Convolutional Networks (arXiv 1411.4038), section 3",
    pointwise=True,
)
class Token(_LinearHead):
    """Linear at each position: (B, *size, C) to (B, *size, outputs)."""

    @staticmethod
    def out_size(size: tuple[int, ...]) -> tuple[int, ...]:
        """An answer for each token."""
        return size


@register(
    "head",
    "sub_pixel",
    kinds=("image", "sequence"),
    paper="Shi et al. 2016, Efficient Sub-Pixel Convolution, ESPCN (arXiv 1609.05158), section 3.2",
    knobs={
        "scale": Knob(
            2, low=1, high=16, doc="answers along each extent of a token; the targets' grid over the tokens'"
        ),
        "kernel_size": Knob(3, choices=(1, 3, 5, 7)),
    },
)
class SubPixel(nn.Module):
    """A grid finer than the tokens: a convolution to scale^2 answers a token, put side by side (scale on sequences).

    (B, H, W, C) to (B, scale H, scale W, outputs), or (B, L, C) to (B, scale L, outputs). Output o at (scale h + a,
    scale w + b) is channel (o scale + a) scale + b of the convolution, as in `torch.nn.PixelShuffle`.
    """

    def __init__(self, before: Context, after: Context, *, scale: int, kernel_size: int) -> None:
        super().__init__()
        self.scale = scale
        self.conv = WindowConv(before, after.width * scale ** len(before.size), kernel_size)

    @staticmethod
    def out_size(size: tuple[int, ...], *, scale: int, **_: Value) -> tuple[int, ...]:
        """`scale` times as fine."""
        return tuple(scale * extent for extent in size)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y: Tensor = self.conv(x)
        if x.dim() == 3:
            return y.unflatten(-1, (-1, self.scale)).transpose(2, 3).flatten(1, 2)
        return side_by_side(y, self.scale)


def side_by_side(y_BHWC: Tensor, scale: int) -> Tensor:
    """The channels of a token as answers on a finer grid: `torch.nn.PixelShuffle`, channels last."""
    parts = y_BHWC.unflatten(-1, (-1, scale, scale))
    return parts.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)


@register(
    "head",
    "lr_aspp",
    kinds=("image",),
    paper="Howard et al. 2019, Searching for MobileNetV3 (arXiv 1905.02244), section 6.4 and figure 10, Lite R-ASPP",
    knobs={
        "scale": Knob(2, low=1, high=16, doc="answers along each extent of a token; the targets' grid over the tokens'")
    },
)
class LiteRaspp(nn.Module):
    """Answers of two scales, summed: a 1 x 1 layer each, on the tokens and on twice as coarse ones.

    The coarse ones are the paper's: relu of a projection, times sigmoid of a projection of the mean over all positions;
    what they answer is brought to the tokens' grid by bilinear interpolation. Other than in the paper both scales come
    from the last stage, the coarse one as means of 2 x 2: a network is a chain of stages, of which a head reads the
    last. Each token's answers are put side by side as those of `sub_pixel`. Batch norms are left to the norm before it.

    (B, H, W, C) to (B, scale H, scale W, outputs).
    """

    def __init__(self, before: Context, after: Context, *, scale: int) -> None:
        super().__init__()
        self.scale, answers = scale, after.width * scale**2
        self.inside = Linear(before.width, before.width)
        self.gate = Linear(before.width, before.width, bias=False)
        self.coarse = Linear(before.width, answers)
        self.fine = Linear(before.width, answers, bias=False)

    out_size = SubPixel.out_size

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1)
        gate = self.gate(x.mean((1, 2), keepdim=True)).sigmoid()
        coarse = self.coarse(self.inside(pooled).relu() * gate).permute(0, 3, 1, 2)
        size = (x.shape[1], x.shape[2])
        finer = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        return side_by_side(self.fine(x) + finer, self.scale)
