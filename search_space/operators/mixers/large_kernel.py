"""A large depthwise kernel that is trained as several smaller, dilated ones beside it."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.kernels.depthwise_conv1d import depthwise_conv1d
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d
from mixnas.search_space.operators.layers import DepthwiseConv, window_conv
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, register

BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Extent and dilation of the kernels that are trained beside one of the size: the authors' table."""


class _Branch(nn.Module):
    """A depthwise convolution without bias and its batch norm."""

    def __init__(self, context: Context, extent: int, dilation: int) -> None:
        super().__init__()
        self.conv = DepthwiseConv(context, extent, bias=False)
        self.norm = BatchNorm(context)
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        """As it is trained."""
        if self.dilation == 1:
            return self.norm(self.conv(x))
        y = window_conv(x, self.conv.weight, dilation=self.dilation, groups=x.shape[-1])
        return self.norm(y)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Taps with the norm in them, and the bias: what it computes in evaluation."""
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight: Tensor = self.conv.weight
        return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), norm.bias - norm.running_mean * scale


class Reparameterised(nn.Module):
    """norm(depthwise(x)) + sum over branches of norm_j(dilated depthwise_j(x)): trained so, and one convolution after.

    In evaluation the branches are one depthwise kernel with a bias (`merged`), which computes the same; deployed
    it has that alone.

    Args:
        context: Where it stands.
        kernel_size: Extent of the large kernel, odd.
        branches: Extent and dilation of each that is trained beside it; none reaches further.
    """

    kernel: nn.Parameter | None
    offset: nn.Parameter | None

    def __init__(self, context: Context, kernel_size: int, branches: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.large = _Branch(context, kernel_size, 1)
        self.branches = nn.ModuleDict()
        for extent, dilation in branches:
            self.branches[f"{extent}x{dilation}"] = _Branch(context, extent, dilation)
        self.register_parameter("kernel", None)
        self.register_parameter("offset", None)

    def merged(self) -> tuple[Tensor, Tensor]:
        """The one kernel, (C, 1, K, K) or (C, 1, K), and its bias (C,)."""
        if self.kernel is not None and self.offset is not None:
            return self.kernel, self.offset
        weight, bias = self.large.merged()
        size = weight.shape[-1]
        for branch in self.branches.values():
            assert isinstance(branch, _Branch)
            taps, offset = branch.merged()
            spread = branch.dilation * (taps.shape[-1] - 1) + 1
            around = slice((size - spread) // 2, (size + spread) // 2, branch.dilation)
            weight[(slice(None), slice(None)) + (around,) * (weight.dim() - 2)] += taps
            bias = bias + offset
        return weight, bias

    def merge(self) -> None:
        """Keep these two alone, in place; see `folding.merge`."""
        if self.kernel is None:
            kernel, offset = self.merged()
            del self.large, self.branches
            self.kernel, self.offset = nn.Parameter(kernel), nn.Parameter(offset)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if self.training:
            y: Tensor = self.large(x)
            for branch in self.branches.values():
                y = y + branch(x)
            return y
        weight, bias = (tensor.to(x.dtype) for tensor in self.merged())
        if x.dim() == 3:
            return depthwise_conv1d(x, weight, bias, causal=False)
        return depthwise_conv2d(x, weight, bias)


# Batch norms' statistics are over all positions, which in a causal network would show the future.
@register(
    "mixer",
    "large_kernel",
    kinds=("image", "sequence"),
    paper="Ding et al. 2024, UniRepLKNet (arXiv 2311.15599), section 3.1, dilated re-parameterisation",
    knobs={"kernel_size": Knob(13, choices=tuple(BRANCHES))},
)
class LargeKernel(Reparameterised):
    """`Reparameterised` with the authors' table of branches. It has no projections: policies leave it as it is."""

    def __init__(self, context: Context, *, kernel_size: int) -> None:
        super().__init__(context, kernel_size, BRANCHES[kernel_size])
