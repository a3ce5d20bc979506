"""The sentinel: one small fixed network that every latency is a ratio to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sentinel_module(device: str = "cpu") -> tuple[torch.nn.Module, torch.Tensor]:
    """The sentinel: four fixed MetaFormer-like blocks of 32 channels on one 8 x 8 grid, about 0.2 ms on a CPU.

    On a GPU, where that would be launches only, eight 56 x 56 grids.

    It never changes: latencies of different days are comparable because they are ratios to the same network. It has the
    mix of a searched network (token mixing, projections, normalisation, activation, the interpreter's share) but no
    convolution, whose time on a CPU depends on the process as that of nothing else does (see `measure.on_own_heap`).
    """
    import torch
    from torch import nn

    shape = (8, 56, 56, 32) if device.startswith("cuda") else (1, 8, 8, 32)
    side = shape[2]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
            self.mix = nn.Linear(side, side)  # along each row
            self.up, self.down = nn.Linear(32, 96), nn.Linear(96, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.mix(self.norm(x).transpose(2, 3)).transpose(2, 3)
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):  # nothing is drawn from the global generator
        network = nn.Sequential(*(Block() for _ in range(4)))
    network = network.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    network = network.to(device)
    return network, torch.randn(shape, generator=generator).to(device)


def make_sentinel(device: str = "cpu") -> Callable[[], object]:
    """The eager forward of `sentinel_module`."""
    module, inputs = sentinel_module(device)
    return lambda: module(inputs)
