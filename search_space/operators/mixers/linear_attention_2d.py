"""Linear attention with a window beside it: SLAB's and L2ViT's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.registry import Context, Knob, register

_HEADS = Knob(4, low=1, high=64, doc="heads; divides the width")


class _Heads(nn.Module):
    def __init__(self, context: Context, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (Linear(context.width, context.width) for _ in range(4))

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, heads, N, d)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


# Sums are over all tokens, later ones too.
@register(
    "mixer",
    "simplified_linear_attention",
    kinds=("image", "sequence"),
    paper="Guo et al. 2024, SLAB (arXiv 2405.11582), section 3.3",
    knobs={"heads": _HEADS, "kernel_size": Knob(5, choices=(3, 5, 7), doc="extent of the window over the values")},
    check=_heads_divide,
)
class SimplifiedLinearAttention(_Heads):
    """out(relu(q) (sum relu(k) v^T) / (relu(q) . sum relu(k)) + depthwise(v)), k with a learned vector for each place.

    The window's taps are the same for all heads. The vectors are for one grid: on another they are not defined.
    """

    def __init__(self, context: Context, *, heads: int, kernel_size: int) -> None:
        super().__init__(context, heads)
        self.position = nn.Parameter(torch.zeros(context.tokens, context.width))
        self.window = DepthwiseConv(Context(context.width // heads, context.size, context.kind), kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        tokens = x.flatten(1, -2)
        q = self._split(self.query(tokens)).relu()
        k = self.key(tokens)
        k = self._split(k + self.position.to(k.dtype)).relu()
        v = self._split(self.value(tokens))
        norm = q @ k.sum(dim=-2).unsqueeze(-1) + 1e-6
        y = (q @ (k.transpose(-1, -2) @ v)) / norm
        # Heads beside examples: each has the same taps.
        windows = self.window(v.flatten(0, 1).unflatten(1, x.shape[1:-1])).flatten(1, -2)
        y = y + windows.unflatten(0, (-1, self.heads))
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out.view(x.shape)


@register(
    "mixer",
    "focused_local_linear",
    kinds=("image", "sequence"),
    paper="Zheng 2025, The Linear Attention Resurrection in Vision Transformer (L2ViT, arXiv 2501.16182), section 3.2, "
    "linear global attention",
    knobs={
        "heads": _HEADS,
        "least": Knob(100.0, low=1e-3, high=1e4, doc="what a query's weights are divided by, at least"),
    },
    check=_heads_divide,
)
class FocusedLocalLinear(_Heads):
    """out(t_h relu(q) (sum relu(k) v^T) / max(relu(q) . sum relu(k), least)), t_h learned, d^-1/2 at first.

    The paper's concentration module is two depthwise windows behind a norm of its own, a block beside this one.
    """

    def __init__(self, context: Context, *, heads: int, least: float) -> None:
        super().__init__(context, heads)
        self.least = least
        self.temperature = nn.Parameter(torch.full((heads,), float((context.width // heads) ** -0.5)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        tokens = x.flatten(1, -2)
        q, k = self._split(self.query(tokens)).relu(), self._split(self.key(tokens)).relu()
        v = self._split(self.value(tokens))
        norm = (q @ k.sum(dim=-2).unsqueeze(-1)).clamp(min=self.least)
        scale = self.temperature.view(-1, 1, 1).to(q.dtype)
        y = (q @ (k.transpose(-1, -2) @ v)) / norm * scale
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out.view(x.shape)
