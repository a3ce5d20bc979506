"""Gated short convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "short_conv_gate",
    paper="Liquid AI 2025, LFM2 (arXiv 2511.23404), the gated short convolution; Arora et al. 2023, Zoology "
    "(arXiv 2312.04927), section 5, BaseConv",
    knobs={
        "kernel_size": Knob(3, choices=(3, 5, 7, 9, 11)),
        "form": Knob(
            "lfm2", choices=("lfm2", "baseconv"), doc="lfm2: gates before and after; baseconv: one and a skip"
        ),
    },
)
class ShortConvGate(nn.Module):
    """lfm2: out(c * conv(b * v)) with b, c, v projections of x; baseconv: conv(x) * gate(x) + x.

    The convolution is depthwise; causal tasks see only earlier tokens, images get a square window.
    """

    def __init__(self, context: Context, *, kernel_size: int, form: str) -> None:
        super().__init__()
        width = context.width
        self.form = form
        self.conv = DepthwiseConv(context, kernel_size, bias=form == "baseconv")
        if form == "baseconv":
            self.gate = Linear(width, width)
        else:
            self.before, self.after, self.value, self.out = (Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, ..., C) to the same; `valid` (B, L, 1): what is not there is as what lies beyond the ends."""
        if valid is not None:
            x = x * valid
        if self.form == "baseconv":
            return self.conv(x, gate=self.gate(x)) + x
        y: Tensor = self.out(self.conv(self.before(x) * self.value(x), gate=self.after(x)))
        return y
