"""Attention over all tokens: softmax and linear."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob, Value, register

_HEADS = Knob(4, low=1, high=64, doc="heads; divides the width")


def _heads_divide(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if context.width % int(knobs["heads"]):
        return f"{knobs['heads']} heads do not divide width {context.width}"
    return None


class _Heads(nn.Module):
    """Projections to and from heads. q, k and v are separate so that a leading slice of each is a narrower layer."""

    def __init__(self, context: Context, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.causal = context.kind == "causal"
        self.query, self.key, self.value, self.out = (Linear(context.width, context.width) for _ in range(4))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, ..., C) to q, k, v of shape (B, heads, L, C / heads)."""
        shape = (x.shape[0], -1, self.heads, x.shape[-1] // self.heads)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.query, self.key, self.value))
        return q, k, v

    def join(self, y_BHLD: Tensor, like: Tensor) -> Tensor:
        """(B, heads, L, C / heads) to the shape of `like`, projected."""
        return self.out(y_BHLD.transpose(1, 2).reshape(like.shape))


@register(
    "mixer",
    "attention",
    paper="Vaswani et al. 2017, Attention Is All You Need (arXiv 1706.03762), section 3.2",
    knobs={"heads": _HEADS},
    check=_heads_divide,
)
class Attention(_Heads):
    """Multi-head softmax attention over all tokens, scale (C / heads)^-1/2; causal tasks see no later token."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, ..., C) to the same; `valid` (B, L, 1): which tokens there are to look at."""
        q, k, v = self.split(x)
        mask = None if valid is None else valid.unsqueeze(1).transpose(2, 3)
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal), x)


@register(
    "mixer",
    "linear_attention",
    paper="Katharopoulos et al. 2020, Transformers are RNNs (arXiv 2006.16236), equations 5 to 9, phi(x) = elu(x) + 1",
    knobs={"heads": _HEADS},
    check=_heads_divide,
)
class LinearAttention(_Heads):
    """phi(q) (sum phi(k) v^T) / (phi(q) sum phi(k)); causal tasks in chunks, exactly."""

    chunk = 64

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, ..., C) to the same; `valid` (B, L, 1): which tokens there are to look at."""
        q, k, v = self.split(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if valid is not None:
            k = k * valid.unsqueeze(1)
        if self.causal:
            return self.join(self._causal(q, k, v), x)
        denominator = q @ k.sum(dim=-2, keepdim=True).transpose(-1, -2)
        return self.join((q @ (k.transpose(-1, -2) @ v)) / (denominator + 1e-6), x)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
        norm = q.new_zeros(*q.shape[:2], q.shape[-1], 1)
        outputs = []
        for q_c, k_c, v_c in zip(*(t.split(self.chunk, dim=-2) for t in (q, k, v)), strict=True):
            scores = (q_c @ k_c.transpose(-1, -2)).tril()
            denominator = scores.sum(dim=-1, keepdim=True) + q_c @ norm
            outputs.append((scores @ v_c + q_c @ state) / (denominator + 1e-6))
            state = state + k_c.transpose(-1, -2) @ v_c
            norm = norm + k_c.sum(dim=-2).unsqueeze(-1)
        return torch.cat(outputs, dim=-2)
