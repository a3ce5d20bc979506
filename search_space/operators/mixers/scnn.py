"""Spatial convolution: each row of an image reads what the row before it has become, then each column."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Conv
from mixnas.search_space.registry import Context, Knob, register

_DIRECTIONS = {"vertical": ("down", "up"), "horizontal": ("right", "left")}


def _passed(slices: list[Tensor], conv: nn.Module) -> list[Tensor]:
    """Each slice plus what comes from the one before it; to the first, of zeros, come zeros."""
    carried, found = torch.zeros_like(slices[0]), []
    for one in slices:
        carried = one + conv(carried).relu()
        found.append(carried)
    return found


@register(
    "mixer",
    "scnn",
    kinds=("image",),
    paper="Pan et al. 2018, Spatial As Deep: Spatial CNN for Traffic Scene Understanding (arXiv 1712.06080), section 3",
    knobs={
        "kernel_size": Knob(9, choices=(3, 5, 9), doc="extent along the row or column"),
        "directions": Knob("all", choices=("vertical", "horizontal", "all")),
    },
)
class SCNN(nn.Module):
    """x_i + relu(down(x_{i-1})) over rows, with x_{i-1} as it has become; then up, and the same over columns.

    Each direction has one kernel without bias, k taps by C by C, for all rows or columns. It takes a step for each row
    and each column in each direction, one after the other: many small operations, and as many nodes in a file.
    """

    def __init__(self, context: Context, *, kernel_size: int, directions: str) -> None:
        super().__init__()
        k, width = kernel_size, context.width
        self.passes = nn.ModuleDict()
        for over, names in _DIRECTIONS.items():
            for name in names if directions in ("all", over) else ():
                self.passes[name] = conv = Conv(width, width, (1, k), padding=(0, k // 2), bias=False)
                nn.init.normal_(conv.weight, std=(2 / (5 * k * width**2)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        for over, names in _DIRECTIONS.items():
            if names[0] not in self.passes:
                continue
            y = x if over == "vertical" else x.transpose(1, 2)
            slices = _passed(list(y.split(1, dim=1)), self.passes[names[0]])
            slices = _passed(slices[::-1], self.passes[names[1]])
            y = torch.cat(slices[::-1], dim=1)
            x = y if over == "vertical" else y.transpose(1, 2)
        return x.contiguous()
