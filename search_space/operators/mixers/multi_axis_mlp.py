"""Gated layers over tokens along two axes: inside blocks, and across the cells of a grid."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, normed
from mixnas.search_space.operators.mixers.window_attention import as_grid
from mixnas.search_space.registry import Context, Knob, register

_AXES = ("both", "grid", "block")


def _gelu(x: Tensor) -> Tensor:
    """By a hyperbolic tangent, as the authors' framework has it."""
    return F.gelu(x, approximate="tanh")


class _GatedMLP(nn.Module):
    """x + out(gelu(keep(n)) (mix(norm(gelu(gate(n)))) + 1)), n = norm(x), mix a layer over `tokens` places."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm, self.gate_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.keep, self.gate, self.out = (Linear(width, width) for _ in range(3))
        self.mix = Linear(tokens, tokens)
        nn.init.normal_(self.mix.weight, std=0.02)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: Tensor, dim: int) -> Tensor:
        """(..., C), mixed along `dim`."""
        n = normed(self.norm, x)
        v = normed(self.gate_norm, _gelu(self.gate(n)))
        v = self.mix(v.transpose(dim, -1)).transpose(dim, -1)
        y: Tensor = x + self.out(_gelu(self.keep(n)) * (v + 1))
        return y


# Each token sees all of its block and of its place in the grid, later ones too.
@register(
    "mixer",
    "multi_axis_mlp",
    kinds=("image", "sequence"),
    paper="Tu et al. 2022, MAXIM (arXiv 2201.02973), section 3.2, multi-axis gated MLP",
    knobs={
        "block": Knob(8, low=1, high=32, doc="extent of a block; where the grid is smaller, all of it"),
        "grid": Knob(8, low=1, high=32, doc="cells along an axis; where the grid is smaller, one for each token"),
        "axes": Knob("both", choices=_AXES, doc="which: across the grid's cells, inside blocks, or both side by side"),
    },
)
class MultiAxisMLP(nn.Module):
    """out_g(G(gelu(to_g(x)))) + out_b(B(gelu(to_b(x)))): G mixes places of equal position in all cells, B each block.

    Both are residual gated layers (gMLP) with learned weights for each pair of places, which hold for any image. A grid
    that cells or blocks do not divide is filled with zeros at its ends, which take part.
    """

    def __init__(self, context: Context, *, block: int, grid: int, axes: str) -> None:
        super().__init__()
        width = context.width
        self.block = tuple(min(block, n) for n in context.size)
        self.grid = tuple(min(grid, n) for n in context.size)
        self.axes = axes
        if axes != "block":
            self.to_grid, self.across = Linear(width, width), _GatedMLP(width, math.prod(self.grid))
            self.from_grid = Linear(width, width)
        if axes != "grid":
            self.to_block, self.inside = Linear(width, width), _GatedMLP(width, math.prod(self.block))
            # One bias is enough for the sum.
            self.from_block = Linear(width, width, bias=axes == "block")

    def _across(self, u_BHWC: Tensor) -> Tensor:
        """The grid has a fixed number of cells: (B, cells, places of a cell, C) is mixed along its cells."""
        cells = (1, *self.grid)[-2:]
        size = u_BHWC.shape[1:3]
        u = self._filled(u_BHWC, cells)
        u = u.unflatten(2, (cells[1], -1)).unflatten(1, (cells[0], -1)).transpose(2, 3)
        places = u.shape[3:5]
        u = self.across(u.flatten(3, 4).flatten(1, 2), 1)
        return self._joined(u.unflatten(2, places).unflatten(1, cells), size)

    def _inside(self, v_BHWC: Tensor) -> Tensor:
        """Blocks have a fixed extent: (B, blocks, places of a block, C) is mixed along its places."""
        block = (1, *self.block)[-2:]
        size = v_BHWC.shape[1:3]
        v = self._filled(v_BHWC, block)
        v = v.unflatten(2, (-1, block[1])).unflatten(1, (-1, block[0])).transpose(2, 3)
        blocks = v.shape[1:3]
        v = self.inside(v.flatten(3, 4).flatten(1, 2), 2)
        return self._joined(v.unflatten(2, block).unflatten(1, blocks), size)

    def _filled(self, x_BHWC: Tensor, extents: tuple[int, ...]) -> Tensor:
        down, right = (-n % e for n, e in zip(x_BHWC.shape[1:3], extents, strict=True))
        return F.pad(x_BHWC, (0, 0, 0, right, 0, down)) if down or right else x_BHWC

    def _joined(self, y: Tensor, size: tuple[int, ...]) -> Tensor:
        """(B, rows, columns, down, right, C) to (B, *size, C)."""
        return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        y: Tensor | None = None
        if self.axes != "block":
            y = self.from_grid(self._across(as_grid(_gelu(self.to_grid(x)))))
        if self.axes != "grid":
            z = self.from_block(self._inside(as_grid(_gelu(self.to_block(x)))))
            y = z if y is None else y + z
        assert y is not None
        return y.reshape(x.shape).contiguous()
