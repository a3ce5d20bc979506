"""Attention on some of the channels with one head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, normed
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, register


# Norms' statistics are over all positions, which in a causal network would show the future.
@register(
    "mixer",
    "single_head_attention",
    kinds=("image", "sequence"),
    paper="Yun and Ro 2024, SHViT (arXiv 2401.16456), section 3.2",
    knobs={
        "ratio": Knob(
            0.25, low=0.03125, high=0.9375, doc="channels that are attended over width; 1 / 4.67 in the paper"
        ),
        "key_width": Knob(16, choices=(8, 16, 32), doc="channels of queries and keys"),
    },
)
class SingleHeadAttention(nn.Module):
    """norm_out(out(relu([attention(group_norm(a)) | b]))), a the first channels of x, b the others; no biases.

    Queries, keys and values are projections with batch norms, scale key_width^-1/2; the group norm has one group, over
    positions and channels. The last batch norm's weight is 0 at first: the operator begins as nothing.
    """

    folds = (("query_norm", "query"), ("key_norm", "key"), ("value_norm", "value"), ("out_norm", "out"))

    def __init__(self, context: Context, *, ratio: float, key_width: int) -> None:
        super().__init__()
        attended = max(1, int(context.width * ratio))
        self.split = [attended, context.width - attended]
        inside = Context(attended, context.size, context.kind)
        keys = Context(key_width, context.size, context.kind)
        self.norm = nn.GroupNorm(1, attended)
        self.query, self.key = (Linear(attended, key_width, bias=False) for _ in range(2))
        self.value = Linear(attended, attended, bias=False)
        self.query_norm, self.key_norm, self.value_norm = BatchNorm(keys), BatchNorm(keys), BatchNorm(inside)
        self.out = Linear(context.width, context.width, bias=False)
        self.out_norm = BatchNorm(context)
        nn.init.zeros_(self.out_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        attended, rest = x.flatten(1, -2).split(self.split, dim=-1)
        a = normed(self.norm, attended.transpose(1, 2)).transpose(1, 2)
        q = normed(self.query_norm, self.query(a))
        k = normed(self.key_norm, self.key(a))
        v = normed(self.value_norm, self.value(a))
        y = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        out: Tensor = normed(self.out_norm, self.out(torch.cat([y, rest], dim=-1).relu()))
        return out.view(x.shape)
