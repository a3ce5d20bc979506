"""Latents that read their group of tokens, attend to all latents, and are read by the group."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, normed
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.operators.mixers.window_attention import as_grid, tiles, untiled
from mixnas.search_space.registry import Context, Knob, register

_EXPANSION = 4


class _Attention(nn.Module):
    """out(softmax(q k^T d^-1/2) v), queries of one, keys and values of another, each behind a layer norm."""

    def __init__(self, width: int, heads: int, *, crossed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.read_norm = nn.LayerNorm(width, eps=1e-6) if crossed else None
        self.query, self.key, self.value, self.out = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, read: Tensor | None = None) -> Tensor:
        """(..., N, C), reading (..., M, C) or itself; B is the first dimension."""
        n = normed(self.norm, x)
        m = n if read is None or self.read_norm is None else normed(self.read_norm, read)
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for p, t in ((self.query, n), (self.key, m), (self.value, m))
        )
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        return y


class _Encoder(nn.Module):
    """z + attention(z), then z + down(gelu(up(norm(z))))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = _Attention(width, heads, crossed=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = Linear(width, _EXPANSION * width), Linear(_EXPANSION * width, width)

    def forward(self, z: Tensor) -> Tensor:
        """(B, M, C) to the same."""
        z = z + self.attention(z)
        y: Tensor = z + self.down(F.gelu(self.up(normed(self.norm, z))))
        return y


# A latent reads all of its group, later tokens too, and its group reads it.
@register(
    "mixer",
    "fit",
    kinds=("image", "sequence"),
    paper="Chen and Li 2023, FIT: Far-reaching Interleaved Transformers (arXiv 2305.12689), section 3",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width"),
        "group": Knob(8, low=2, high=64, doc="extent of a group of tokens; where the grid is smaller, all of it"),
        "latents": Knob(4, low=1, high=64, doc="of each group"),
        "layers": Knob(1, choices=(1, 2, 4), doc="transformer layers over all latents"),
    },
    check=_heads_divide,
)
class FIT(nn.Module):
    """read(x, encoder(l + write(l, x))): l learned latents of each group, which write and read cross within the group.

    The encoder is of transformer layers over the latents of all groups, with feed-forward layers of four times the
    width; norms are before each part. Layers within a group are blocks of their own (`window_attention`). In the paper
    latents live on from block to block; here each block begins with its own. They are for one grid: on another they
    are not defined. Tokens that fill groups up at the ends are zeros that take part.
    """

    def __init__(self, context: Context, *, heads: int, group: int, latents: int, layers: int) -> None:
        super().__init__()
        width = context.width
        grid = (1, *context.size)[-2:]
        self.extents = tuple(min(group, n) for n in grid)
        self.count = latents
        groups = math.prod(-(-n // e) for n, e in zip(grid, self.extents, strict=True))
        self.latents = nn.Parameter(0.02 * torch.randn(groups * latents, width))
        self.write, self.read = (_Attention(width, heads, crossed=True) for _ in range(2))
        self.encoder = nn.ModuleList(_Encoder(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        grid = as_grid(x)
        size = (grid.shape[1], grid.shape[2])
        down, right = (-n % e for n, e in zip(size, self.extents, strict=True))
        if down or right:
            grid = F.pad(grid, (0, 0, 0, right, 0, down))
        groups = tiles(grid, self.extents)  # (B, groups, tokens, C)
        # Groups beside examples.
        tokens = groups.flatten(0, 1)
        z = self.latents.unflatten(0, (-1, self.count)).to(x.dtype).repeat(x.shape[0], 1, 1)
        z = (z + self.write(z, tokens)).unflatten(0, (-1, groups.shape[1])).flatten(1, 2)
        for layer in self.encoder:
            z = layer(z)
        z = z.unflatten(1, (groups.shape[1], -1)).flatten(0, 1)
        y = self.read(tokens, z).unflatten(0, (-1, groups.shape[1]))
        full = (size[0] + down, size[1] + right)
        return untiled(y, self.extents, full)[:, : size[0], : size[1]].reshape(x.shape).contiguous()
