"""Gated linear attention: causal for sequences, both directions with 2-D locality for images."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.gated_linear_attention import gated_linear_attention
from mixnas.search_space.operators.layers import DepthwiseConv, Linear, normed
from mixnas.search_space.registry import Context, Knob, Value, register

_NORMALISER = 16.0  # of the logarithm of a decay, so that states forget slowly at first


def _fits(context: Context, knobs: Mapping[str, Value]) -> str | None:
    heads, keys = int(knobs["heads"]), context.width * float(knobs["expand_k"])
    if context.width % heads or keys % heads:
        return f"{heads} heads do not divide width {context.width} and its {keys:g} key channels"
    return None


@register(
    "mixer",
    "gla",
    paper="Yang et al. 2023, Gated Linear Attention (arXiv 2312.06635), section 4; Liao et al. 2024, ViG "
    "(arXiv 2405.18425), section 3",
    knobs={
        "heads": Knob(4, low=1, high=64, doc="heads; divides the width and the key channels"),
        "expand_k": Knob(0.5, choices=(0.25, 0.5, 1.0), doc="key channels over width"),
        "gate_rank": Knob(16, choices=(8, 16, 32), doc="rank of the projection to the decays"),
    },
    check=_fits,
)
class GatedLinearAttention(nn.Module):
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t, decays alpha from the data, per key channel.

    Causal tasks: out(norm(o) * silu(gate(x))), as in the paper. Others, as in ViG-S: s is a 3 x 3 depthwise convolution
    of x (3 taps on sequences), everything is projected from s, o is the mean of a pass in each direction over the
    tokens in raster order, and with g = sigmoid(gate(s)) the output is out(g norm(o) + (1 - g) norm'(s)).
    """

    def __init__(self, context: Context, *, heads: int, expand_k: float, gate_rank: int) -> None:
        super().__init__()
        width, keys = context.width, int(context.width * expand_k)
        self.heads = heads
        self.causal = context.kind == "causal"
        self.query, self.key = (Linear(width, keys, bias=False) for _ in range(2))
        self.value, self.out = (Linear(width, width, bias=False) for _ in range(2))
        self.decay_low = Linear(width, gate_rank, bias=False)
        self.decay = Linear(gate_rank, keys)
        self.gate = Linear(width, width, bias=not self.causal)
        self.norm = nn.RMSNorm(width // heads, eps=1e-5)
        if not self.causal:
            self.local = DepthwiseConv(context, 3, bias=False)
            self.reverse_decay = Linear(gate_rank, keys)
            self.local_norm = nn.RMSNorm(width // heads, eps=1e-5)
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _decay(self, low: Tensor, projection: nn.Module) -> Tensor:
        return self._split(F.logsigmoid(projection(low)) / _NORMALISER)

    def _split(self, x_BLC: Tensor) -> Tensor:
        return x_BLC.unflatten(-1, (self.heads, -1))

    def _normed(self, norm: nn.RMSNorm, x_BLHD: Tensor) -> Tensor:
        return normed(norm, x_BLHD).flatten(-2)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, ..., C) to the same; `valid` (B, L, 1): which tokens are written into the states."""
        s = (x if self.causal else self.local(x if valid is None else x * valid)).flatten(1, -2)
        if valid is not None:
            s = s * valid
        q, k, v = (self._split(projection(s)) for projection in (self.query, self.key, self.value))
        low = self.decay_low(s)
        decay = self._decay(low, self.decay)
        reverse = None if self.causal else self._decay(low, self.reverse_decay)
        o = self._normed(self.norm, gated_linear_attention(q, k, v, decay, reverse))
        if self.causal:
            y = o * F.silu(self.gate(s))
        else:
            local = self._normed(self.local_norm, self._split(s))
            y = local + self.gate(s).sigmoid() * (o - local)
        out: Tensor = self.out(y)
        return out.view(x.shape)
