"""Linear attention whose keys and values have a learned gate for each place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv
from mixnas.search_space.operators.mixers.linear_attention_2d import _HEADS, _Heads, _heads_divide
from mixnas.search_space.registry import Context, Knob, register


# Sums are over all tokens, later ones too.
@register(
    "mixer",
    "kv_gated_linear",
    kinds=("image", "sequence"),
    paper="Wang et al. 2026, LINA (arXiv 2601.22630), KV gate, division-based normalisation and locality",
    knobs={
        "heads": _HEADS,
        "gates": Knob("heads", choices=("heads", "shared", "none"), doc="a gate for each place and head, or place"),
        "form": Knob("division", choices=("division", "subtraction"), doc="how an answer is normalised"),
        "kernel_size": Knob(5, choices=(0, 3, 5), doc="extent of the window over the input; 0: none"),
    },
    check=_heads_divide,
)
class KVGatedLinear(_Heads):
    """out(q (sum k v^T / N) / (q . mean k + 1e-6) + depthwise(x)), q = relu(query(x)) + 1e-6, k and v with gates.

    k = (relu(key(x)) + 1e-6) g and v = value(x) g', gates learned for each place, 1 at first. By subtraction:
    s q (sum k v^T / N) + (1 - s q . mean k) mean v, s = d^-1/2. The gates are for one grid: on another they are not
    defined. Without the authors' rotary positions.
    """

    def __init__(self, context: Context, *, heads: int, gates: str, form: str, kernel_size: int) -> None:
        super().__init__(context, heads)
        self.form = form
        rows = {"heads": heads, "shared": 1, "none": 0}[gates]
        self.key_gate = nn.Parameter(torch.ones(rows, context.tokens)) if rows else None
        self.value_gate = nn.Parameter(torch.ones(rows, context.tokens)) if rows else None
        self.window = DepthwiseConv(context, kernel_size) if kernel_size else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        tokens = x.flatten(1, -2)
        q, k = (self._split(p(tokens)).relu() + 1e-6 for p in (self.query, self.key))
        v = self._split(self.value(tokens))
        if self.key_gate is not None and self.value_gate is not None:
            k = k * self.key_gate.unsqueeze(-1).to(k.dtype)
            v = v * self.value_gate.unsqueeze(-1).to(v.dtype)
        mean = k.mean(dim=-2).unsqueeze(-1)  # (B, heads, d, 1)
        state = (k.transpose(-1, -2) @ v) / k.shape[-2]
        if self.form == "division":
            y = (q @ state) / (q @ mean + 1e-6)
        else:
            q = q * float(q.shape[-1]) ** -0.5
            y = q @ state + (1 - q @ mean) * v.mean(dim=-2, keepdim=True)
        y = y.transpose(1, 2).flatten(-2)
        if self.window is not None:
            y = y + self.window(x).flatten(1, -2).to(y.dtype)
        out: Tensor = self.out(y)
        return out.view(x.shape)
