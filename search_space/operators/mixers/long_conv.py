"""Convolutions as long as the sequence, by fast Fourier transform."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob, register


def _fast(length: int) -> int:
    """The next power of two: what the transform is fastest at."""
    return 1 << max(0, (length - 1).bit_length())


def convolved(u_BCL: Tensor, forward: Tensor, backward: Tensor | None = None) -> Tensor:
    """Sum over s <= t of forward[t - s] u_s, and over s > t of backward[s - t - 1] u_s, in float32 or better.

    Args:
        u_BCL: (B, C, L).
        forward: (..., C, L).
        backward: (..., C, L), or None.

    Returns:
        (B, ..., C, L) where the kernels have a leading dimension, (B, C, L) otherwise.
    """
    length = u_BCL.shape[-1]
    # With room for both directions nothing comes round the end.
    room = _fast(2 * length)
    kernel = F.pad(forward, (0, room - length))
    if backward is not None:
        kernel = kernel + F.pad(backward.flip(-1), (room - length, 0))
    exact = torch.promote_types(u_BCL.dtype, torch.float32)
    u = u_BCL if forward.dim() == 2 else u_BCL.unsqueeze(1)
    spectrum = torch.fft.rfft(u.to(exact), n=room) * torch.fft.rfft(kernel.to(exact), n=room)
    return torch.fft.irfft(spectrum, n=room)[..., :length].to(u_BCL.dtype)


@register(
    "mixer",
    "sgconv",
    kinds=("sequence", "causal"),
    paper="Li et al. 2023, SGConv, What Makes Convolutional Models Great on Long Sequence Modeling? "
    "(arXiv 2210.09298), section 3.2",
    knobs={
        "kernel_dim": Knob(32, choices=(16, 32, 64, 128), doc="taps of a scale"),
        "decay": Knob(2.0, low=1.0, high=8.0, doc="factor between one scale and the next"),
    },
)
class SGConv(nn.Module):
    """out(gelu(k * x + skip x)): the kernel is made of scales, each twice as long as the one before and weaker.

    Scale i has `kernel_dim` taps for each channel, stretched linearly to kernel_dim 2^max(0, i - 1) and times
    decay^(scales - 1 - i). The kernel's length (its norm along time) is that of the first weights, and stays: a buffer.
    Sequences have a second kernel for what comes after. A slice to fewer channels is the same operator; one to a
    shorter sequence has fewer scales, and the length of the longer kernel. Only `out` is a projection.
    """

    slicing: ClassVar = {"scales": ("lead",) * 4, "length": ("lead", "lead", "lead")}

    length: Tensor

    def __init__(self, context: Context, *, kernel_dim: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        directions = 1 if context.kind == "causal" else 2
        count = 1 + max(0, math.ceil(math.log2(context.tokens / kernel_dim)))
        self.scales = nn.Parameter(torch.randn(count, directions, context.width, kernel_dim))
        self.skip = nn.Parameter(torch.randn(context.width))
        self.out = Linear(context.width, context.width)
        with torch.no_grad():
            length = torch.linalg.vector_norm(self._long(), dim=-1, keepdim=True)
        self.register_buffer("length", length)

    def _long(self) -> Tensor:
        """(directions, C, taps), before it is divided by its length."""
        count, dim = self.scales.shape[0], self.scales.shape[-1]
        parts = []
        for i, scale in enumerate(self.scales):
            stretched = F.interpolate(scale, size=dim << max(0, i - 1), mode="linear") if i > 1 else scale
            parts.append(stretched * self.decay ** (count - 1 - i))
        return torch.cat(parts, dim=-1)

    def _kernels(self, tokens: int) -> Tensor:
        kernel = self._long() / self.length
        return F.pad(kernel, (0, max(0, tokens - kernel.shape[-1])))[..., :tokens]

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to the same."""
        u = x.transpose(1, 2)
        kernels = self._kernels(x.shape[1])
        y = convolved(u, kernels[0], kernels[1] if len(kernels) > 1 else None).transpose(1, 2)
        out: Tensor = self.out(F.gelu(y + self.skip * x))
        return out


@register(
    "mixer",
    "long_conv",
    kinds=("sequence", "causal"),
    paper="Fu et al. 2023, Simple Hardware-Efficient Long Convolutions (arXiv 2302.06646), section 3",
    knobs={
        "threshold": Knob(0.001, low=0.0, high=1.0, doc="taps become smaller by this, and those below it zero"),
        "channels": Knob(1, choices=(1, 2), doc="kernels of each channel"),
    },
    one_length=True,
)
class LongConv(nn.Module):
    """value(y) * sigmoid(gate(y)), y = gelu(k * x + skip x), k = sign(K) relu(|K| - threshold).

    A tap of its own for every distance: as long as the sequence in causal tasks, twice that in others. Initial taps are
    of a deviation of 0.002: with a threshold far above it nothing is left and nothing is learned. Its taps are no
    projection.
    """

    slicing: ClassVar = {"taps": ("lead", "lead", "lead", "lead")}

    def __init__(self, context: Context, *, threshold: float, channels: int) -> None:
        super().__init__()
        width, directions = context.width, 1 if context.kind == "causal" else 2
        self.threshold = threshold
        self.taps = nn.Parameter(0.002 * torch.randn(channels, directions, width, context.tokens))
        self.skip = nn.Parameter(torch.randn(channels, width))
        # A part for each kernel: a leading slice of each is a narrower layer.
        self.value, self.gate = (
            nn.ModuleList(Linear(width, width, bias=c == 0) for c in range(channels)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to the same."""
        tokens = x.shape[1]
        taps = self.taps.sign() * (self.taps.abs() - self.threshold).relu()
        taps = F.pad(taps, (0, max(0, tokens - taps.shape[-1])))[..., :tokens]
        u = x.transpose(1, 2)
        y = convolved(u, taps[:, 0], taps[:, 1] if taps.shape[1] > 1 else None)
        y = F.gelu((y + self.skip.unsqueeze(-1) * u.unsqueeze(1)).transpose(-1, -2))  # (B, channels, L, C)
        value, gate = (
            sum(layer(y[:, c]) for c, layer in enumerate(layers)) for layers in (self.value, self.gate)
        )  # fmt: skip
        return value * gate.sigmoid()
