"""Attention inside a convolution's window, and a convolution over what it gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, WindowConv
from mixnas.search_space.operators.windows import shifted
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "msa_conv",
    paper="Zhang et al. 2023, TiC: Exploring Vision Transformer in Convolution (arXiv 2310.04134), as its code has it",
    knobs={
        "kernel_size": Knob(3, choices=(3, 5, 7), doc="extent of the window, and of the convolution behind it"),
        "dilation": Knob(1, choices=(1, 2), doc="distance between the window's taps"),
    },
)
class MSAConv(nn.Module):
    """relu(conv(x + sum over the window's taps j of a_j v(. + j))), a = softmax over j of q k(. + j) C^-1/2, one head.

    Taps outside the grid stay in the softmax, with zeros for key and value, as in the authors' code; so do, in causal
    tasks, those before the first token. The cyclic shifts of the paper are not in that code, nor here; nor is dropout.
    """

    def __init__(self, context: Context, *, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.causal, self.kernel_size, self.dilation = context.kind == "causal", kernel_size, dilation
        self.query, self.key, self.value = (Linear(context.width, context.width) for _ in range(3))
        self.conv = WindowConv(context, context.width, kernel_size, bias=False)

    def _moved(self, x: Tensor) -> list[Tensor]:
        return list(shifted(x, self.kernel_size, causal=self.causal, dilation=self.dilation))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        q = self.query(x) * x.shape[-1] ** -0.5
        logits = torch.stack([(q * key).sum(dim=-1) for key in self._moved(self.key(x))], dim=-1)
        weights = logits.softmax(dim=-1).unsqueeze(-2)
        y = x
        for j, value in enumerate(self._moved(self.value(x))):
            y = y + weights[..., j] * value
        out: Tensor = self.conv(y)
        return out.relu().contiguous()
