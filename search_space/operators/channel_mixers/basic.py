"""Channel mixers: the second half of a block. `forward(x)` keeps the shape (B, ..., C)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.glu import glu
from mixnas.search_space.operators.layers import DepthwiseConv
from mixnas.search_space.registry import Context, Knob, register

_EXPANSION = Knob(4.0, low=0.25, high=16, doc="hidden width over width")


@register("channel_mixer", "none", paper="Arora et al. 2023, Zoology (arXiv 2312.04927), blocks without an MLP")
class NoChannelMixer(nn.Module):
    """The block has no second half."""

    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Not called: the network leaves the half out."""
        raise AssertionError("a block with channel mixer 'none' has no second half")


@register(
    "channel_mixer",
    "mlp",
    paper="Vaswani et al. 2017 (arXiv 1706.03762), section 3.3, with GELU (arXiv 1606.08415)",
    knobs={"expansion": _EXPANSION},
)
class MLP(nn.Module):
    """W2 gelu(W1 x), with biases."""

    def __init__(self, context: Context, *, expansion: float) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        self.up = nn.Linear(context.width, hidden)
        self.down = nn.Linear(hidden, context.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.down(F.gelu(self.up(x)))


@register(
    "channel_mixer",
    "swiglu",
    paper="Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202), equation 6",
    knobs={"expansion": _EXPANSION},
)
class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x), without biases."""

    def __init__(self, context: Context, *, expansion: float) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        self.gate = nn.Linear(context.width, hidden, bias=False)
        self.up = nn.Linear(context.width, hidden, bias=False)
        self.down = nn.Linear(hidden, context.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.down(glu(self.gate(x), self.up(x)))


@register(
    "channel_mixer",
    "inverted_residual",
    paper="Sandler et al. 2018, MobileNetV2 (arXiv 1801.04381), section 3.3, pre-normalised, with GELU",
    knobs={
        "expansion": _EXPANSION,
        "kernel_size": Knob(3, choices=(3, 5, 7, 9, 11), doc="extent of the depthwise window"),
    },
)
class InvertedResidual(nn.Module):
    """W2 gelu(depthwise(gelu(W1 x))), with biases; the residual is the block's."""

    def __init__(self, context: Context, *, expansion: float, kernel_size: int) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        self.up = nn.Linear(context.width, hidden)
        self.depthwise = DepthwiseConv(Context(hidden, context.size, context.kind), kernel_size)
        self.down = nn.Linear(hidden, context.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.down(self.depthwise(F.gelu(self.up(x)), "gelu"))
