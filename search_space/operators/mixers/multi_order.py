"""Two windows side by side: what is near, and what is a little farther, each weighed by its channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.gates.squeeze_excitation import SqueezeExcitation
from mixnas.search_space.operators.layers import Linear, normed, window_conv
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, register


class _Window(nn.Module):
    """A window of 3 taps along each axis without bias."""

    def __init__(self, context: Context, form: str, dilation: int) -> None:
        super().__init__()
        self.dilation, self.dense = dilation, form == "dense"
        inputs = context.width if self.dense else 1
        self.weight = nn.Parameter(torch.empty(context.width, inputs, *(3,) * len(context.size)))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return window_conv(x, self.weight, dilation=self.dilation, groups=1 if self.dense else x.shape[-1])


def _itself(x: Tensor) -> Tensor:
    return x


# Means and batch norms are over all positions, which in a causal network would show the future.
@register(
    "mixer",
    "multi_order",
    kinds=("image", "sequence"),
    paper="Pay et al. 2025, SpaRTAN (arXiv 2507.10999), SMixer",
    knobs={
        "form": Knob("depthwise", choices=("depthwise", "dense"), doc="of the windows; dense in the first stages"),
        "dilation": Knob(2, choices=(1, 2, 3), doc="of the two windows that see farther"),
    },
)
class MultiOrder(nn.Module):
    """out([se(gelu(norm(near(u)))) | se(gelu(norm(far2(far1(u)))))]), u = v + gamma (v - mean(v)), v = narrow(x).

    Half the width inside; windows of 3 taps without bias, batch norms, squeeze-and-excitation to a quarter. Policies
    take the projections, not the windows.
    """

    def __init__(self, context: Context, *, form: str, dilation: int) -> None:
        super().__init__()
        inside = Context(max(1, context.width // 2), context.size, context.kind)
        self.narrow = Linear(context.width, inside.width)
        self.gamma = nn.Parameter(torch.full((inside.width,), 1e-5))
        # Named by their form: a depthwise tap is no part of a dense one.
        self.windows = nn.ModuleDict(
            {
                f"{form}_{name}": _Window(inside, form, 1 if name == "near" else dilation)
                for name in ("near", "far1", "far2")
            }
        )
        self.near_norm, self.far_norm = BatchNorm(inside), BatchNorm(inside)
        self.near_gate, self.far_gate = (SqueezeExcitation(inside, reduction=4) for _ in range(2))
        self.out = Linear(2 * inside.width, context.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        v = self.narrow(x)
        u = v + self.gamma.to(v.dtype) * (v - v.mean(dim=tuple(range(1, v.dim() - 1)), keepdim=True))
        near_window, first, second = self.windows.values()
        near = self.near_gate(F.gelu(normed(self.near_norm, near_window(u))), _itself)
        far = self.far_gate(F.gelu(normed(self.far_norm, second(first(u)))), _itself)
        y: Tensor = self.out(torch.cat([near, far], dim=-1))
        return y
