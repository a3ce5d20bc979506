"""Super tokens: tokens are gathered to a coarse grid by soft assignment, attend there, and are given back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.operators.mixers.window_attention import as_grid, tiles, untiled
from mixnas.search_space.registry import Context, Knob, register


# A super token is a mean over later tokens too.
@register(
    "mixer",
    "super_token_attention",
    kinds=("image", "sequence"),
    paper="Huang et al. 2023, Vision Transformer with Super Token Sampling (STViT, arXiv 2211.11167), section 3.2",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width"),
        "cell": Knob(4, choices=(2, 4, 8), doc="extent of a super token's cell; where the grid is smaller, all of it"),
        "rounds": Knob(1, choices=(1, 2, 3), doc="how often tokens are assigned anew"),
    },
    check=_heads_divide,
)
class SuperTokenAttention(nn.Module):
    """y_i = sum over the nine cells j around i of a_ij S'_j: S' = attention(S), S_j = sum_i a_ij x_i / sum_i a_ij.

    a_ij = softmax over j of (x_i . S0_j) C^-1/2, S0 the means of the cells. Cells outside the grid are zeros that take
    part in the softmax, as in the authors' code; so are tokens that fill cells up at the ends. Gradients go through the
    assignment here, there they do not.
    """

    def __init__(self, context: Context, *, heads: int, cell: int, rounds: int) -> None:
        super().__init__()
        self.heads, self.cell, self.rounds = heads, cell, rounds
        self.query, self.key, self.value, self.out = (Linear(context.width, context.width) for _ in range(4))

    def _around(self, cells_BHWC: Tensor, image: bool) -> Tensor:
        """(B, cells, C, 9) of the cells beside each and itself, 3 of a sequence; zeros outside."""
        if not image:
            return F.pad(cells_BHWC, (0, 0, 1, 1)).unfold(2, 3, 1).squeeze(1)
        return F.pad(cells_BHWC, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1).flatten(-2).flatten(1, 2)

    def _gathered(self, parts: Tensor, grid: tuple[int, int], image: bool) -> Tensor:
        """What each cell gives to those around it (B, cells, C, 9), summed where it goes: (B, *grid, C)."""
        kernel, padding = ((3, 3), (1, 1)) if image else ((1, 3), (0, 1))
        columns = parts.flatten(2).transpose(1, 2)
        exact = torch.promote_types(columns.dtype, torch.float32)
        return F.fold(columns.to(exact), grid, kernel, padding=padding).movedim(1, -1).to(parts.dtype)

    def _attended(self, cells_BHWC: Tensor) -> Tensor:
        tokens = cells_BHWC.flatten(1, 2)
        q, k, v = (
            p(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return y.view(*cells_BHWC.shape[:3], -1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        image, full = x.dim() == 4, as_grid(x)
        size = (full.shape[1], full.shape[2])
        extents = (min(self.cell, size[0]), min(self.cell, size[1]))
        down, right = (-n % e for n, e in zip(size, extents, strict=True))
        if down or right:
            full = F.pad(full, (0, 0, 0, right, 0, down))
        grid = (full.shape[1] // extents[0], full.shape[2] // extents[1])
        tokens = tiles(full, extents)  # (B, cells, tokens of a cell, C)
        cells = tokens.mean(dim=2).unflatten(1, grid)
        scale = float(x.shape[-1]) ** -0.5
        for _ in range(self.rounds):
            assigned = (tokens @ self._around(cells, image) * scale).softmax(dim=-1)
            sums = self._gathered(tokens.transpose(-1, -2) @ assigned, grid, image)
            counts = self._gathered(assigned.sum(dim=2, keepdim=True), grid, image)
            cells = sums / (counts + 1e-12)
        given = assigned @ self._around(self._attended(cells).to(x.dtype), image).transpose(-1, -2)
        padded = (size[0] + down, size[1] + right)
        return untiled(given, extents, padded)[:, : size[0], : size[1]].reshape(x.shape).contiguous()
