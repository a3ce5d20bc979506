"""Token mixers that look at a fixed window: identity, pooling, depthwise and inception-style depthwise convolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import KERNEL_SIZES, DepthwiseConv
from mixnas.search_space.registry import Context, Knob, Value, register


@register(
    "mixer", "identity", paper="Yu et al. 2024, MetaFormer Baselines for Vision (arXiv 2210.13452)", pointwise=True
)
class Identity(nn.Module):
    """No mixing of tokens."""

    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x unchanged."""
        return x


@register(
    "mixer",
    "pooling",
    paper="Yu et al. 2022, MetaFormer Is Actually What You Need (arXiv 2111.11418), equation 4",
    knobs={"pool_size": Knob(3, choices=KERNEL_SIZES)},
)
class Pooling(nn.Module):
    """Average over the window, minus the token itself; padding is not counted. Causal: the window ends at the token."""

    def __init__(self, context: Context, *, pool_size: int) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.causal = context.kind == "causal"

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, ..., C) to the same; `valid` (B, L, 1): which tokens count."""
        k = self.pool_size
        if valid is not None:
            there = valid.to(x.dtype)
            both = torch.cat([x * there, there], dim=-1).transpose(1, 2)
            y = F.avg_pool1d(both, k, 1, k // 2).transpose(1, 2)
            y = y[..., :-1] / y[..., -1:].clamp(min=0.5 / k)  # at a token that is there it is at least 1 / k
        elif x.dim() == 4:
            y = F.avg_pool2d(x.permute(0, 3, 1, 2), k, 1, k // 2, count_include_pad=False).permute(0, 2, 3, 1)
        elif not self.causal:
            y = F.avg_pool1d(x.transpose(1, 2), k, 1, k // 2, count_include_pad=False).transpose(1, 2)
        else:
            padded = F.pad(x, (0, 0, k - 1, 0)).transpose(1, 2)
            counted = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype).clamp(max=k)
            y = (F.avg_pool1d(padded, k, 1) * (k / counted)).transpose(1, 2)
        return (y - x).contiguous()  # torch's pooling answers in layouts of its own


@register(
    "mixer",
    "dwconv",
    paper="Ding et al. 2022, Scaling Up Your Kernels to 31x31 (arXiv 2203.06717); Liu et al. 2022 (arXiv 2201.03545)",
    knobs={"kernel_size": Knob(7, choices=KERNEL_SIZES)},
)
class DWConv(DepthwiseConv):
    """Depthwise convolution with bias, kernel sizes 3 to 31."""

    def __init__(self, context: Context, *, kernel_size: int) -> None:
        super().__init__(context, kernel_size)

    def forward(
        self, x: Tensor, activation: str = "none", gate: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """See `DepthwiseConv`; `valid` (B, L, 1): what is not there is as what lies beyond the ends."""
        return super().forward(x if valid is None else x * valid, activation, gate)


def _has_branches(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if int(context.width * float(knobs["branch_ratio"])) < 1:
        return f"branch_ratio {knobs['branch_ratio']} leaves no channel of width {context.width} to the branches"
    return None


@register(
    "mixer",
    "inception_dwconv",
    paper="Yu et al. 2024, InceptionNeXt (arXiv 2303.16900), section 3.2",
    knobs={
        "band_kernel_size": Knob(11, choices=KERNEL_SIZES, doc="extent of the band kernels"),
        "square_kernel_size": Knob(3, choices=(3, 5, 7), doc="extent of the square kernel"),
        "branch_ratio": Knob(0.125, low=0.03125, high=0.3333, doc="channels of each branch over width"),
    },
    check=_has_branches,
)
class InceptionDWConv(nn.Module):
    """Channels in the order [untouched | square k x k | band 1 x k | band k x 1]; sequences: [untouched | band k]."""

    def __init__(
        self, context: Context, *, band_kernel_size: int, square_kernel_size: int, branch_ratio: float
    ) -> None:
        super().__init__()
        branch = Context(int(context.width * branch_ratio), context.size, context.kind)
        band, square = band_kernel_size, square_kernel_size
        if len(context.size) == 2:
            extents: list[int | tuple[int, int]] = [square, (1, band), (band, 1)]
        else:
            extents = [band]
        self.branches = nn.ModuleList(DepthwiseConv(branch, extent) for extent in extents)
        self.split = [context.width - len(extents) * branch.width] + [branch.width] * len(extents)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, ..., C) to the same; `valid` (B, L, 1): what is not there is as what lies beyond the ends."""
        if valid is not None:
            x = x * valid
        untouched, *parts = x.split(self.split, dim=-1)
        return torch.cat([untouched, *(conv(part) for conv, part in zip(self.branches, parts, strict=True))], dim=-1)
