"""Kernels of three dimensions of which each image takes a slice, moved as it asks."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, normed
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.operators.windows import own_dense
from mixnas.search_space.registry import Context, Knob, register

_INSIDE = 16  # channels of what finds axis and angle


@register(
    "mixer",
    "cross_d_conv",
    kinds=("image",),
    paper="Cross-D Conv: Cross-Dimensional Transferable Knowledge Base via Fourier Shifting Operation, as its code has "
    "it",
    knobs={"kernel_size": Knob(3, choices=(3, 5, 7))},
)
class CrossDConv(nn.Module):
    """A dense convolution without bias with the middle slice of F^-1(F(W) exp(-2 pi i 1'R f)), W of k x k x k taps.

    R = 1 + angle [axis]x for each image: r = squeeze(relu(norm(read(x)))), each number weighed over the positions by
    the softmax of itself; the first three make the axis, of length 1, and tanh of the fourth the angle, at most pi / 4.
    The phase is linear in f, hence a circular move of W along each axis, by the sums of the columns of R: for odd k
    each is a real k x k matrix, and no transform is needed. The paper calls it a rotation. The kernel is no projection:
    policies take `read` and `squeeze` only.
    """

    folds: ClassVar = (("norm", "read"),)

    places: Tensor

    def __init__(self, context: Context, *, kernel_size: int) -> None:
        super().__init__()
        inside = Context(_INSIDE, context.size, context.kind)
        self.weight = nn.Parameter(torch.empty(context.width, context.width, *(kernel_size,) * 3))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.read, self.norm = Linear(context.width, _INSIDE), BatchNorm(inside)
        self.squeeze = Linear(_INSIDE, 4)
        self.register_buffer("places", torch.arange(kernel_size).float(), persistent=False)

    def _moves(self, x: Tensor) -> Tensor:
        """(B, 3): how far the kernel is moved along depth, height and width."""
        found = self.squeeze(normed(self.norm, self.read(x.flatten(1, -2))).relu())
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        found = (found * found.softmax(dim=1)).sum(dim=1)
        axis, angle = found[:, :3], found[:, 3:].tanh() * (math.pi / 4)
        axis = axis / (torch.linalg.vector_norm(axis, dim=1, keepdim=True) + 1e-8)
        return 1 + angle * (axis.roll(1, dims=1) - axis.roll(-1, dims=1))

    def _moved(self, moves: Tensor) -> Tensor:
        """(B, k * k * C, C): the middle slice of each image's kernel, as `own_dense` takes it."""
        k = len(self.places)
        places = self.places.to(moves.dtype)
        apart = places.unsqueeze(1) - places - moves.view(-1, 3, 1, 1)  # (B, 3, k, k): to each tap, from each
        matrices = torch.ones_like(apart)
        for frequency in range(1, k // 2 + 1):
            matrices = matrices + 2 * torch.cos((2 * math.pi * frequency / k) * apart)
        depth, down, across = (matrices / k).unbind(dim=1)
        # Taps of the slice by taps of the kernel: (B, k, k, k, k, k).
        move = depth[:, k // 2, None, None, :, None, None] * down[:, :, None, None, :, None]
        move = move * across[:, None, :, None, None, :]
        kernel = self.weight.to(moves.dtype).flatten(2).permute(2, 1, 0)  # (k^3, inputs, outputs)
        taps = move.flatten(0, 2).flatten(1) @ kernel.flatten(1)
        return taps.view(moves.shape[0], -1, kernel.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        return own_dense(x, self._moved(self._moves(x)), len(self.places))
