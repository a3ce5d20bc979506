"""Polarized self-attention as a gate: over channels and over positions, each squeezed to half and to one."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.operators.gates.none import Mixer
from mixnas.search_space.operators.layers import Linear, normed
from mixnas.search_space.registry import Context, Knob, register


# Means and weights are over all positions, which in a causal network would show the future.
@register(
    "gate",
    "polarized",
    kinds=("image", "sequence"),
    paper="Liu et al. 2021, Polarized Self-Attention (arXiv 2107.00782), section 3, as the authors' code has it",
    knobs={"form": Knob("parallel", choices=("parallel", "sequential"))},
)
class Polarized(nn.Module):
    """Acts on the output y with a factor for each channel and one for each position.

    Channels: sigmoid(up(sum over positions of softmax(key(y)) value(y))). Positions: with m = mean(position_query(y)),
    sigmoid(softmax(m . position_value(y))) in the parallel form, which adds y times each, and sigmoid(m .
    softmax(position_value(y))) in the sequential one, where the second acts on what the first gives and `up` is a
    squeeze to C / 8 with a norm. All softmaxes are over positions. The paper's own text has the parallel positions
    otherwise; the code is the operator.
    """

    def __init__(self, context: Context, *, form: str) -> None:
        super().__init__()
        width, half = context.width, max(1, context.width // 2)
        self.sequential = form == "sequential"
        self.key = Linear(width, 1, bias=False)
        self.value = Linear(width, half, bias=False)
        self.position_query, self.position_value = (Linear(width, half, bias=False) for _ in range(2))
        if self.sequential:
            hidden = max(1, width // 8)
            self.squeeze, self.excite = Linear(half, hidden), Linear(hidden, width)
            self.norm = nn.LayerNorm(hidden)
        else:
            self.up = Linear(half, width, bias=False)

    def _channels(self, y_BNC: Tensor) -> Tensor:
        """(B, 1, C)."""
        gathered = self.key(y_BNC).softmax(dim=1).transpose(1, 2) @ self.value(y_BNC)
        if not self.sequential:
            return self.up(gathered).sigmoid()
        return self.excite(normed(self.norm, self.squeeze(gathered)).relu()).sigmoid()

    def _positions(self, y_BNC: Tensor) -> Tensor:
        """(B, N, 1)."""
        query = self.position_query(y_BNC).mean(dim=1).unsqueeze(-1)
        value = self.position_value(y_BNC)
        if self.sequential:
            return (value.softmax(dim=1) @ query).sigmoid()
        return (value @ query).softmax(dim=1).sigmoid()

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        mixed = mixer(x)
        y = mixed.flatten(1, -2)
        if self.sequential:
            y = y * self._channels(y)
            y = y * self._positions(y)
        else:
            y = y * (self._channels(y) + self._positions(y))
        return y.view(mixed.shape)
