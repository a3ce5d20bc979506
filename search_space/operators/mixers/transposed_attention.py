"""Attention between channels: linear in the number of tokens, and over all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.registry import Context, Knob, register


# Channels are compared over all positions, which in a causal network would show the future.
@register(
    "mixer",
    "transposed_attention",
    kinds=("image", "sequence"),
    paper="Zamir et al. 2022, Restormer (arXiv 2111.09881), section 3.1, MDTA; as in TextPromptIR",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width"),
        "kernel_size": Knob(3, choices=(3, 5, 7), doc="extent of the depthwise windows"),
    },
    check=_heads_divide,
)
class TransposedAttention(nn.Module):
    """out(softmax(temperature q^T k) v) in each head, q and k (C / heads, N) of length 1 along tokens, no biases.

    q, k and v are depthwise convolutions of projections; each head has a temperature, 1 at first.
    """

    def __init__(self, context: Context, *, heads: int, kernel_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            Linear(context.width, context.width, bias=False) for _ in range(4)
        )
        self.query_window, self.key_window, self.value_window = (
            DepthwiseConv(context, kernel_size, bias=False) for _ in range(3)
        )
        self.temperature = nn.Parameter(torch.ones(heads))

    def _split(self, x: Tensor) -> Tensor:
        """(B, heads, C / heads, N)."""
        return x.flatten(1, -2).transpose(1, 2).unflatten(1, (self.heads, -1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        q = F.normalize(self._split(self.query_window(self.query(x))), dim=-1)
        k = F.normalize(self._split(self.key_window(self.key(x))), dim=-1)
        v = self._split(self.value_window(self.value(x)))
        logits = q @ k.transpose(-1, -2) * self.temperature.view(-1, 1, 1).to(q.dtype)
        y = (logits.softmax(dim=-1) @ v).flatten(1, 2).transpose(1, 2)
        out: Tensor = self.out(y)
        return out.view(x.shape)
