"""A head that tells a whole sequence from its last token: what a causal mixer can press into one state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.operators.norms import RMSNorm
from mixnas.search_space.registry import Context, register


def sines(length: int, width: int) -> Tensor:
    """(length, width): sines in the first half of the channels, cosines in the other; wavelengths 2 pi to 20,000 pi.

    Source: Vaswani et al. 2017, section 3.5, the halves side by side.
    """
    half = (width + 1) // 2
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float32) / max(half - 1, 1))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


@register(
    "head",
    "unrolled",
    kinds=("sequence", "causal"),
    paper="Poli et al. 2024, Mechanistic Design and Scaling of Hybrid Architectures (arXiv 2403.17844), compression",
)
class Unrolled(nn.Module):
    """The last token, with each position added in turn, through two layers: (B, L, C) to (B, L, outputs).

    Each answer is made of that one token and says nothing of causality: all come behind the last.
    """

    positions: Tensor
    one_answer = True  # see `tests/contracts/operator.py`

    def __init__(self, before: Context, after: Context) -> None:
        super().__init__()
        self.register_buffer("positions", sines(before.size[0], before.width), persistent=False)
        self.first, self.second = Linear(before.width, before.width), Linear(before.width, before.width)
        self.middle_norm, self.norm = RMSNorm(before), RMSNorm(before)
        self.linear = Linear(before.width, after.width)

    @staticmethod
    def out_size(size: tuple[int, ...]) -> tuple[int, ...]:
        """An answer for each token."""
        return size

    def features(self, x: Tensor) -> Tensor:
        """(B, L, C) to the same: what the last layer reads."""
        x = x[:, -1:] + self.positions
        x = self.middle_norm(F.gelu(self.first(x)))
        return self.norm(F.gelu(self.second(x)))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.linear(self.features(x))
