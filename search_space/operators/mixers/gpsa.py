"""Gated positional self-attention: each head chooses between content and place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.operators.mixers.attention import _heads_divide
from mixnas.search_space.registry import Context, Knob, register


# The positional weights are over all tokens.
@register(
    "mixer",
    "gpsa",
    kinds=("image", "sequence"),
    paper="d'Ascoli et al. 2021, ConViT (arXiv 2103.10697), section 3",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width"),
        "locality": Knob(1.0, low=0.0, high=4.0, doc="how sharply a head looks at one place at first"),
    },
    check=_heads_divide,
)
class GPSA(nn.Module):
    """out((1 - s_h) softmax(q k d^-1/2) v + s_h softmax(place . (dx, dy, dx^2 + dy^2) + b) v), s_h = sigmoid(gate_h).

    Rows of the sum are divided by their sum. At first the gates are 1, the values the input, and, where the number of
    heads is a square, the heads look at the places of a square window. On sequences the places are (d, d^2). The
    projection of places is not one that policies take.
    """

    places: Tensor

    def __init__(self, context: Context, *, heads: int, locality: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (Linear(context.width, context.width, bias=False) for _ in range(3))
        self.out = Linear(context.width, context.width)
        nn.init.eye_(self.value.weight)
        self.gate = nn.Parameter(torch.ones(heads))
        axes = len(context.size)
        self.place, self.bias = nn.Parameter(torch.zeros(heads, axes + 1)), nn.Parameter(torch.zeros(heads))
        side = math.isqrt(heads) if axes == 2 else heads
        if side**axes == heads:
            middle = (side - 1) / 2
            across = torch.arange(heads) % side - middle  # of the window's place that a head looks at
            down = torch.arange(heads) // side - middle
            terms = [down, across] if axes == 2 else [across]
            with torch.no_grad():
                self.place.copy_(locality * torch.stack([*(2.0 * t for t in terms), -torch.ones(heads)], dim=1))
        self._set(context.size)

    def _set(self, size: tuple[int, ...]) -> None:
        self._size = size
        along = [torch.arange(extent, device=self.gate.device) for extent in size]
        coordinates = torch.stack(torch.meshgrid(*along, indexing="ij")).flatten(1).float()
        apart = (coordinates[:, None, :] - coordinates[:, :, None]).flip(0)  # keys minus queries, the width first
        self.register_buffer("places", torch.cat([apart, apart.square().sum(0, keepdim=True)]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if tuple(x.shape[1:-1]) != self._size:
            self._set(tuple(x.shape[1:-1]))
        tokens = x.flatten(1, -2)
        q, k, v = (
            p(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        content = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        # Not a matrix product: what depends on no example is not among an example's multiply-accumulates.
        logits = self.bias.view(-1, 1, 1)
        for weight, place in zip(self.place.T, self.places, strict=True):
            logits = logits + weight.view(-1, 1, 1) * place
        share = self.gate.sigmoid().view(-1, 1, 1)
        weights = ((1 - share) * content + share * logits.softmax(dim=-1)).to(v.dtype)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(-2))
        return out.view(x.shape)
