"""A dense head whose classes and tokens move towards each other before they are compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixnas.search_space.errors import ConfigError
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, register


@register(
    "head",
    "offset_learning",
    kinds=("image", "sequence"),
    paper="Zhang et al. 2025, Revisiting Efficient Semantic Segmentation: Learning Offsets, OffSeg (arXiv 2508.08811)",
)
class OffsetLearning(nn.Module):
    """An answer for each token: how much the token is like each class, both with an offset learned from the other.

    (B, *size, C) to (B, *size, K), K answers. With F the N tokens, R the K x C representations of the classes and
    A = F R^T: R' = R + W_r(softmax over tokens(A)^T F), F' = F + W_f(softmax over classes(A) R), and the answer is
    LayerNorm over classes of F' R'^T. With both W = 0 it is `token` without a bias, and that norm.

    Raises:
        ConfigError: One answer, which a norm over answers makes constant.
    """

    def __init__(self, before: Context, after: Context) -> None:
        super().__init__()
        if after.width < 2:
            raise ConfigError(
                "head 'offset_learning': the task has 1 answer a token, and a norm over answers makes one constant. "
                "Take the head `token`."
            )
        self.classes = nn.Parameter(nn.init.trunc_normal_(torch.empty(after.width, before.width), std=0.02))
        self.class_offset = Linear(before.width, before.width, bias=False)
        self.token_offset = Linear(before.width, before.width, bias=False)
        self.norm = nn.LayerNorm(after.width)

    @staticmethod
    def out_size(size: tuple[int, ...]) -> tuple[int, ...]:
        """An answer for each token."""
        return size

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        tokens = x.flatten(1, -2)
        likeness = tokens @ self.classes.mT
        classes = self.classes + self.class_offset(likeness.softmax(dim=1).mT @ tokens)
        tokens = tokens + self.token_offset(likeness.softmax(dim=2) @ self.classes)
        answer: Tensor = self.norm(tokens @ classes.mT)
        return answer.unflatten(1, x.shape[1:-1])
