"""Central difference convolution: a window of values, and of differences to the token in its middle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.depthwise_conv1d import depthwise_conv1d
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d
from mixnas.search_space.operators.layers import window_conv
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "central_difference",
    paper="Yu et al. 2020, CDCN (arXiv 2003.04092), section 3.1",
    knobs={
        "kernel_size": Knob(3, choices=(3, 5, 7, 9)),
        "theta": Knob(0.7, low=0.0, high=1.0, doc="share of the differences: 0 is a convolution"),
        "form": Knob("dense", choices=("dense", "depthwise")),
    },
)
class CentralDifference(nn.Module):
    """y(p) = sum over d of w(d) x(p + d) - theta x(p) sum over d of w(d), without bias.

    It is one convolution whose middle tap is less by theta times the sum of all taps, borders included; in causal tasks
    the last tap is the token's own. The taps are not those of a projection: policies leave it as it is.
    """

    def __init__(self, context: Context, *, kernel_size: int, theta: float, form: str) -> None:
        super().__init__()
        self.theta, self.form = theta, form
        self.causal = context.kind == "causal"
        inputs = context.width if form == "dense" else 1
        weight = nn.Parameter(torch.empty(context.width, inputs, *(kernel_size,) * len(context.size)))
        nn.init.kaiming_uniform_(weight, a=5**0.5)
        self.register_parameter(form, weight)

    def _weight(self) -> Tensor:
        weight: Tensor = getattr(self, self.form)
        taps = weight.dim() - 2
        size = weight.shape[-1]
        total = weight.sum(dim=tuple(range(2, weight.dim())), keepdim=True)
        before = size - 1 if self.causal else size // 2
        return weight - self.theta * F.pad(total, (before, size - 1 - before) * taps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        weight = self._weight()
        if self.form == "dense":
            return window_conv(x, weight, causal=self.causal)
        if x.dim() == 3:
            return depthwise_conv1d(x, weight.to(x.dtype), causal=self.causal)
        return depthwise_conv2d(x, weight.to(x.dtype))
