"""Attention inside windows whose queries come from the whole image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.operators.mixers.window_attention import WindowAttention, as_grid, tiles, untiled
from mixnas.search_space.registry import Context, Knob, register

_SQUEEZE = 4  # of the channels inside the generator's squeeze and excitation


class _Features(nn.Module):
    """x + project(excite(gelu(depthwise(x)))), without biases."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        narrow = max(1, context.width // _SQUEEZE)
        self.window = DepthwiseConv(context, 3, bias=False)
        self.squeeze, self.excite = Linear(context.width, narrow, bias=False), Linear(narrow, context.width, bias=False)
        self.project = Linear(context.width, context.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        y = self.window(x, "gelu")
        means = y.mean(dim=tuple(range(1, y.dim() - 1)), keepdim=True)
        z: Tensor = x + self.project(y * torch.sigmoid(self.excite(F.gelu(self.squeeze(means)))))
        return z


# The queries are made of later tokens too.
@register(
    "mixer",
    "global_context_attention",
    kinds=("image", "sequence"),
    paper="Hatamizadeh et al. 2023, GC ViT (arXiv 2206.09959), sections 3.1 and 3.2, global queries",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width"),
        "window": Knob(7, low=1, high=64, doc="extent of a tile; where the grid is smaller, all of it"),
        "levels": Knob(
            2, choices=(1, 2, 3), doc="steps of the generator, each halving where the tile is still smaller"
        ),
    },
    check=_heads_divide,
)
class GlobalContextAttention(WindowAttention):
    """Window attention whose queries are one tile for all windows of an image, made by the mixer of all its tokens.

    A step of the generator is a residual depthwise window of 3 with squeeze and excitation and a projection, without
    biases, and a maximum over 3 places with stride 2. Where that does not end at a tile's extent a mean does. In the
    paper a stage makes the queries once, of what its first block reads; here each block makes its own.
    """

    def __init__(self, context: Context, *, heads: int, window: int, levels: int) -> None:
        super().__init__(context, heads=heads, window=window, shift=False)
        del self.query
        self.generator = nn.ModuleList(_Features(context) for _ in range(levels))

    def queries(self, x: Tensor) -> Tensor:
        """(B, tokens of a tile, C), without a projection."""
        for step in self.generator:
            x = step(x)
            grid = as_grid(x)
            halved = tuple((n + 1) // 2 >= tile < n for n, tile in zip(grid.shape[1:3], self._tile, strict=True))
            if any(halved):
                kernel, stride, padding = ([a if h else b for h in halved] for a, b in ((3, 1), (2, 1), (1, 0)))
                grid = F.max_pool2d(grid.permute(0, 3, 1, 2), kernel, stride, padding).permute(0, 2, 3, 1)
                x = grid if x.dim() == 4 else grid.squeeze(1)
        y = as_grid(x).permute(0, 3, 1, 2)
        if tuple(y.shape[2:]) != self._tile:
            rows, columns = self._tile
            y = F.adaptive_avg_pool2d(y, (rows, columns))
        return y.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if tuple(x.shape[1:-1]) != self._size:
            self._set(tuple(x.shape[1:-1]))
        return self.attended(x, self.queries(x))

    def attended(self, x: Tensor, queries: Tensor) -> Tensor:
        """What each window of (B, ..., C) answers to its image's queries (B, tokens of a tile, C)."""
        grid = as_grid(x)
        size = (grid.shape[1], grid.shape[2])
        if any(self._padding):
            grid = F.pad(grid, (0, 0, 0, self._padding[1], 0, self._padding[0]))
        inside = tiles(grid, self._tile)
        k, v = (p(inside).unflatten(-1, (self.heads, -1)).transpose(2, 3) for p in (self.key, self.value))
        q = queries.to(k.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2).unsqueeze(1).expand(k.shape)
        mask = self._mask(q.dtype)
        begin = 0 if mask.shape[0] == self.heads else 1
        q, k, v = (t.flatten(begin, begin + 1) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.unflatten(begin, (-1, inside.shape[1]) if begin == 0 else (inside.shape[1], -1)).transpose(2, 3)
        full = (size[0] + self._padding[0], size[1] + self._padding[1])
        return untiled(self.out(y.flatten(3)), self._tile, full)[:, : size[0], : size[1]].reshape(x.shape).contiguous()
