"""Convolution between several kernels: a control says how much of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import window_conv
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "tunable_conv",
    paper="Maggioni et al. 2023, Tunable Convolutions with Parametric Multi-Loss Optimization (arXiv 2304.00898)",
    knobs={
        "control": Knob(0.5, low=0.0, high=1.0, doc="share of the second kernel; the rest is of the first"),
        "kernel_size": Knob(3, choices=(1, 3, 5, 7)),
    },
)
class TunableConv(nn.Module):
    """A convolution with the taps and bias (1 - control) of one kernel and control of another, without a softmax.

    The authors' control is an input, drawn anew for each training step, which no task here has: it is a knob. One
    network has one control, and its two kernels are one convolution; a super-network whose choices differ in it trains
    two kernels, and what stands between them. The authors' learned layer on the control is left out: it has nothing to
    read. Its taps are no projection: policies leave them.
    """

    def __init__(self, context: Context, *, control: float, kernel_size: int) -> None:
        super().__init__()
        self.causal, self.shares = context.kind == "causal", (1 - control, control)
        width, taps = context.width, (kernel_size,) * len(context.size)
        self.kernels = nn.ParameterList(torch.empty(width, width, *taps) for _ in self.shares)
        self.biases = nn.ParameterList(torch.zeros(width) for _ in self.shares)
        for kernel in self.kernels:
            nn.init.kaiming_uniform_(kernel, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        first, second = self.shares
        kernel = first * self.kernels[0] + second * self.kernels[1]
        bias = first * self.biases[0] + second * self.biases[1]
        return window_conv(x, kernel, bias, causal=self.causal)
