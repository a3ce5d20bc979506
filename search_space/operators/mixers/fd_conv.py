"""Frequency dynamic convolution: a kernel that is stored as a spectrum, whose bands each image weighs for itself."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import normed, window_conv
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.operators.windows import own_dense
from mixnas.search_space.registry import Context, Knob, register

_TAPS = 3  # along each axis
_CUTS = (2, 4, 8)  # of the input's bands: half the frequencies, a quarter, an eighth
_PLACES = (64, 33)  # of the spectrum on which the authors mark the bands, before they stretch it to the input's


def bands_of(rows: int, columns: int, bands: int) -> Tensor:
    """(rows, columns // 2 + 1): the band of each cell of a real spectrum, as even numbers of cells by growing radius.

    Cells of equal radius are taken row by row, so that it is the same everywhere; radii are compared as the whole
    numbers that they are fractions of. The authors sort rounded radii by a sort that may leave equal ones in any order.
    """
    down = torch.arange(rows)
    down = torch.minimum(down, rows - down) * columns
    across = torch.arange(columns // 2 + 1) * rows
    radius = (down.square().unsqueeze(1) + across.square()).flatten()
    rank = torch.empty_like(radius)
    rank[radius.argsort(stable=True)] = torch.arange(len(radius))
    return (rank * bands // len(radius)).view(rows, -1)


def _low(size: tuple[int, ...]) -> Tensor:
    """(cuts, H, W // 2 + 1): 1 where a frequency of the input is below a cut."""
    down, across = torch.fft.fftfreq(_PLACES[0]).abs(), torch.fft.rfftfreq(2 * (_PLACES[1] - 1))
    largest = torch.maximum(down.unsqueeze(1), across)
    marked = torch.stack([(largest < 0.5 / cut + 1e-8).float() for cut in _CUTS])
    return F.interpolate(marked.unsqueeze(0), size=(size[0], size[1] // 2 + 1), mode="nearest")[0]


# Its gates are of means over all positions.
@register(
    "mixer",
    "fd_conv",
    kinds=("image",),
    paper="Chen et al. 2025, Frequency Dynamic Convolution for Dense Image Prediction (arXiv 2503.18783), section 3",
    knobs={
        "bands": Knob(4, choices=(1, 4, 16, 64), doc="of the kernel's spectrum, each with a weight of its own"),
        "local": Knob(True, doc="whether every tap has a gate of its own as well"),
        "input_bands": Knob(True, doc="whether the bands of the input are weighed too, at each token"),
    },
)
class FDConv(nn.Module):
    """A dense convolution of 3 x 3 taps without bias whose taps are F^-1(spectrum * weight of its band) * gates.

    The spectrum is of the kernel as an image of 3 C x 3 C (outputs and rows by inputs and columns), divided by C / 2.
    From z = s relu(norm(squeeze(mean of x)))^2 + b come, as 2 sigmoid of a layer, a gate for each input, output and
    tap, and one for each band over the number of bands; from the norm of the mean, by a convolution along channels, one
    for each number of the kernel (`local`). The input's bands below and between the cuts at a half, a quarter and an
    eighth of the frequencies are weighed at each token by 2 sigmoid of a convolution (`input_bands`), but the lowest.

    A slice of the spectrum is that of no smaller kernel: widths share numbers in a super-network, but a narrower one is
    not part of a wider. Cells of equal radius go to bands row by row (`bands_of`), where the authors leave the order
    open. Channel counts up to 16 are dynamic here; the authors take a plain convolution there. A batch of one has no
    statistics to train the norm on: it takes those that are kept. It has no projections: policies leave it as it is.
    """

    slicing: ClassVar = {"spectrum": ("lead", "lead", "lead"), "along": ("lead", "center", "center", "center")}

    folds: ClassVar = (("norm", "squeeze"),)

    bands: Tensor
    low: Tensor

    def __init__(self, context: Context, *, bands: int, local: bool, input_bands: bool) -> None:
        super().__init__()
        width, inside = context.width, Context(max(16, context.width // 16), context.size, context.kind)
        self.width, self.count = width, bands
        side = _TAPS * width
        kernel = torch.empty(width, width, _TAPS, _TAPS)
        nn.init.kaiming_uniform_(kernel, a=5**0.5)
        spectrum = torch.fft.rfft2(kernel.transpose(1, 2).reshape(side, side)) / max(1, width // 2)
        self.spectrum = nn.Parameter(torch.stack([spectrum.real, spectrum.imag], dim=-1))
        # Layers of one token an image, whose outputs are near zero at first: no projections that policies take.
        self.squeeze, self.norm = nn.Linear(width, inside.width, bias=False), BatchNorm(inside)
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.inputs, self.outputs = nn.Linear(inside.width, width), nn.Linear(inside.width, width)
        self.taps, self.weights = nn.Linear(inside.width, _TAPS**2), nn.Linear(inside.width, bands)
        for gate in (self.inputs, self.outputs, self.taps, self.weights):
            nn.init.normal_(gate.weight, std=1e-6)
            nn.init.zeros_(gate.bias)
        self.mean_norm = nn.LayerNorm(width) if local else None
        reach = round(math.log2(width) / 2 + 0.5) // 2 * 2 + 1
        # By output and tap, and the taps of the convolution along channels.
        self.along = nn.Parameter(torch.full((width, _TAPS, _TAPS, reach), 1e-6)) if local else None
        # Three outputs a token: no projection that policies take.
        self.modulation = nn.Parameter(1e-6 * torch.randn(len(_CUTS), width, _TAPS, _TAPS)) if input_bands else None
        self.modulation_bias = nn.Parameter(torch.zeros(len(_CUTS))) if input_bands else None
        self.register_buffer("bands", bands_of(side, side, bands), persistent=False)
        self._set(context.size)

    def _set(self, size: tuple[int, ...]) -> None:
        self._size = size
        self.register_buffer("low", _low(size).to(self.spectrum.device), persistent=False)

    def _normed(self, z: Tensor) -> Tensor:
        if not self.training or z.shape[0] > 1:
            return normed(self.norm, z)
        norm = self.norm
        return F.batch_norm(z.to(norm.weight.dtype), norm.running_mean, norm.running_var, norm.weight, norm.bias)

    def _taps(self, mean: Tensor) -> Tensor:
        """(B, 9 C, C): the kernel of each image, as `own_dense` takes it, from (B, C)."""
        z = self._normed(self.squeeze(mean)).relu().square() * self.scale + self.bias
        exact = torch.promote_types(z.dtype, torch.float32)
        inputs, outputs, taps, weights = (
            2 * gate(z).to(exact).sigmoid() for gate in (self.inputs, self.outputs, self.taps, self.weights)
        )
        # The spectrum was divided by C / 2, the weights are over the number of bands, and both are taken back.
        parts = (self.spectrum.to(exact) * max(1, self.width // 2)).unbind(dim=-1)
        weighed = weights.index_select(1, self.bands.flatten()).view(-1, *self.bands.shape)
        spectrum = torch.complex(parts[0] * weighed, parts[1] * weighed)
        side = _TAPS * self.width
        kernel = torch.fft.irfftn(spectrum, s=(side, side), dim=(1, 2)).view(-1, self.width, _TAPS, self.width, _TAPS)
        kernel = kernel * outputs.view(-1, self.width, 1, 1, 1) * inputs.view(-1, 1, 1, self.width, 1)
        kernel = kernel * taps.view(-1, 1, _TAPS, 1, _TAPS)
        if self.along is not None and self.mean_norm is not None:
            rows = normed(self.mean_norm, mean).to(exact).unsqueeze(1)
            along = self.along.to(exact).flatten(0, 2).unsqueeze(1)
            gates = F.conv1d(rows, along, padding=along.shape[-1] // 2).unflatten(1, (-1, _TAPS, _TAPS))
            kernel = kernel * (2 * gates.sigmoid()).transpose(3, 4)
        return kernel.permute(0, 2, 4, 3, 1).flatten(1, 3)

    def _modulated(self, x: Tensor) -> Tensor:
        """The input with its bands weighed."""
        if self.modulation is None:
            return x
        exact = torch.promote_types(x.dtype, torch.float32)
        weights = 2 * window_conv(x, self.modulation, self.modulation_bias).to(exact).sigmoid()
        size, whole = x.shape[1:3], x.to(exact)
        spectrum = torch.fft.rfftn(whole, dim=(1, 2), norm="ortho")
        y, above = torch.zeros_like(whole), whole
        for i, low in enumerate(self.low):
            kept = torch.fft.irfftn(spectrum * low.unsqueeze(-1), s=size, dim=(1, 2), norm="ortho")
            y, above = y + (above - kept) * weights[..., i : i + 1], kept
        return (y + above).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        if tuple(x.shape[1:-1]) != self._size:
            self._set(tuple(x.shape[1:-1]))
        return own_dense(self._modulated(x), self._taps(x.mean(dim=(1, 2))), _TAPS)
