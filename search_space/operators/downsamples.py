"""Between stages: a change of width, and of resolution where asked. Takes the contexts before and after."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Conv, DepthwiseConv, Linear, normed
from mixnas.search_space.operators.norms import LayerNorm
from mixnas.search_space.operators.stems import EmbeddingStem, OverlapPatch
from mixnas.search_space.registry import Context, Value, register


def _halves(context: Context, knobs: object) -> str | None:
    if any(extent < 2 or extent % 2 for extent in context.size):
        return f"it halves the size, and {'x'.join(map(str, context.size))} is not even"
    return None


@register("downsample", "none", paper="Yu et al. 2022, MetaFormer Is Actually What You Need (arXiv 2111.11418)")
class NoDownsample(nn.Module):
    """Keeps the resolution; a change of width is a linear projection, an equal width passes through."""

    def __init__(self, before: Context, after: Context) -> None:
        super().__init__()
        self.linear = Linear(before.width, after.width) if before.width != after.width else None

    out_size = EmbeddingStem.out_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C_in) to (B, ..., C)."""
        return x if self.linear is None else self.linear(x)


class _Halving(nn.Module):
    kernel_size = 2
    padding = 0

    def __init__(self, before: Context, after: Context) -> None:
        super().__init__()
        self.conv = Conv(before.width, after.width, self.kernel_size, 2, padding=self.padding)

    @staticmethod
    def out_size(size: tuple[int, ...], **_: Value) -> tuple[int, ...]:
        """Half of each extent."""
        return tuple(extent // 2 for extent in size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) to (B, H/2, W/2, C)."""
        y: Tensor = self.conv(x)
        return y


@register(
    "downsample",
    "patch",
    kinds=("image",),
    paper="Liu et al. 2022, A ConvNet for the 2020s (arXiv 2201.03545), section 2.6, without its norm",
    check=_halves,
)
class PatchDownsample(_Halving):
    """Convolution 2x2 of stride 2."""


@register(
    "downsample",
    "conv",
    kinds=("image",),
    paper="Yu et al. 2022, MetaFormer Is Actually What You Need (arXiv 2111.11418), overlapping patch embedding",
    check=_halves,
)
class ConvDownsample(_Halving):
    """Convolution 3x3 of stride 2, padding 1."""

    kernel_size = 3
    padding = 1


@register(
    "downsample",
    "overlap_patch",
    kinds=("image",),
    paper="Wang et al. 2022, PVT v2 (arXiv 2106.13797), section 3.2, overlapping patch embedding",
    check=_halves,
)
class OverlapPatchDownsample(OverlapPatch):
    """Convolution 3x3 of stride 2, padding 1, and a layer norm: `conv` and what keeps it in range."""

    def __init__(self, before: Context, after: Context) -> None:
        super().__init__(before, after, 2)

    out_size = _Halving.out_size


@register(
    "downsample",
    "fused_inverted_residual",
    kinds=("image",),
    paper="Hatamizadeh et al. 2023, Global Context Vision Transformers (arXiv 2206.09959), section 3.1, downsampler",
    check=_halves,
)
class FusedInvertedResidual(nn.Module):
    """With z = norm(x), u = gelu(depthwise3(z)): norm(conv3 of stride 2(z + W (u * se(u)))), no biases but the norms'.

    se(u) = sigmoid(W2 gelu(W1 mean(u))) with a quarter of the channels; norms are layer norms, eps 1e-5. The authors'
    stem is a `conv` stem of stride 2 and this one before the first stage.
    """

    def __init__(self, before: Context, after: Context) -> None:
        super().__init__()
        width, hidden = before.width, max(1, before.width // 4)
        self.norm, self.out_norm = LayerNorm(before), LayerNorm(after)
        self.norm.eps = self.out_norm.eps = 1e-5
        self.depthwise = DepthwiseConv(before, 3, bias=False)
        self.squeeze = Linear(width, hidden, bias=False)
        self.excite = Linear(hidden, width, bias=False)
        self.project = Linear(width, width, bias=False)
        self.reduce = Conv(width, after.width, 3, 2, padding=1, bias=False)

    out_size = _Halving.out_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) to (B, H/2, W/2, C)."""
        x = normed(self.norm, x)
        y = self.depthwise(x, "gelu")
        factors = self.excite(F.gelu(self.squeeze(y.mean(dim=(1, 2), keepdim=True)))).sigmoid()
        return normed(self.out_norm, self.reduce(x + self.project(y * factors)))
