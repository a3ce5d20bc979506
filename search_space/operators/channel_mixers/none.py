"""No channel mixer: the block has no second half. A channel mixer is `forward(x)` and keeps the shape (B, ..., C)."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.registry import Context, register


@register(
    "channel_mixer",
    "none",
    paper="Arora et al. 2023, Zoology (arXiv 2312.04927), blocks without an MLP",
    pointwise=True,
)
class NoChannelMixer(nn.Module):
    """The block has no second half."""

    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Not called: the network leaves the half out."""
        raise AssertionError("a block with channel mixer 'none' has no second half")
