"""Attention to a neighbourhood of each token."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.kernels.neighborhood_attention import neighborhood_attention
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "neighborhood_attention",
    paper="Hassani et al. 2023, Neighborhood Attention Transformer (arXiv 2204.07143); Hassani et al. 2025, "
    "Generalized Neighborhood Attention (arXiv 2504.16922)",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width"),
        "window": Knob(7, low=1, high=255, doc="keys of a query along each axis; where the grid is smaller, all of it"),
        "stride": Knob(1, low=1, high=255, doc="neighbours that share one window: 1 slides, the window's size tiles"),
        "dilation": Knob(1, low=1, high=64, doc="distance between neighbouring keys"),
    },
    check=_heads_divide,
    one_length=True,
)
class NeighborhoodAttention(nn.Module):
    """Multi-head softmax attention of each token to the `window` nearest along each axis, never fewer at borders.

    Causal tasks see the token itself and the window - 1 before it.
    """

    def __init__(self, context: Context, *, heads: int, window: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.heads, self.window, self.stride, self.dilation = heads, window, stride, dilation
        self.causal = context.kind == "causal"
        self.query, self.key, self.value, self.out = (Linear(context.width, context.width) for _ in range(4))

    def _options(self, size: tuple[int, ...]) -> tuple[list[int], list[int], list[int], list[bool]]:
        """Window, stride, dilation and causality along each axis, as far as the grid has room for them."""
        dilation = [min(self.dilation, n) for n in size]
        window = [min(self.window, n // d) for n, d in zip(size, dilation, strict=True)]
        return window, [min(self.stride, w) for w in window], dilation, [self.causal] * len(size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.query, self.key, self.value))
        y = neighborhood_attention(q, k, v, *self._options(tuple(x.shape[1:-1])))
        out: Tensor = self.out(y.flatten(-2))
        return out
