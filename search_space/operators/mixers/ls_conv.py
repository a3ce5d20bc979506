"""Large perception, small aggregation: a wide window makes the weights of a narrow one, for each token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, Linear, normed
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, Value, register

_TAPS = 3  # extent of the narrow window


def _groups_divide(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if context.width % int(knobs["sharing"]):
        return f"{knobs['sharing']} channels share a kernel, which does not divide width {context.width}"
    return None


# Norms' statistics are over all positions, which in a causal network would show the future.
@register(
    "mixer",
    "ls_conv",
    kinds=("image", "sequence"),
    paper="Wang et al. 2025, LSNet (arXiv 2503.23135), section 3.2",
    knobs={
        "kernel_size": Knob(7, choices=(5, 7, 9, 11), doc="extent of the wide window"),
        "sharing": Knob(8, choices=(4, 8, 16), doc="channels that share a kernel: c, c + C / 8, c + 2 C / 8, ..."),
    },
    check=_groups_divide,
)
class LSConv(nn.Module):
    """x + norm(sum over the taps d of w_d x(. + d)), 3 taps along each axis, w for each token and group of channels.

    w = group_norm(kernels(relu(norm(mix(norm(depthwise(relu(norm(narrow(x))))))))), with C / 2 channels inside, batch
    norms and one group of the last norm for each kernel, over its taps and all positions.
    """

    folds = (("narrow_norm", "narrow"), ("window_norm", "window"), ("mix_norm", "mix"))

    def __init__(self, context: Context, *, kernel_size: int, sharing: int) -> None:
        super().__init__()
        inside = Context(max(1, context.width // 2), context.size, context.kind)
        self.groups, taps = context.width // sharing, _TAPS ** len(context.size)
        self.narrow, self.narrow_norm = Linear(context.width, inside.width, bias=False), BatchNorm(inside)
        self.window, self.window_norm = DepthwiseConv(inside, kernel_size, bias=False), BatchNorm(inside)
        self.mix, self.mix_norm = Linear(inside.width, inside.width, bias=False), BatchNorm(inside)
        self.kernels = Linear(inside.width, taps * self.groups)
        self.kernels_norm = nn.GroupNorm(self.groups, taps * self.groups)
        self.norm = BatchNorm(context)

    def _kernels(self, x: Tensor) -> Tensor:
        """(B, groups, taps, *size)."""
        u = normed(self.narrow_norm, self.narrow(x)).relu()
        u = normed(self.window_norm, self.window(u))
        u = normed(self.mix_norm, self.mix(u)).relu()
        weight = normed(self.kernels_norm, self.kernels(u).flatten(1, -2).transpose(1, 2))
        return weight.unflatten(1, (self.groups, -1)).unflatten(-1, x.shape[1:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        weight = self._kernels(x).unsqueeze(1)
        size, dims = x.shape[1:-1], x.dim() - 2
        padded = F.pad(x.movedim(-1, 1).unflatten(1, (-1, self.groups)), (1, 1) * dims)
        y = torch.zeros_like(padded[..., : size[0], : size[1]] if dims == 2 else padded[..., : size[0]])
        for tap in range(weight.shape[3]):
            if dims == 2:
                down, right = divmod(tap, _TAPS)
                moved = padded[..., down : down + size[0], right : right + size[1]]
            else:
                moved = padded[..., tap : tap + size[0]]
            y = torch.addcmul(y, moved, weight[:, :, :, tap])
        return x + normed(self.norm, y.flatten(1, 2).movedim(1, -1))
