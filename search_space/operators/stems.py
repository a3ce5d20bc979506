"""Stems: from a task's input to tokens of the first stage's width.

A stem takes the contexts before and after it. `out_size(size, **knobs)` tells the token grid it makes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Conv, Linear, normed
from mixnas.search_space.operators.norms import LayerNorm
from mixnas.search_space.registry import Context, Knob, Value, register

_POSITION = Knob("none", choices=("none", "learned"), doc="add a learned vector per position")


class _Stem(nn.Module):
    def __init__(self, after: Context, position: str) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(*after.size, after.width)) if position == "learned" else None
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)

    # One row of channels per position: only the width is shared, so nothing is cropped at the centre.
    @property
    def slicing(self) -> dict[str, tuple[str, ...]]:
        return {} if self.position is None else {"position": ("lead",) * self.position.dim()}

    def place(self, x: Tensor) -> Tensor:
        """Add the positions."""
        return x if self.position is None else x + self.position


def _fits(context: Context, knobs: Mapping[str, Value]) -> str | None:
    stride = int(knobs.get("stride", knobs.get("patch_size", 1)))
    if any(extent % stride for extent in context.size):
        return f"stride {stride} does not divide the input size {'x'.join(map(str, context.size))}"
    return None


@register(
    "stem",
    "conv",
    kinds=("image",),
    paper="He et al. 2016, Deep Residual Learning (arXiv 1512.03385)",
    knobs={
        "kernel_size": Knob(3, choices=(1, 3, 5, 7, 9, 11, 13, 15)),
        "stride": Knob(1, low=1, high=16),
        "position": _POSITION,
    },
    check=_fits,
)
class ConvStem(_Stem):
    """One convolution with bias. (B, H, W, C_in) to (B, H/stride, W/stride, C)."""

    def __init__(self, before: Context, after: Context, *, kernel_size: int, stride: int, position: str) -> None:
        super().__init__(after, position)
        self.conv = Conv(before.width, after.width, kernel_size, stride, padding=kernel_size // 2)

    @staticmethod
    def out_size(size: tuple[int, ...], *, stride: int, **_: Value) -> tuple[int, ...]:
        """The token grid after the stride."""
        return tuple(extent // stride for extent in size)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.place(self.conv(x))


@register(
    "stem",
    "patch",
    kinds=("image",),
    paper="Dosovitskiy et al. 2021, An Image is Worth 16x16 Words (arXiv 2010.11929)",
    knobs={"patch_size": Knob(4, low=1, high=64), "position": _POSITION},
    check=_fits,
)
class PatchStem(_Stem):
    """Patches that do not overlap, projected. (B, H, W, C_in) to (B, H/p, W/p, C)."""

    def __init__(self, before: Context, after: Context, *, patch_size: int, position: str) -> None:
        super().__init__(after, position)
        self.conv = Conv(before.width, after.width, patch_size, patch_size)

    @staticmethod
    def out_size(size: tuple[int, ...], *, patch_size: int, **_: Value) -> tuple[int, ...]:
        """The token grid of the patches."""
        return tuple(extent // patch_size for extent in size)

    forward = ConvStem.forward


class OverlapPatch(nn.Module):
    """Windows of 2p - 1 at every p-th position, projected and normalised (eps 1e-5): one of PVT v2's patch embeddings.

    (B, H, W, C_in) to (B, H/p, W/p, C). The stem and the downsampling `overlap_patch` are this.
    """

    def __init__(self, before: Context, after: Context, patch_size: int) -> None:
        super().__init__()
        self.conv = Conv(before.width, after.width, 2 * patch_size - 1, patch_size, padding=patch_size - 1)
        self.norm = LayerNorm(after)
        self.norm.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return normed(self.norm, self.conv(x))


@register(
    "stem",
    "overlap_patch",
    kinds=("image",),
    paper="Wang et al. 2022, PVT v2 (arXiv 2106.13797), section 3.2, overlapping patch embedding",
    knobs={"patch_size": Knob(4, low=1, high=16, doc="distance between windows of 2p - 1"), "position": _POSITION},
    check=_fits,
)
class OverlapPatchStem(_Stem):
    """Patches that overlap, projected and normalised. (B, H, W, C_in) to (B, H/p, W/p, C)."""

    def __init__(self, before: Context, after: Context, *, patch_size: int, position: str) -> None:
        super().__init__(after, position)
        self.patches = OverlapPatch(before, after, patch_size)

    out_size = PatchStem.out_size

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.place(self.patches(x))


@register(
    "stem",
    "embedding",
    kinds=("sequence", "causal"),
    paper="Bengio et al. 2003, A Neural Probabilistic Language Model",
    knobs={"position": _POSITION},
)
class EmbeddingStem(_Stem):
    """Token embedding, N(0, 0.02). (B, L) integers to (B, L, C)."""

    takes_tokens = True

    def __init__(self, before: Context, after: Context, *, position: str) -> None:
        super().__init__(after, position)
        self.embedding = nn.Embedding(before.width, after.width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    @staticmethod
    def out_size(size: tuple[int, ...], **_: Value) -> tuple[int, ...]:
        """The same length."""
        return size

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.place(self.embedding(x))


@register(
    "stem",
    "linear",
    paper="Vaswani et al. 2017, Attention Is All You Need (arXiv 1706.03762), section 3.4, for continuous features",
    knobs={"position": _POSITION},
    pointwise=True,
)
class LinearStem(_Stem):
    """Each position projected by itself. (B, ..., C_in) to (B, ..., C)."""

    def __init__(self, before: Context, after: Context, *, position: str) -> None:
        super().__init__(after, position)
        self.linear = Linear(before.width, after.width)

    out_size = EmbeddingStem.out_size

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.place(self.linear(x))
