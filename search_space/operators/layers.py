"""Layers that operators are built from; channels last.

A projection goes through `Linear` or `Conv`, so that a quantization policy can take its place (see
`quantization.policy`); nothing else may read a projection's weight. The one exception is a fused kernel: where
`is_plain` says so it may be given the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.depthwise import laid_out
from mixnas.kernels.depthwise_conv1d import depthwise_conv1d
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d
from mixnas.kernels.dispatch import use_triton
from mixnas.kernels.epilogue import activation_function
from mixnas.search_space.registry import Context

KERNEL_SIZES = tuple(range(3, 32, 2))
"""Extents of a window around a token that operators offer."""


class Linear(nn.Linear):
    """A projection of the last dimension.

    Attributes:
        compute: The floating-point type that it computes in; None for that of its input.
    """

    compute: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in `compute`."""
        if self.compute is None:
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(self.compute)
        return F.linear(x.to(self.compute), self.weight.to(self.compute), bias)


class Conv(nn.Conv2d):
    """A dense convolution of images, channels last.

    Attributes:
        compute: As of `Linear`.
    """

    compute: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) to (B, H', W', C_out), in `compute`."""
        weight, bias = self.weight, self.bias
        if self.compute is not None:
            x, weight = x.to(self.compute), weight.to(self.compute)
            bias = None if bias is None else bias.to(self.compute)
        return self._conv_forward(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)


class Standardise(nn.Module):
    """(x - mean) / std of each channel: the first thing that a network does to raw features.

    Args:
        mean, std: One number a channel.

    Shape:
        Input and output (..., C).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        # Not trained, and known from the interface: nothing of it lies in a file of weights.
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("scale", 1.0 / torch.tensor(std), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return (x - self.mean) * self.scale


def projections(module: nn.Module) -> Iterator[tuple[str, Linear | Conv]]:
    """The layers inside that a policy may take the place of, by path ("" for the module itself)."""
    for path, layer in module.named_modules():
        if isinstance(layer, Linear | Conv):
            yield path, layer


def is_plain(*layers: nn.Module) -> bool:
    """Whether these compute as they stand, so that a fused kernel may be given their weights instead."""
    return all(type(layer) in (Linear, Conv) for layer in layers)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm inside an operator, in the norm's own precision: its input may come from a layer of less."""
    weight = norm.weight
    return norm(x.to(weight.dtype) if isinstance(weight, Tensor) else x)


class DepthwiseConv(nn.Module):
    """Depthwise convolution of stride 1 that keeps the size: 2-D on images, 1-D on sequences, left-padded if causal.

    It computes in its input's floating-point type.

    Args:
        context: Where it stands; `context.width` channels.
        kernel_size: Odd extent of a square (images) or one-dimensional window, or the two extents of an image window.
        bias: Whether a bias is added.

    Shape:
        Input and output (B, H, W, C) or (B, L, C); weight (C, 1, k, k) or (C, 1, k).
    """

    def __init__(self, context: Context, kernel_size: int | tuple[int, int], *, bias: bool = True) -> None:
        super().__init__()
        extents = (kernel_size,) * len(context.size) if isinstance(kernel_size, int) else kernel_size
        self.causal = context.kind == "causal"
        self.padding = tuple(k // 2 for k in extents)
        self.weight = nn.Parameter(torch.empty(context.width, 1, *extents))
        self.bias = nn.Parameter(torch.zeros(context.width)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DepthwiseConv:
        """Move or cast it; a deployed one that comes to a GPU gets its taps in the order that the kernels read."""
        super()._apply(fn, recurse)
        if self.weight.is_cuda and not self.weight.requires_grad:
            self.lay_out()
        return self

    def lay_out(self) -> None:
        """Put the taps into the memory order of the GPU's kernels, which else copy them in every call."""
        taps = self.weight.data
        self.weight.data = laid_out(taps) if taps.dim() == 4 else laid_out(taps.unsqueeze(2)).squeeze(2)

    def forward(self, x: Tensor, activation: str = "none", gate: Tensor | None = None) -> Tensor:
        """See the class; activation(conv(x)) * gate, as in `kernels.depthwise_conv2d`, fused on a GPU."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if weight.dtype != x.dtype and not use_triton(x, weight):  # the kernels read taps of another type
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if x.dim() == 3:
            return depthwise_conv1d(x, weight, bias, gate, activation, self.causal)
        if weight.shape[-1] == weight.shape[-2]:
            return depthwise_conv2d(x, weight, bias, gate, activation)
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=self.padding, groups=x.shape[-1])
        y = activation_function(y.permute(0, 2, 3, 1), activation)
        return y if gate is None else y * gate


def window_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution of stride 1 that keeps the size, with taps that are no layer's: those made from something else.

    Args:
        x: (B, H, W, C) or (B, L, C).
        weight: (C', C / groups, k, k) or (C', C / groups, k), k odd; taken in the type of `x`.
        bias: (C',).
        causal: On sequences, whether the window ends at the token.
        dilation: Distance between taps.
        groups: As of `torch.nn.functional.conv2d`.

    Returns:
        (B, H, W, C') or (B, L, C'), contiguous.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    reach = dilation * (weight.shape[-1] - 1)
    if x.dim() == 4:
        options = {"padding": reach // 2, "dilation": dilation, "groups": groups}
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, **options).permute(0, 2, 3, 1).contiguous()
    # As an image of one row: its convolution answers with channels last, as it was given.
    before = reach if causal else reach // 2
    row = F.pad(x, (0, 0, before, reach - before)).unsqueeze(1).permute(0, 3, 1, 2)
    y = F.conv2d(row, weight.unsqueeze(2), bias, dilation=(1, dilation), groups=groups)
    return y.permute(0, 2, 3, 1).squeeze(1).contiguous()


class WindowConv(nn.Module):
    """Dense convolution of stride 1 that keeps the size: 2-D on images, 1-D on sequences, left-padded if causal.

    Its one layer is a `Conv`, so that a policy can take its place.

    Args:
        context: Where it stands; `context.width` channels are read.
        width: Channels of the output.
        kernel_size: Odd extent of a square (images) or one-dimensional window.
        bias: Whether a bias is added.

    Shape:
        (B, H, W, C) to (B, H, W, width), or (B, L, C) to (B, L, width); weight (width, C, k, k) or (width, C, 1, k).
    """

    def __init__(self, context: Context, width: int, kernel_size: int, *, bias: bool = True) -> None:
        super().__init__()
        k = kernel_size
        self.before = k - 1 if context.kind == "causal" else 0
        if len(context.size) == 2:
            self.conv = Conv(context.width, width, k, padding=k // 2, bias=bias)
        else:
            self.conv = Conv(context.width, width, (1, k), padding=(0, 0 if self.before else k // 2), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y: Tensor
        if x.dim() == 4:
            y = self.conv(x)
            return y
        y = self.conv(F.pad(x, (0, 0, self.before, 0)).unsqueeze(1)).squeeze(1)
        return y
