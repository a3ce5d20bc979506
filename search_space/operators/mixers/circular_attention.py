"""Attention to what lies within a radius."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.operators.mixers.window_attention import as_grid, tiles, untiled
from mixnas.search_space.registry import Context, Knob, register

_BLOCK = 8  # extent of the blocks of queries that are computed at once


@register(
    "mixer",
    "circular_attention",
    paper="Liu et al. 2024, CLEAR (arXiv 2412.16112), section 3.2, circular window",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width"),
        "radius": Knob(4, low=1, high=64, doc="a token sees those that are nearer than this; 8, 16, 32 in the paper"),
        "reduction": Knob(
            1, choices=(1, 2, 4), doc="extent of the cells of a pooled grid that all see as well; 1: none"
        ),
    },
    check=_heads_divide,
)
class CircularAttention(nn.Module):
    """Multi-head softmax attention of each token to those with dy^2 + dx^2 < radius^2, and to a pooled grid.

    Pooled keys and values are sums over cells with learned weights, one for each place in a cell, of all channels and
    of both; a grid that cells do not divide is filled with zeros. Causal tasks see the token and those before it within
    the radius, and nothing pooled. Blocks of queries attend to their surroundings, of which a mask leaves the circle.
    """

    seen: Tensor

    def __init__(self, context: Context, *, heads: int, radius: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.radius = heads, radius
        self.causal = context.kind == "causal"
        self.query, self.key, self.value, self.out = (Linear(context.width, context.width) for _ in range(4))
        self.reduction = 1 if self.causal else reduction
        if self.reduction > 1:
            cell = (self.reduction,) * len(context.size)
            self.pool = nn.Parameter(torch.full(cell, float(self.reduction) ** -len(cell)))
        self._set(context.size)

    def _set(self, size: tuple[int, ...]) -> None:
        self._size, grid = size, (1, *size)[-2:]
        device = self.query.weight.device
        self._block = tuple(min(_BLOCK, n) for n in grid)
        # Nothing farther than the grid is wide.
        self._reach = tuple(min(self.radius, n) - 1 for n in grid)
        apart, inside = [], []
        for n, block, reach in zip(grid, self._block, self._reach, strict=True):
            keys = block + 2 * reach
            key, query = torch.arange(keys, device=device) - reach, torch.arange(block, device=device)
            apart.append(key - query[:, None])  # (queries, keys) along the axis
            place = torch.arange(0, n, block, device=device)[:, None] + key
            inside.append((place >= 0) & (place < n))  # (blocks, keys) along the axis
        near = apart[0].square()[:, None, :, None] + apart[1].square()[None, :, None, :] < self.radius**2
        if self.causal:
            near = near & (apart[1] <= 0)[None, :, None, :]
        there = inside[0][:, None, :, None] & inside[1][None, :, None, :]
        near, there = near.flatten(2, 3).flatten(0, 1), there.flatten(2, 3).flatten(0, 1).unsqueeze(1)
        # A query that fills a block up at the end sees what it likes: nobody reads it, and it must see something.
        seen = near & there
        self.register_buffer("seen", seen | ~seen.any(-1, keepdim=True), persistent=False)

    def _surroundings(self, t_BHWC: Tensor) -> Tensor:
        """(B, blocks, keys, C)."""
        (down, right), (above, left), (H, W) = self._block, self._reach, t_BHWC.shape[1:3]
        padded = F.pad(t_BHWC, (0, 0, left, left + -W % right, above, above + -H % down))
        parts = padded.unfold(1, down + 2 * above, down).unfold(2, right + 2 * left, right)
        return parts.flatten(-2).flatten(1, 2).transpose(-1, -2)

    def _pooled(self, t: Tensor) -> Tensor:
        """(B, cells, C)."""
        cell = (self.reduction,) * (t.dim() - 2)
        full = F.pad(t, [0, 0, *(n for extent in reversed(t.shape[1:-1]) for n in (0, -extent % self.reduction))])
        parts = tiles(as_grid(full), (1, *cell)[-2:])
        return (parts * self.pool.flatten().unsqueeze(-1).to(t.dtype)).sum(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if tuple(x.shape[1:-1]) != self._size:
            self._set(tuple(x.shape[1:-1]))
        grid = as_grid(x)
        (H, W), (down, right) = grid.shape[1:3], self._block
        q = tiles(F.pad(self.query(grid), (0, 0, 0, -W % right, 0, -H % down)), self._block)
        key, value, seen = self.key(x), self.value(x), self.seen
        k, v = self._surroundings(as_grid(key)), self._surroundings(as_grid(value))
        if self.reduction > 1:
            k, v = (
                torch.cat([t, self._pooled(whole).unsqueeze(1).expand(-1, t.shape[1], -1, -1)], dim=2)
                for t, whole in ((k, key), (v, value))
            )
            seen = F.pad(seen, (0, k.shape[2] - seen.shape[-1]), value=True)
        # Blocks beside heads: each block has a mask of its own.
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(2, 3).flatten(1, 2) for t in (q, k, v))
        mask = seen.unsqueeze(1).expand(-1, self.heads, -1, -1).flatten(0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.out(y.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(3))
        full = (H + -H % down, W + -W % right)
        return untiled(y, self._block, full)[:, :H, :W].reshape(x.shape).contiguous()
