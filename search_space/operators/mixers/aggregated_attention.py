"""Attention to the tokens beside each and to a pooled grid at once, in one softmax."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, normed
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.operators.mixers.window_attention import as_grid
from mixnas.search_space.registry import Context, Knob, register

_HIDDEN = 512  # channels inside the two layers that make a bias of a distance
_SHARPNESS = 0.24  # 1 over what cosines are multiplied by at first


def _distances(queries: int, keys: int) -> tuple[list[int], list[list[int]]]:
    """Along an axis: twice the distances from the middles of pooled keys, each once, and which one each pair has."""
    starts = [i * queries // keys for i in range(keys)]
    ends = [-(-(i + 1) * queries // keys) for i in range(keys)]
    apart = [[2 * q - (start + end - 1) for start, end in zip(starts, ends, strict=True)] for q in range(queries)]
    known = sorted({d for row in apart for d in row})
    place = {d: i for i, d in enumerate(known)}
    return known, [[place[d] for d in row] for row in apart]


# The pooled keys are means over later tokens too.
@register(
    "mixer",
    "aggregated_attention",
    kinds=("image", "sequence"),
    paper="Shi 2024, TransNeXt (arXiv 2311.17132), section 3.2",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width"),
        "window": Knob(
            3, choices=(3, 5, 7), doc="extent of the window around a token; without reduction there is none"
        ),
        "reduction": Knob(
            4, choices=(1, 2, 4, 8), doc="extent of a pooled cell; 1: all tokens are keys, the last stage"
        ),
    },
    check=_heads_divide,
)
class AggregatedAttention(nn.Module):
    """out(sum over the window of (a + q T + t) v + sum over the pooled grid of a v), a one softmax over both.

    Logits are cosines of (q / |q| + e) softplus(temperature) ln(number of keys) and k / |k|, with a learned bias for
    each place in the window, and for pooled keys one that two layers make of the distance, in logarithms. Pooled tokens
    are norm(pool(gelu(mix(x)))), and share the projections to keys and values with the others. The learned tokens T and
    t are added behind the softmax. Places outside the grid are not attended to.
    """

    slicing: ClassVar = {"bias": ("lead", "center", "center"), "token_bias": ("lead", "center", "center")}

    counts: Tensor
    valid: Tensor

    def __init__(self, context: Context, *, heads: int, window: int, reduction: int) -> None:
        super().__init__()
        width, dims = context.width, len(context.size)
        self.heads, self.window, self.reduction = heads, window, reduction
        self.query, self.key, self.value, self.out = (Linear(width, width) for _ in range(4))
        self.embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, width // heads), std=0.02))
        # The inverse of softplus.
        self.temperature = nn.Parameter(torch.full((heads,), 1 / _SHARPNESS).expm1().log())
        # Of distances, not of what the network reads: no policy takes their place.
        self.distance_in, self.distance_out = nn.Linear(dims, _HIDDEN), nn.Linear(_HIDDEN, heads)
        if reduction > 1:
            taps = (window,) * dims if dims == 2 else (1, window)
            self.mix, self.norm = Linear(width, width), nn.LayerNorm(width)
            self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, *taps), std=0.0004))
            self.tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, width // heads, *taps), std=0.02))
            self.token_bias = nn.Parameter(torch.zeros(heads, *taps))
        self._set(context.size)

    def _set(self, size: tuple[int, ...]) -> None:
        self._size, device = size, self.temperature.device
        self._pooled = tuple(max(1, n // self.reduction) for n in size)
        for axis, (n, p) in enumerate(zip(size, self._pooled, strict=True)):
            known, places = _distances(n, p)
            self.register_buffer(f"apart{axis}", torch.tensor(known, device=device), persistent=False)
            self.register_buffer(f"places{axis}", torch.tensor(places, device=device), persistent=False)
        if self.reduction == 1:
            return
        reach, valid = self.window // 2, torch.ones(1, 1, dtype=torch.bool, device=device)
        for n in size:
            place = torch.arange(n, device=device)[:, None] + torch.arange(-reach, reach + 1, device=device)
            inside = (place >= 0) & (place < n)
            valid = (valid[:, None, :, None] & inside[None, :, None, :]).flatten(2).flatten(0, 1)
        self.register_buffer("valid", valid, persistent=False)  # (tokens, taps)
        self.register_buffer("counts", valid.sum(-1, keepdim=True), persistent=False)

    def _split(self, x_BNC: Tensor) -> Tensor:
        """(B, heads, N, d)."""
        return x_BNC.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _table(self, distances: Tensor) -> Tensor:
        """(..., axes) distances to (..., heads) biases.

        Elementwise and not by matrix products: made of parameters alone, it is no example's work. Head by head, as the
        products of all heads at once would take the heads' number times the memory.
        """
        inner, outer = self.distance_in, self.distance_out
        hidden: Tensor = inner.bias
        for axis, weight in zip(distances.unbind(-1), inner.weight.unbind(1), strict=True):
            hidden = hidden + axis.unsqueeze(-1) * weight
        hidden = hidden.relu()
        heads = [(hidden * weight).sum(-1) for weight in outer.weight.unbind(0)]
        return torch.stack(heads, dim=-1) + outer.bias

    def _distance_bias(self) -> Tensor:
        """(heads, tokens, pooled tokens)."""
        weight = self.distance_in.weight
        axes = []
        for axis, n in enumerate(self._size):
            t = self.get_buffer(f"apart{axis}").to(weight.dtype) * (4 / max(1, n - 1))
            axes.append(t.sign() * (t.abs() + 1).log2() / 3)
        if len(axes) == 1:
            table = self._table(axes[0].unsqueeze(-1))
            return table[self.get_buffer("places0")].movedim(-1, 0)
        down, right = axes
        pairs = torch.stack([down[:, None].expand(-1, len(right)), right.expand(len(down), -1)], dim=-1)
        table = self._table(pairs)
        rows, columns = self.get_buffer("places0"), self.get_buffer("places1")
        every = table[rows[:, None, :, None], columns[None, :, None, :]]
        return every.flatten(2, 3).flatten(0, 1).movedim(-1, 0)

    def _around(self, t_BNC: Tensor) -> Tensor:
        """(B, N, heads, d, taps): what stands in the window of each token, zeros outside the grid."""
        reach, size = self.window // 2, (1, *self._size)[-2:]
        grid = t_BNC.unflatten(1, size)
        if len(self._size) == 2:
            parts = F.pad(grid, (0, 0, reach, reach, reach, reach)).unfold(1, self.window, 1)
            parts = parts.unfold(2, self.window, 1).flatten(-2)
        else:
            parts = F.pad(grid, (0, 0, reach, reach)).unfold(2, self.window, 1)
        return parts.flatten(1, 2).unflatten(2, (self.heads, -1))

    def _pool(self, x: Tensor) -> Tensor:
        """(B, pooled tokens, C)."""
        mixed = as_grid(F.gelu(self.mix(x))).permute(0, 3, 1, 2)
        rows, columns = (1, *self._pooled)[-2:]
        pooled = F.adaptive_avg_pool2d(mixed, (rows, columns))
        return normed(self.norm, pooled.flatten(2).transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if tuple(x.shape[1:-1]) != self._size:
            self._set(tuple(x.shape[1:-1]))
        tokens = x.flatten(1, -2)
        q = F.normalize(self._split(self.query(tokens)), dim=-1)
        k = F.normalize(self._split(self.key(tokens)), dim=-1)
        v = self.value(tokens)
        bias = self._distance_bias().to(q.dtype)
        counted = self.counts + bias.shape[-1] if self.reduction > 1 else torch.tensor(bias.shape[-1], device=x.device)
        scale = F.softplus(self.temperature).view(-1, 1, 1) * counted.to(self.temperature.dtype).log()
        scaled = (q + self.embedding.unsqueeze(1).to(q.dtype)) * scale.to(q.dtype)
        if self.reduction == 1:
            y = (scaled @ k.transpose(-1, -2) + bias).softmax(dim=-1) @ self._split(v)
            out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
            return out.view(x.shape)
        pooled = self._pool(x)
        pooled_k, pooled_v = F.normalize(self._split(self.key(pooled)), dim=-1), self._split(self.value(pooled))
        beside = self._around(k.transpose(1, 2).flatten(-2))
        near = (scaled.transpose(1, 2).unsqueeze(-2) @ beside).squeeze(-2).transpose(1, 2)
        near = (near + self.bias.flatten(1).unsqueeze(1).to(q.dtype)).masked_fill(~self.valid, float("-inf"))
        far = scaled @ pooled_k.transpose(-1, -2) + bias
        taps = near.shape[-1]
        near, far = torch.cat([near, far], dim=-1).softmax(dim=-1).split([taps, far.shape[-1]], dim=-1)
        near = near + q @ self.tokens.flatten(2).to(q.dtype) + self.token_bias.flatten(1).unsqueeze(1).to(q.dtype)
        y = (near.transpose(1, 2).unsqueeze(-2) @ self._around(v).transpose(-1, -2)).squeeze(-2)
        y = y + (far @ pooled_v).transpose(1, 2)
        out = self.out(y.flatten(-2))
        return out.view(x.shape)
