"""Focal modulation: each token is multiplied by a gated sum of contexts that grow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "focal_modulation",
    paper="Yang et al. 2022, Focal Modulation Networks (arXiv 2203.11926), section 3.2",
    knobs={
        "levels": Knob(2, choices=(1, 2, 3, 4), doc="windows, one on the other; beside them a mean over all tokens"),
        "window": Knob(3, choices=(3, 5, 7, 9), doc="extent of the first window; each further one is 2 larger"),
    },
)
class FocalModulation(nn.Module):
    """out(query(x) * mix(sum over l of gate_l z_l)), z_l = gelu(depthwise(z_{l-1})), z_0 = context(x), with biases.

    The last context is gelu of the mean of all tokens, of those so far in causal tasks. A gate is one number for each
    token and level, linear in x. The windows have no bias.
    """

    def __init__(self, context: Context, *, levels: int, window: int) -> None:
        super().__init__()
        width = context.width
        self.causal = context.kind == "causal"
        self.query, self.context, self.mix, self.out = (Linear(width, width) for _ in range(4))
        self.gates, self.global_gate = Linear(width, levels), Linear(width, 1)
        self.windows = nn.ModuleList(DepthwiseConv(context, window + 2 * level, bias=False) for level in range(levels))

    def _mean(self, z: Tensor) -> Tensor:
        if not self.causal:
            return z.mean(dim=tuple(range(1, z.dim() - 1)), keepdim=True)
        exact = torch.promote_types(z.dtype, torch.float32)
        counted = torch.arange(1, z.shape[1] + 1, device=z.device, dtype=exact).unsqueeze(-1)
        return (z.cumsum(dim=1, dtype=exact) / counted).to(z.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        z, gates = self.context(x), self.gates(x)
        modulator: Tensor | float = 0.0
        for level, window in enumerate(self.windows):
            z = window(z, "gelu")
            modulator = modulator + z * gates[..., level : level + 1]
        modulator = modulator + F.gelu(self._mean(z)) * self.global_gate(x)
        out: Tensor = self.out(self.query(x) * self.mix(modulator))
        return out
