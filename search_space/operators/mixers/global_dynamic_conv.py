"""Global dynamic convolution: every patch of an image is a kernel of size one, and a layer mixes the answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import DepthwiseConv, normed
from mixnas.search_space.registry import Context, Knob, register


# Every patch speaks to every token, which in a causal network would show the future.
@register(
    "mixer",
    "global_dynamic_conv",
    kinds=("image", "sequence"),
    paper="Song et al. 2024, Troublemaker Learning for Low-Light Image Enhancement (arXiv 2402.04584), global dynamic "
    "convolution",
    knobs={
        "patch_size": Knob(7, choices=(5, 7, 14), doc="extent of a patch"),
        "kernel_size": Knob(7, choices=(3, 5, 7), doc="extent of the depthwise window of the tokens"),
    },
)
class GlobalDynamicConv(nn.Module):
    """out(a), a[u, j] = q_j . window(x)[u] + b for every patch j, q = gelu(norm(patch(x) + places)).

    `patch` is a depthwise convolution of one answer a patch, `places` are learned, b is one number. `out` reads as many
    channels as there are patches: it is for one grid. A grid that patches do not divide is filled with zeros at its
    ends. The authors' block adds x, as the branch round this does. It has no projections: policies leave it as it is.
    """

    def __init__(self, context: Context, *, patch_size: int, kernel_size: int) -> None:
        super().__init__()
        axes, self.patch_size = len(context.size), patch_size
        self.patch = nn.Parameter(torch.empty(context.width, 1, *(patch_size,) * axes))
        nn.init.kaiming_uniform_(self.patch, a=5**0.5)
        self.patch_bias = nn.Parameter(torch.zeros(context.width))
        grid = [-(-extent // patch_size) for extent in context.size]
        self.places = nn.Parameter(torch.randn(context.width, *grid))
        self.norm = nn.LayerNorm(context.width, eps=1e-6)
        self.window = DepthwiseConv(context, kernel_size)
        self.bias = nn.Parameter(torch.zeros(1))
        patches = self.places[0].numel()
        # No layer of which policies know: its inputs are patches, as few as one.
        self.out = nn.Linear(patches, context.width)

    def _kernels(self, x: Tensor) -> Tensor:
        """(B, C, patches)."""
        fill = [side for extent in reversed(x.shape[1:-1]) for side in (0, -extent % self.patch_size)]
        padded, options = F.pad(x.movedim(-1, 1), fill), {"stride": self.patch_size, "groups": x.shape[-1]}
        conv = F.conv2d if x.dim() == 4 else F.conv1d
        q = conv(padded, self.patch.to(x.dtype), self.patch_bias.to(x.dtype), **options) + self.places
        return F.gelu(normed(self.norm, q.flatten(2).transpose(1, 2))).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        tokens = self.window(x).flatten(1, -2)
        answers = tokens @ self._kernels(x).to(tokens.dtype) + self.bias.to(tokens.dtype)
        out: Tensor = self.out(answers.to(self.out.weight.dtype))
        return out.view(x.shape)
