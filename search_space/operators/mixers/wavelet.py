"""Haar wavelets: tokens are mixed on grids of half, a quarter, ... of the size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, normed
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, Value, register


def haar(u: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the Haar transform on images, channels last; a grid that is odd is filled with zeros.

    Args:
        u: (B, H, W, C).

    Returns:
        The smooth band (B, H', W', C) and the three of detail (B, H', W', 3 C), channel by channel: differences along
        the height, along the width, along both. H' and W' are half, rounded up.
    """
    height, width = u.shape[1:3]
    u = F.pad(u, (0, 0, 0, width % 2, 0, height % 2))
    a, b, c, d = u[:, ::2, ::2], u[:, ::2, 1::2], u[:, 1::2, ::2], u[:, 1::2, 1::2]
    details = torch.stack([a + b - c - d, a - b + c - d, a - b - c + d], dim=-1)
    return (a + b + c + d) / 2, details.flatten(-2) / 2


class _Level(nn.Module):
    """What is done on one grid: projections, and a transposed convolution to the grid of twice the size."""

    def __init__(self, context: Context, inner: int, coarser: int, width: int) -> None:
        super().__init__()
        quarter, hidden = inner, 2 * context.width
        self.smooth, self.detail = Linear(quarter, hidden), Linear(3 * quarter, hidden, bias=False)
        self.coarser = Linear(coarser, hidden, bias=False) if coarser else None
        self.mix = Linear(hidden, context.width)
        # Not a projection: (F, C', 4, 4), of stride 2.
        self.grow = nn.Parameter(torch.empty(context.width, width, 4, 4))
        self.bias = nn.Parameter(torch.zeros(width))
        self.norm = BatchNorm(Context(width, context.size, context.kind))
        nn.init.kaiming_uniform_(self.grow, a=5**0.5)

    def forward(self, bands: tuple[Tensor, Tensor], coarser: Tensor | None, size: tuple[int, ...]) -> Tensor:
        """(B, H', W', C / 4) and (B, H', W', 3 C / 4) to (B, *size, C')."""
        y = self.smooth(bands[0]) + self.detail(bands[1])
        if self.coarser is not None:
            y = y + self.coarser(coarser)
        y = self.mix(F.gelu(y)).permute(0, 3, 1, 2)
        y = F.conv_transpose2d(y, self.grow.to(y.dtype), self.bias.to(y.dtype), stride=2, padding=1)
        return normed(self.norm, y[..., : size[0], : size[1]].permute(0, 2, 3, 1))


def _has_quarter(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if context.width < 4:
        return f"a quarter of width {context.width} has no channel"
    return None


@register(
    "mixer",
    "wavelet",
    kinds=("image",),
    paper="Jeevan et al. 2023, WaveMix (arXiv 2205.14375), section 3",
    knobs={"levels": Knob(1, choices=(1, 2, 3, 4), doc="grids: of half the size, of a quarter, ...")},
    check=_has_quarter,
)
class Wavelet(nn.Module):
    """norm(grow(mix(gelu(expand(bands(u)))))), u = squeeze(x) with C / 4 channels, bands of the Haar transform.

    Each level transforms the smooth band of the level above; the deepest goes first, and what it gives (C / 2 channels)
    joins the bands of the next. `grow` is a transposed convolution of stride 2, the norm a batch norm. The paper's
    dropout inside is left out: how much a network is regularised is the training's to say.
    """

    def __init__(self, context: Context, *, levels: int) -> None:
        super().__init__()
        quarter, half = context.width // 4, max(1, context.width // 2)
        self.squeeze = Linear(context.width, quarter)
        # The first has the finest grid.
        self.levels = nn.ModuleList(
            _Level(context, quarter, half if level < levels - 1 else 0, context.width if level == 0 else half)
            for level in range(levels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        smooth = self.squeeze(x)
        bands, sizes = [], []
        for _ in self.levels:
            sizes.append(tuple(smooth.shape[1:3]))
            smooth, detail = haar(smooth)
            bands.append((smooth, detail))
        y: Tensor | None = None
        for level, layer in reversed(list(enumerate(self.levels))):
            y = layer(bands[level], y, sizes[level])
        assert y is not None
        return y
