"""Pooling between projections: what mixes tokens has no parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "parameter_free",
    paper="Han et al. 2022, Learning Features with Parameter-Free Layers (arXiv 2202.02777), sections 3 and 4",
    knobs={
        "form": Knob("eff", choices=("eff", "max"), doc="eff: pooling between projections; max: pooling alone"),
        "pool_size": Knob(3, choices=(3, 5, 7)),
    },
)
class ParameterFree(nn.Module):
    """eff: out(gelu(max_pool(gelu(up(x))))) with 3 C channels inside and biases; max: max_pool(x).

    The maximum is over the window, of stride 1; in causal tasks the window ends at the token.
    """

    def __init__(self, context: Context, *, form: str, pool_size: int) -> None:
        super().__init__()
        self.pool_size, self.causal = pool_size, context.kind == "causal"
        self.projects = form == "eff"
        if self.projects:
            self.up, self.out = Linear(context.width, 3 * context.width), Linear(3 * context.width, context.width)

    def _pooled(self, x: Tensor) -> Tensor:
        k = self.pool_size
        if x.dim() == 4:
            return F.max_pool2d(x.permute(0, 3, 1, 2), k, 1, k // 2).permute(0, 2, 3, 1)
        channels_first = x.transpose(1, 2)
        if self.causal:
            padded = F.pad(x, (0, 0, k - 1, 0), value=float("-inf"))
            return F.max_pool1d(padded.transpose(1, 2), k, 1).transpose(1, 2)
        return F.max_pool1d(channels_first, k, 1, k // 2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if not self.projects:
            return self._pooled(x).contiguous()  # torch's pooling answers in layouts of its own
        y: Tensor = self.out(F.gelu(self._pooled(F.gelu(self.up(x)))))
        return y
