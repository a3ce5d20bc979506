"""Gated attention inside chunks of the sequence."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "chunked_attention",
    paper="Ma et al. 2022, Mega (arXiv 2209.10655), sections 3.2 and 3.4, Mega-chunk; the attention of TCNCA "
    "(arXiv 2312.05605)",
    knobs={
        "chunk": Knob(
            64, choices=(16, 32, 64, 128, 256), doc="tokens that attend to each other; an image's row by row"
        ),
        "key_width": Knob(32, choices=(16, 32, 64), doc="channels of queries and keys"),
        "expansion": Knob(1.0, choices=(0.5, 1.0, 2.0), doc="channels of values over width"),
    },
)
class ChunkedAttention(nn.Module):
    """u (silu(candidate(x) + out(r o)) - x), o = softmax(q k^T z^-1/2 + b) silu(value(x)), in chunks, with one head.

    q = s g_0 + b_0 and k = s g_1 + b_1 of s = silu(shared(x)); r = silu(reset(x)) and u = sigmoid(update(x)) are gates;
    b is learned for each distance. With the block's residual it is Mega's x + u (h - x), without the moving average in
    front. Causal tasks see the token and those before it in its chunk.
    """

    slicing: ClassVar = {"bias": ("center",)}

    def __init__(self, context: Context, *, chunk: int, key_width: int, expansion: float) -> None:
        super().__init__()
        width, inside = context.width, max(1, int(context.width * expansion))
        self.chunk, self.causal = chunk, context.kind == "causal"
        self.shared = Linear(width, key_width)
        self.value, self.reset = Linear(width, inside), Linear(width, inside)
        self.update, self.candidate, self.out = Linear(width, width), Linear(width, width), Linear(inside, width)
        self.query_scale, self.key_scale = (nn.Parameter(0.02 * torch.randn(key_width)) for _ in range(2))
        self.query_shift, self.key_shift = (nn.Parameter(torch.zeros(key_width)) for _ in range(2))
        self.bias = nn.Parameter(0.02 * torch.randn(2 * chunk - 1))

    def _mask(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """(chunks, tokens, tokens), or with one for all: the bias of a distance, and what is not attended to."""
        length = min(self.chunk, tokens)
        place = torch.arange(length, device=self.bias.device)
        mask: Tensor = self.bias.to(dtype)[place - place[:, None] + self.chunk - 1].unsqueeze(0)
        if self.causal:
            return mask.masked_fill(place > place[:, None], float("-inf"))
        if tokens % length:
            there = torch.arange(-(-tokens // length) * length, device=place.device).view(-1, 1, length) < tokens
            mask = mask.masked_fill(~there, float("-inf"))
        return mask

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        tokens = x.flatten(1, -2)
        shared, v = F.silu(self.shared(tokens)), F.silu(self.value(tokens))
        q = shared * self.query_scale.to(shared.dtype) + self.query_shift.to(shared.dtype)
        k = shared * self.key_scale.to(shared.dtype) + self.key_shift.to(shared.dtype)
        count = tokens.shape[1]
        length = min(self.chunk, count)
        q, k, v = (F.pad(t, (0, 0, 0, -count % length)).unflatten(1, (-1, length)) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(count, q.dtype)).flatten(1, 2)[:, :count]
        h = F.silu(self.candidate(tokens) + self.out(y * F.silu(self.reset(tokens))))
        out: Tensor = torch.sigmoid(self.update(tokens)) * (h - tokens)
        return out.view(x.shape)
