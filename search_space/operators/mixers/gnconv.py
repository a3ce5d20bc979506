"""Recursive gated convolution: products of higher and higher order between tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import KERNEL_SIZES, DepthwiseConv, Linear, normed
from mixnas.search_space.registry import Context, Knob, Value, register

_SCALE = 1 / 3  # of the windows' answers, as in all released models


def _fits(context: Context, knobs: Mapping[str, Value]) -> str | None:
    halvings = int(knobs["order"]) - 1
    if context.width % 2**halvings:
        return f"order {knobs['order']} halves the width {halvings} times, and {2**halvings} does not divide it"
    if knobs["filter"] == "global":
        if context.kind == "causal":
            return "the filter in frequency is over all tokens, which would show the future; filter: window does not"
        if sum(context.width >> j for j in range(halvings + 1)) % 2:
            return f"the filter in frequency halves its channels, an odd number at width {context.width}"
    return None


class GlobalLocalFilter(nn.Module):
    """norm of [a_0, b_0, a_1, b_1, ...], a = depthwise of 3 of the first half of n, b = F^-1(F(n_second) spectrum).

    n = norm(x); F is over positions, orthonormal, in float32 or better. The spectrum is for one grid: one number for
    each frequency and channel (Rao et al. 2022, HorNet, section 3.1, GF).

    Args:
        context: Where it stands; its width is even.

    Shape:
        Input and output (B, ..., C).
    """

    slicing: ClassVar = {"spectrum": ("lead",) * 4}

    def __init__(self, context: Context) -> None:
        super().__init__()
        half = Context(context.width // 2, context.size, context.kind)
        self.pre_norm, self.post_norm = (nn.LayerNorm(context.width, eps=1e-6) for _ in range(2))
        self.window = DepthwiseConv(half, 3, bias=False)
        *rows, columns = context.size
        # As an image of one row: the same number of dimensions for all kinds.
        self.spectrum = nn.Parameter(0.02 * torch.randn(half.width, *(rows or [1]), columns // 2 + 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        near, far = normed(self.pre_norm, x).chunk(2, dim=-1)
        dims = tuple(range(1, x.dim() - 1))
        exact = torch.promote_types(far.dtype, torch.float32)
        factors = self.spectrum.to(exact).movedim(0, -2)
        if x.dim() == 3:
            factors = factors[0]  # before it is complex: ONNX's exporter selects real numbers alone
        spectrum = torch.fft.rfftn(far.to(exact), dim=dims, norm="ortho") * torch.complex(*factors.unbind(dim=-1))
        far = torch.fft.irfftn(spectrum, s=x.shape[1:-1], dim=dims, norm="ortho").to(near.dtype)
        return normed(self.post_norm, torch.stack([self.window(near), far], dim=-1).flatten(-2))


@register(
    "mixer",
    "gnconv",
    paper="Rao et al. 2022, HorNet (arXiv 2207.14284), section 3.1",
    knobs={
        "order": Knob(3, choices=(2, 3, 4, 5), doc="factors of a product"),
        "kernel_size": Knob(7, choices=KERNEL_SIZES, doc="extent of the depthwise window"),
        "filter": Knob("window", choices=("window", "global"), doc="depthwise windows, or a filter in frequency (GF)"),
    },
    check=_fits,
)
class GnConv(nn.Module):
    """p = first(x) * w_n; p = steps_j(p) * w_j for j = n - 1 .. 1; out(p), with w_j = depthwise(features_j(x)) / 3.

    The j-th of the lists has C / 2^j channels, so that the order that is lower is part of the one that is higher. In
    place of the windows `filter: global` has one `GlobalLocalFilter` on all features, which `kernel_size` says nothing
    of; it is for one grid, and no slice of another's.
    """

    def __init__(self, context: Context, *, order: int, kernel_size: int, filter: str) -> None:
        super().__init__()
        widths = [context.width >> j for j in range(order)]
        self.first = Linear(context.width, widths[-1])
        self.features = nn.ModuleList(Linear(context.width, width) for width in widths)
        if filter == "global":
            self.filter = GlobalLocalFilter(Context(sum(widths), context.size, context.kind))
        else:
            insides = [Context(width, context.size, context.kind) for width in widths]
            self.windows = nn.ModuleList(DepthwiseConv(inside, kernel_size) for inside in insides)
        self.is_global = filter == "global"
        self.steps = nn.ModuleList(Linear(width // 2, width) for width in widths[:-1])
        self.out = Linear(context.width, context.width)

    def _filtered(self, x: Tensor) -> list[Tensor]:
        """w_j without its factor, in the filter's form."""
        features = [feature(x) for feature in reversed(self.features)]  # the authors' order: the narrowest first
        found = self.filter(torch.cat(features, dim=-1)).split([f.shape[-1] for f in features], dim=-1)
        return list(reversed(found))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        factors = self._filtered(x) if self.is_global else []
        p: Tensor = self.first(x) * _SCALE
        for j in reversed(range(len(self.features))):
            if j < len(self.steps):
                p = self.steps[j](p) * _SCALE
            p = factors[j] * p if self.is_global else self.windows[j](self.features[j](x), gate=p)
        out: Tensor = self.out(p)
        return out
