"""Attention whose queries, keys and values come from small windows, keys and values from fewer places."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear, normed
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.operators.mixers.window_attention import WindowAttention
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, register

_HEADS = Knob(4, low=1, high=64, doc="heads; divides the width")


class _Window(DepthwiseConv):
    """A depthwise window of 3 without bias, of some stride, and its batch norm."""

    def __init__(self, context: Context, stride: int) -> None:
        super().__init__(context, 3, bias=False)
        self.stride = stride
        self.norm = BatchNorm(context)

    def forward(self, x: Tensor, activation: str = "none", gate: Tensor | None = None) -> Tensor:
        """(B, ..., C) to (B, tokens, C)."""
        assert activation == "none" and gate is None
        convolve = F.conv2d if x.dim() == 4 else F.conv1d
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = convolve(x.movedim(-1, 1), self.weight.to(x.dtype), bias, self.stride, self.padding, 1, x.shape[-1])
        z: Tensor = normed(self.norm, y.flatten(2).transpose(1, 2))
        return z


# Batch norms' statistics are over all positions, which in a causal network would show the future.
@register(
    "mixer",
    "conv_projection_attention",
    kinds=("image", "sequence"),
    paper="Wu et al. 2021, CvT (arXiv 2103.15808), section 3.2",
    knobs={"heads": _HEADS, "stride": Knob(2, choices=(1, 2, 4), doc="of the windows of keys and values")},
    check=_heads_divide,
)
class ConvProjectionAttention(nn.Module):
    """out(softmax(q k^T C^-1/2) v), each of q, k, v a projection of norm(depthwise(x)), batch norm, window 3.

    The scale is of the whole width, as in the authors' code. The windows' taps are no projection.
    """

    folds = tuple((f"{name}_window.norm", f"{name}_window") for name in ("query", "key", "value"))

    def __init__(self, context: Context, *, heads: int, stride: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (Linear(context.width, context.width) for _ in range(4))
        self.query_window = _Window(context, 1)
        self.key_window, self.value_window = _Window(context, stride), _Window(context, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        projected = (
            self.query(self.query_window(x)),
            self.key(self.key_window(x)),
            self.value(self.value_window(x)),
        )
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in projected)
        y = F.scaled_dot_product_attention(q, k, v, scale=float(x.shape[-1]) ** -0.5)
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out.view(x.shape)


@register(
    "mixer",
    "relative_attention",
    paper="Dagli 2023, Astroformer (arXiv 2304.05350), section 3; Dai et al. 2021, CoAtNet (arXiv 2106.04803), "
    "section 2.1",
    knobs={"heads": _HEADS},
    check=_heads_divide,
    one_length=True,
)
class RelativeAttention(WindowAttention):
    """Multi-head softmax attention over all tokens, with a learned bias for each head and distance: one tile."""

    def __init__(self, context: Context, *, heads: int) -> None:
        super().__init__(context, heads=heads, window=max(context.size), shift=False)
