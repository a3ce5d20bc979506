"""Attention whose weights decay with the Manhattan distance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.registry import Context, Knob, Value, register


def _fits(context: Context, knobs: Mapping[str, Value]) -> str | None:
    heads = int(knobs["heads"])
    if context.width % (2 * heads):
        return f"{heads} heads do not divide width {context.width} into even parts, whose channels are turned in pairs"
    return None


@register(
    "mixer",
    "retention_2d",
    paper="Fan et al. 2024, RMT (arXiv 2309.11523), section 3.2, Manhattan self-attention; the base of Gated-SwinRMT",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width into even parts"),
        "form": Knob("decomposed", choices=("decomposed", "whole"), doc="decomposed: along rows, then along columns"),
        "initial": Knob(2.0, low=1.0, high=8.0, doc="a: the first head's decay is 1 - 2^-a"),
        "spread": Knob(4.0, low=0.0, high=8.0, doc="b: that of head h is 1 - 2^-(a + b h / heads)"),
    },
    check=_fits,
)
class Retention2d(nn.Module):
    """out(softmax(q k^T d^-1/2 + ln(decay) distance) v + depthwise(v)), q and k turned by the place of the token.

    Images: the distance is |dx| + |dy|; the decomposed form attends along rows and then along columns. Sequences have
    one axis, and causal tasks see no later token. Turning is by the place in raster order, pairs of channels at
    frequencies 10000^-(0 .. 1). The window over the values is 5 wide.
    """

    frequencies: Tensor
    decays: Tensor
    cosines: Tensor
    sines: Tensor
    column_mask: Tensor
    mask: Tensor

    def __init__(self, context: Context, *, heads: int, form: str, initial: float, spread: float) -> None:
        super().__init__()
        self.heads = heads
        self.decomposed = form == "decomposed" and len(context.size) == 2
        self.causal = context.kind == "causal"
        self.query, self.key, self.value, self.out = (Linear(context.width, context.width) for _ in range(4))
        self.local = DepthwiseConv(context, 5)
        powers = initial + spread * torch.arange(heads) / heads
        self.register_buffer("decays", (1 - 2.0**-powers).log(), persistent=False)
        exponents = torch.linspace(0, 1, context.width // heads // 2)
        self.register_buffer("frequencies", 10_000**-exponents, persistent=False)
        self._set(context.size)

    def _set(self, size: tuple[int, ...]) -> None:
        self._size = size
        device = self.decays.device
        places = [torch.arange(extent, device=device) for extent in size]
        apart = [(p[:, None] - p[None, :]).abs() for p in places]
        if len(size) == 2 and not self.decomposed:
            both = apart[0][:, None, :, None] + apart[1][None, :, None, :]
            apart = [both.flatten(2).flatten(0, 1)]
        masks = [self.decays.view(-1, 1, 1) * table for table in apart]
        if self.causal:
            masks = [mask.masked_fill(~torch.ones_like(mask, dtype=torch.bool).tril(), float("-inf")) for mask in masks]
        self.register_buffer("mask", masks[-1], persistent=False)  # along rows, or of all tokens
        if self.decomposed:
            self.register_buffer("column_mask", masks[0], persistent=False)
        count = torch.Size(size).numel()
        angles = torch.arange(count, device=device).unsqueeze(-1) * self.frequencies
        angles = angles.repeat_interleave(2, dim=-1)
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def _turned(self, x_BNHD: Tensor) -> Tensor:
        pairs = x_BNHD.unflatten(-1, (-1, 2))
        across = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        cosines, sines = (t.unsqueeze(1).to(x_BNHD.dtype) for t in (self.cosines, self.sines))
        return x_BNHD * cosines + across * sines

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Over dimension -3 of (..., N, heads, d)."""
        lead = q.shape[:-3]
        q, k, v = (t.flatten(0, -4).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        return y.transpose(1, 2).unflatten(0, lead)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if tuple(x.shape[1:-1]) != self._size:
            self._set(tuple(x.shape[1:-1]))
        values = self.value(x)
        q, k, v = (t.flatten(1, -2).unflatten(-1, (self.heads, -1)) for t in (self.query(x), self.key(x), values))
        q, k = self._turned(q), self._turned(k)
        if self.decomposed:
            q, k, v = (t.unflatten(1, self._size) for t in (q, k, v))
            v = self._attended(q, k, v, self.mask)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = self._attended(q, k, v, self.column_mask).transpose(1, 2)
        else:
            y = self._attended(q, k, v, self.mask)
        out: Tensor = self.out(y.flatten(-2).view(x.shape) + self.local(values))
        return out
