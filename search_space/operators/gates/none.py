"""No gate. A gate is `forward(x, mixer)`: it calls the mixer once and returns the gated output."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mixnas.search_space.registry import Context, register

Mixer = Callable[[Tensor], Tensor]


@register(
    "gate", "none", paper="Yu et al. 2022, MetaFormer Is Actually What You Need (arXiv 2111.11418)", pointwise=True
)
class NoGate(nn.Module):
    """The mixer alone."""

    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        return mixer(x)
