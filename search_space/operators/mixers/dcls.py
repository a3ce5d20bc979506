"""Depthwise convolution whose few taps learn where they stand."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mixnas.kernels.depthwise_conv1d import depthwise_conv1d
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "dcls",
    paper="Hassani et al. 2023, Dilated Convolution with Learnable Spacings (arXiv 2112.03740), section 2, and "
    "arXiv 2306.00817",
    knobs={
        "kernel_size": Knob(17, choices=(7, 11, 13, 17, 21, 23), doc="extent of the kernel in which the taps stand"),
        "taps": Knob(34, low=1, high=64, doc="of each channel"),
        "form": Knob("gauss", choices=("gauss", "triangle"), doc="what a tap spreads over"),
    },
)
class DCLS(nn.Module):
    """A depthwise convolution with bias, kernel K[c, z] = sum over taps m of weight[c, m] f(z - place[c, m]) / sum f.

    triangle: f = product over axes of relu(1 - |z|); gauss: exp(-|z / (0.27 + |width[c, m]|)|^2 / 2). Places are from
    the middle; they start at N(0, 1/2), in causal tasks as far before the token, and are held inside the kernel. What
    runs is dense: K taps along each axis are counted. In causal tasks the kernel ends at the token. Taps are no
    projection: policies leave them.
    """

    slicing: ClassVar = {"place": ("lead",) * 3, "width": ("lead",) * 3}

    coordinates: Tensor

    def __init__(self, context: Context, *, kernel_size: int, taps: int, form: str) -> None:
        super().__init__()
        axes = len(context.size)
        self.kernel_size, self.causal = kernel_size, context.kind == "causal"
        self.weight = nn.Parameter(torch.empty(context.width, taps))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        edge = kernel_size // 2
        place = 0.5**0.5 * torch.randn(axes, context.width, taps)
        self.place = nn.Parameter((edge - place.abs() if self.causal else place).clamp(-edge, edge))
        self.width = nn.Parameter(torch.full((axes, context.width, taps), 0.23)) if form == "gauss" else None
        self.bias = nn.Parameter(torch.zeros(context.width))
        self.register_buffer("coordinates", torch.arange(kernel_size) - float(edge), persistent=False)

    def _kernel(self) -> Tensor:
        """(C, 1, K) or (C, 1, K, K)."""
        edge = self.kernel_size // 2
        away = self.coordinates - self.place.clamp(-edge, edge).unsqueeze(-1)  # (axes, C, taps, K)
        if self.width is None:
            along = (1 - away.abs()).relu()
        else:
            along = (-0.5 * (away / (0.27 + self.width.abs()).unsqueeze(-1)).square()).exp()
        # f is a product over axes: so is its sum.
        weight = self.weight / (along.sum(dim=-1).prod(dim=0) + 1e-7)
        # Not a matrix product: what depends on no example is not among an example's multiply-accumulates.
        rows = along[0] * weight.unsqueeze(-1)
        if len(along) == 1:
            return rows.sum(dim=1, keepdim=True)
        return (rows.unsqueeze(-1) * along[1].unsqueeze(-2)).sum(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        kernel, bias = self._kernel().to(x.dtype), self.bias.to(x.dtype)
        if x.dim() == 3:
            return depthwise_conv1d(x, kernel, bias, causal=self.causal)
        return depthwise_conv2d(x, kernel, bias)
