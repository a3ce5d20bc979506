"""Adaptive frequency filter: a mask over the spectrum, made from the spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.registry import Context, Knob, Value, register


def _blocks_divide(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if context.width % int(knobs["blocks"]):
        return f"{knobs['blocks']} blocks do not divide width {context.width}"
    return None


# Every frequency is made of all positions, which in a causal network would show the future.
@register(
    "mixer",
    "frequency_filter",
    kinds=("image", "sequence"),
    paper="Huang et al. 2023, Adaptive Frequency Filters (AFFNet, arXiv 2307.14008), section 3.2",
    knobs={
        "blocks": Knob(8, choices=(1, 2, 4, 8, 16), doc="groups of channels that are mixed with each other"),
        "threshold": Knob(0.01, low=0.0, high=1.0, doc="masks become smaller by this, and those below it zero"),
    },
    check=_blocks_divide,
)
class FrequencyFilter(nn.Module):
    """x + F^-1(X softshrink(W2 silu(W1 X + b1) + b2)), X = F(x) orthonormal over positions, weights complex.

    The weights are block-diagonal over channels; silu and softshrink act on real and imaginary parts. It is computed in
    float32 or better, and has no projections: policies leave it as it is.
    """

    slicing: ClassVar = {name: ("lead",) * 4 for name in ("first", "second")} | {
        name: ("lead",) * 3 for name in ("first_bias", "second_bias")
    }

    def __init__(self, context: Context, *, blocks: int, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        part = context.width // blocks
        # The first dimension is the real and the imaginary part.
        self.first, self.second = (nn.Parameter(0.02 * torch.randn(2, blocks, part, part)) for _ in range(2))
        self.first_bias, self.second_bias = (nn.Parameter(0.02 * torch.randn(2, blocks, part)) for _ in range(2))

    def _mixed(self, parts: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A complex matrix product of real and imaginary parts: (2, blocks, M, part) to the same."""
        weight, bias = weight.to(parts.dtype), bias.to(parts.dtype)
        real, imaginary = weight
        rows = torch.cat([torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)], -2)
        y = torch.cat([parts[0], parts[1]], -1) @ rows
        return torch.stack(y.chunk(2, dim=-1)) + bias.unsqueeze(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        exact = torch.promote_types(x.dtype, torch.float32)
        dims = tuple(range(1, x.dim() - 1))
        spectrum = torch.fft.rfftn(x.to(exact), dim=dims, norm="ortho")
        blocks = self.first.shape[1]
        parts = torch.stack([spectrum.real, spectrum.imag]).flatten(1, -2).unflatten(-1, (blocks, -1)).transpose(1, 2)
        hidden = F.silu(self._mixed(parts, self.first, self.first_bias))
        mask = F.softshrink(self._mixed(hidden, self.second, self.second_bias), self.threshold)
        mask = mask.transpose(1, 2).flatten(-2).view(2, *spectrum.shape)
        filtered = spectrum * torch.complex(mask[0], mask[1])
        size = [x.shape[dim] for dim in dims]
        return (torch.fft.irfftn(filtered, s=size, dim=dims, norm="ortho").to(x.dtype) + x).contiguous()
