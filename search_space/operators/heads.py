"""Heads: from the last stage's tokens, normalised, to a task's answers. The task names its head (`IOSpec.head`).

A head takes the contexts before and after it. `out_size(size)` tells the grid that it answers on; the task's targets
must have that grid (`IOSpec.grid`). Where the last layer is linear, `features(x)` is what it reads and `linear` the
layer, so that a probe can be fitted in its place.
"""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, register


class _LinearHead(nn.Module):
    def __init__(self, before: Context, after: Context) -> None:
        super().__init__()
        self.linear = Linear(before.width, after.width)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, *size, C) to the answers."""
        return self.linear(self.features(x))


@register("head", "pool", paper="Lin et al. 2013, Network In Network (arXiv 1312.4400), section 3.2")
class Pool(_LinearHead):
    """Mean over positions, then linear: (B, *size, C) to (B, outputs)."""

    @staticmethod
    def out_size(size: tuple[int, ...]) -> tuple[int, ...]:
        """One answer."""
        return ()

    def features(self, x: Tensor) -> Tensor:
        """(B, *size, C) to (B, C)."""
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

    def features(self, x: Tensor) -> Tensor:
        """(B, *size, C) to (B, C)."""
        tokens = x.flatten(1, -2)
        return (self.weights(tokens).softmax(dim=1) * tokens).sum(dim=1)


@register("head", "token", paper="Long et al. 2015, Fully Convolutional Networks (arXiv 1411.4038), section 3")
class Token(_LinearHead):
    """Linear at each position: (B, *size, C) to (B, *size, outputs)."""

    @staticmethod
    def out_size(size: tuple[int, ...]) -> tuple[int, ...]:
        """An answer for each token."""
        return size
