"""Attention inside windows: tiles that may be shifted, and tiles that see a border around them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.registry import Context, Knob, register

_HEADS = Knob(4, low=1, high=64, doc="heads; divides the width")


def as_grid(x: Tensor) -> Tensor:
    """(B, H, W, C): a sequence as an image of one row."""
    return x if x.dim() == 4 else x.unsqueeze(1)


def tiles(x_BHWC: Tensor, extents: tuple[int, ...]) -> Tensor:
    """(B, tiles, tokens of a tile, C) of a grid that tiles divide."""
    (B, _, _, C), (down, right) = x_BHWC.shape, extents
    x = x_BHWC.unflatten(2, (-1, right)).unflatten(1, (-1, down))
    return x.transpose(2, 3).reshape(B, -1, down * right, C)


def untiled(y: Tensor, extents: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """`tiles` back to (B, *size, C), without what was added at the ends."""
    (B, _, _, C), (down, right) = y.shape, extents
    rows, columns = -(-size[0] // down), -(-size[1] // right)
    y = y.view(B, rows, columns, down, right, C).transpose(2, 3).reshape(B, rows * down, columns * right, C)
    return y[:, : size[0], : size[1]]


@register(
    "mixer",
    "window_attention",
    paper="Liu et al. 2021, Swin Transformer (arXiv 2103.14030), section 3.2; Hatamizadeh et al. 2023, GC ViT "
    "(arXiv 2206.09959), local attention",
    knobs={
        "heads": _HEADS,
        "window": Knob(7, low=1, high=64, doc="extent of a tile; where the grid is smaller, all of it"),
        "shift": Knob(False, doc="whether the tiles are moved by half a tile"),
    },
    check=_heads_divide,
)
class WindowAttention(nn.Module):
    """Multi-head softmax attention inside tiles, with a learned bias for each head and distance.

    Shifted tiles: what a tile gets from the grid's other end is not attended to. A grid that tiles do not divide is
    filled at its ends with tokens that nobody attends to. Causal tasks see the token and those before it in the tile.
    """

    slicing: ClassVar = {"bias": ("lead", "center", "center")}

    seen: Tensor

    def __init__(self, context: Context, *, heads: int, window: int, shift: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.causal = context.kind == "causal"
        self.query, self.key, self.value, self.out = (Linear(context.width, context.width) for _ in range(4))
        extents = self._extents((1, *context.size)[-2:])
        self.bias = nn.Parameter(torch.empty(heads, 2 * extents[0] - 1, 2 * extents[1] - 1))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self._set(context.size)

    def _extents(self, size: tuple[int, ...]) -> tuple[int, int]:
        return min(self.window, size[0]), min(self.window, size[1])

    def _set(self, size: tuple[int, ...]) -> None:
        self._size, grid = size, (1, *size)[-2:]
        # A table made for a smaller grid knows no farther distances.
        known = ((extent + 1) // 2 for extent in self.bias.shape[1:])
        self._tile = tuple(min(t, k) for t, k in zip(self._extents(grid), known, strict=True))
        self._offset = tuple(t // 2 if self.shift and t < n else 0 for t, n in zip(self._tile, grid, strict=True))
        self._padding = tuple(-n % t for t, n in zip(self._tile, grid, strict=True))
        regions = self._regions(grid).to(self.bias.device)
        cut = tiles(regions[None, :, :, None], self._tile)[0, :, :, 0]
        seen = cut.unsqueeze(-1) == cut.unsqueeze(-2)
        if self.causal:
            seen = seen.tril()
        self.register_buffer("seen", seen, persistent=False)

    def _regions(self, grid: tuple[int, ...]) -> Tensor:
        """A number for each place of the filled and moved grid: only tokens of the same one attend to each other."""
        numbers = []
        for extent, padding, offset in zip(grid, self._padding, self._offset, strict=True):
            place = torch.arange(extent + padding).roll(-offset)
            number = (place >= extent).long()
            if offset:
                number = number + 2 * (torch.arange(extent + padding) >= extent + padding - offset).long()
            numbers.append(number)
        return 4 * numbers[0][:, None] + numbers[1][None, :]

    def _biases(self) -> Tensor:
        """(heads, tokens, tokens) of a tile: a query's are a part of the table that moves against it."""
        table: Tensor = self.bias
        for axis, (extent, tile) in enumerate(zip(table.shape[1:], self._tile, strict=True), 1):
            table = table.narrow(axis, (extent + 1) // 2 - tile, 2 * tile - 1)
        parts = table.unfold(1, self._tile[0], 1).unfold(2, self._tile[1], 1).flip(1, 2)
        return parts.flatten(3, 4).flatten(1, 2)

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """(1, tiles * heads, tokens, tokens), or with one tile's for all."""
        bias = self._biases().to(dtype)
        if not self.causal and not any(self._offset) and not any(self._padding):
            return bias
        masked = bias.masked_fill(~self.seen.unsqueeze(1), float("-inf"))
        return masked.flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if tuple(x.shape[1:-1]) != self._size:
            self._set(tuple(x.shape[1:-1]))
        grid = as_grid(x)
        size = (grid.shape[1], grid.shape[2])
        if any(self._padding):
            grid = F.pad(grid, (0, 0, 0, self._padding[1], 0, self._padding[0]))
        if any(self._offset):
            grid = grid.roll([-offset for offset in self._offset], (1, 2))
        inside = tiles(grid, self._tile)
        shape = (inside.shape[0], -1, inside.shape[2], self.heads, inside.shape[3] // self.heads)
        q, k, v = (p(inside).view(shape).transpose(2, 3) for p in (self.query, self.key, self.value))
        mask = self._mask(q.dtype)
        # Tiles beside heads where each tile has a mask of its own, beside examples where all have one.
        begin = 0 if mask.shape[0] == self.heads else 1
        q, k, v = (t.flatten(begin, begin + 1) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.unflatten(begin, (-1, inside.shape[1]) if begin == 0 else (inside.shape[1], -1)).transpose(2, 3)
        full = (size[0] + self._padding[0], size[1] + self._padding[1])
        grid = untiled(self.out(y.flatten(3)), self._tile, full)
        if any(self._offset):
            grid = grid.roll(self._offset, (1, 2))
        return grid[:, : size[0], : size[1]].reshape(x.shape).contiguous()


# The border is on both sides.
@register(
    "mixer",
    "halo_attention",
    kinds=("image", "sequence"),
    paper="Vaswani et al. 2021, Scaling Local Self-Attention for Parameter Efficient Visual Backbones (HaloNet, "
    "arXiv 2103.12731), section 3",
    knobs={
        "heads": _HEADS,
        "block": Knob(8, low=1, high=64, doc="extent of a block of queries; where the grid is smaller, all of it"),
        "halo": Knob(3, low=1, high=16, doc="width of the border that it sees as well"),
    },
    check=_heads_divide,
)
class HaloAttention(nn.Module):
    """Attention of blocks of queries to their block and a border; logits q (k d^-1/2 + r_distance), without biases.

    A learned vector r for each distance along each axis, shared by the heads. Keys outside the grid are zeros that take
    part in the softmax, as in the paper. There is no projection behind it.
    """

    slicing: ClassVar = {"rows": ("center", "lead"), "columns": ("center", "lead")}

    def __init__(self, context: Context, *, heads: int, block: int, halo: int) -> None:
        super().__init__()
        self.heads, self.block, self.halo = heads, block, halo
        self.query, self.key, self.value = (Linear(context.width, context.width, bias=False) for _ in range(3))
        down, right = self._blocks((1, *context.size)[-2:])
        part = context.width // heads
        if len(context.size) == 2:
            self.rows = nn.Parameter(part**-0.5 * torch.randn(2 * (down + 2 * halo) - 1, part))
        self.columns = nn.Parameter(part**-0.5 * torch.randn(2 * (right + 2 * halo) - 1, part))

    def _blocks(self, size: tuple[int, ...]) -> tuple[int, int]:
        return min(self.block, size[0]), min(self.block, size[1])

    def _logits(self, q: Tensor, table: Tensor, block: int) -> Tensor:
        """q (..., block, d) against the vectors of an axis: (..., block, keys along it)."""
        keys = block + 2 * self.halo
        every = q @ table.to(q.dtype).T
        middle = (table.shape[0] - 1) // 2
        entries = torch.arange(keys, device=q.device)[None, :] - torch.arange(block, device=q.device)[:, None] + middle
        return every.gather(-1, entries.expand(*every.shape[:-1], keys))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        grid = as_grid(x)
        B, H, W = grid.shape[:3]
        (down, right), halo = self._blocks((H, W)), self.halo
        above = halo if x.dim() == 4 else 0
        bottom, end = -H % down, -W % right
        q = tiles(F.pad(self.query(grid), (0, 0, 0, end, 0, bottom)), (down, right))
        q = q.unflatten(-1, (self.heads, -1)).transpose(2, 3)  # (B, blocks, heads, tokens, d)
        k, v = (
            F.pad(p(grid), (0, 0, halo, halo + end, above, above + bottom))
            .unfold(1, down + 2 * above, down)
            .unfold(2, right + 2 * halo, right)
            .flatten(1, 2)
            .unflatten(2, (self.heads, -1))
            .flatten(-2)
            .transpose(-1, -2)
            for p in (self.key, self.value)
        )
        placed = q.unflatten(-2, (down, right))
        bias = self._logits(placed, self.columns, right).unsqueeze(-2)  # (..., down, right, 1, keys)
        if x.dim() == 4:
            by_row = self._logits(placed.transpose(-2, -3), self.rows, down).transpose(-2, -3)
            bias = bias + by_row.unsqueeze(-1)
        bias = bias.flatten(-2).flatten(-3, -2)
        q, k, v, bias = (t.flatten(0, 1) for t in (q, k, v, bias))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.unflatten(0, (B, -1)).transpose(2, 3).flatten(-2)
        return untiled(y, (down, right), (H, W)).reshape(x.shape).contiguous()
