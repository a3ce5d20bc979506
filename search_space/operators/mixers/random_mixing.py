"""Tokens mixed by a random matrix that is never trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mixnas.search_space.registry import Context, Value, register

MOST_TOKENS = 1024


def _is_small(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if context.tokens > MOST_TOKENS:
        return f"a matrix of {context.tokens} x {context.tokens} tokens is stored; at most {MOST_TOKENS} tokens"
    return None


@register(
    "mixer",
    "random_mixing",
    paper="Yu et al. 2024, MetaFormer Baselines for Vision (arXiv 2210.13452), section 3.2, RandFormer",
    check=_is_small,
    one_length=True,
)
class RandomMixing(nn.Module):
    """R x, R = softmax of uniform numbers in each row, frozen; in causal tasks over the tokens so far.

    A lower bound: what is learned has to be better than this. The matrix is for one grid, and stored.
    """

    matrix: Tensor

    def __init__(self, context: Context) -> None:
        super().__init__()
        logits = torch.rand(context.tokens, context.tokens)
        if context.kind == "causal":
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
        self.register_buffer("matrix", logits.softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return (self.matrix.to(x.dtype) @ x.flatten(1, -2)).view(x.shape)
