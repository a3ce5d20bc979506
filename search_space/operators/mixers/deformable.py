"""Deformable convolution, also with offsets that hardware can serve: bounded, of one number a token, whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, WindowConv
from mixnas.search_space.registry import Context, Knob, register

_TAPS = 3  # of the window along each axis


@register(
    "mixer",
    "deformable",
    kinds=("image",),
    paper="Huang et al. 2021, CoDeNet: Efficient Deployment of Input-Adaptive Object Detection on Embedded FPGAs "
    "(arXiv 2006.08357), section 3; Algorithm-hardware Co-design for Deformable Convolution",
    knobs={
        "form": Knob("square", choices=("original", "bound", "square"), doc="what a token says of its taps"),
        "bound": Knob(8, choices=(2, 4, 8), doc="tokens that a tap moves at most, but in the original form"),
        "taps": Knob("depthwise", choices=("dense", "depthwise"), doc="the convolution's kernel"),
        "whole": Knob(False, doc="whether evaluation rounds offsets to whole tokens: nothing is interpolated"),
    },
)
class Deformable(nn.Module):
    """A convolution of 3 x 3 taps without bias; tap j of token u reads x between tokens, at u + j + offset_j(u).

    original: two offsets for each tap, free; bound: the same, at most `bound` either way; square: one number s from 0
    to `bound` for each token, offset s j, so that its taps are a square of dilation 1 + s. A convolution of 3 x 3 tells
    the offsets, in the original and the depthwise form a layer; they begin at zero. The depthwise form has a layer from
    C to C before all. What lies outside is zero. `whole` rounds in evaluation alone: rounding has no gradients to train
    with. Only the layers and the offsets' convolution are projections.
    """

    window: Tensor

    def __init__(self, context: Context, *, form: str, bound: int, taps: str, whole: bool) -> None:
        super().__init__()
        width, told = context.width, 1 if form == "square" else 2 * _TAPS**2
        self.form, self.bound, self.whole = form, bound, whole
        self.mix = Linear(width, width, bias=False) if taps == "depthwise" else None
        # The dense and the depthwise kernel have names of their own: they are no parts of each other.
        shape = (width, 1 if taps == "depthwise" else width, _TAPS, _TAPS)
        self.kernel = nn.ParameterDict({taps: nn.Parameter(torch.empty(shape))})
        nn.init.kaiming_uniform_(self.kernel[taps], a=5**0.5)
        name = f"{form}_{taps}"
        as_layer = form == "original" or taps == "depthwise"
        offsets = Linear(width, told) if as_layer else WindowConv(context, told, _TAPS)
        for parameter in offsets.parameters():
            nn.init.zeros_(parameter)
        self.offsets = nn.ModuleDict({name: offsets})
        along = torch.arange(_TAPS) - float(_TAPS // 2)
        window = torch.stack(torch.meshgrid(along, along, indexing="ij"), dim=-1).flatten(0, 1)
        self.register_buffer("window", window, persistent=False)  # (taps, 2), as (down, across)

    def _places(self, x: Tensor) -> Tensor:
        """(B, H, W, taps, 2): where each tap reads, against its token."""
        (told,) = (layer(x) for layer in self.offsets.values())
        told = told.to(torch.promote_types(told.dtype, torch.float32))
        window = self.window.to(told.dtype)
        if self.form == "square":
            offsets = told.clamp(0, self.bound).unsqueeze(-1) * window
        else:
            offsets = told.unflatten(-1, window.shape)
            offsets = offsets.clamp(-self.bound, self.bound) if self.form == "bound" else offsets
        if self.whole and not self.training:
            offsets = offsets.round()
        return window + offsets

    def _read(self, x: Tensor, places: Tensor) -> Tensor:
        """(B, C, taps, H, W): x at the places, between tokens weighed by nearness."""
        _, height, width, _ = x.shape
        rows, columns = (torch.arange(n, device=x.device, dtype=places.dtype) for n in (height, width))
        # From -1 to 1 is from the first token's outer edge to the last one's.
        down = (2 * (rows.view(-1, 1, 1) + places[..., 0]) + 1) / height - 1
        across = (2 * (columns.view(-1, 1) + places[..., 1]) + 1) / width - 1
        grid = torch.stack([across, down], dim=-1).permute(0, 3, 1, 2, 4).flatten(1, 2)
        read = F.grid_sample(x.movedim(-1, 1).to(grid.dtype), grid, align_corners=False)
        return read.unflatten(2, (-1, height)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        if self.mix is not None:
            x = self.mix(x)
        read = self._read(x, self._places(x))
        (kernel,) = (weight.to(x.dtype) for weight in self.kernel.values())
        if self.mix is not None:
            y = (read * kernel.view(-1, _TAPS**2, 1, 1)).sum(dim=2)
        else:
            y = (kernel.flatten(1) @ read.flatten(1, 2).flatten(2)).unflatten(-1, x.shape[1:-1])
        return y.movedim(1, -1).contiguous()
