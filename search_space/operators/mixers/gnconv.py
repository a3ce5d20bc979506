"""Recursive gated convolution: products of higher and higher order between tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mixnas.search_space.operators.layers import KERNEL_SIZES, DepthwiseConv, Linear
from mixnas.search_space.registry import Context, Knob, Value, register

_SCALE = 1 / 3  # of the windows' answers, as in all released models


def _halves(context: Context, knobs: Mapping[str, Value]) -> str | None:
    halvings = int(knobs["order"]) - 1
    if context.width % 2**halvings:
        return f"order {knobs['order']} halves the width {halvings} times, and {2**halvings} does not divide it"
    return None


@register(
    "mixer",
    "gnconv",
    paper="Rao et al. 2022, HorNet (arXiv 2207.14284), section 3.1",
    knobs={
        "order": Knob(3, choices=(2, 3, 4, 5), doc="factors of a product"),
        "kernel_size": Knob(7, choices=KERNEL_SIZES, doc="extent of the depthwise window"),
    },
    check=_halves,
)
class GnConv(nn.Module):
    """p = first(x) * w_n; p = steps_j(p) * w_j for j = n - 1 .. 1; out(p), with w_j = depthwise(features_j(x)) / 3.

    The j-th of the lists has C / 2^j channels, so that the order that is lower is part of the one that is higher.
    """

    def __init__(self, context: Context, *, order: int, kernel_size: int) -> None:
        super().__init__()
        widths = [context.width >> j for j in range(order)]
        self.first = Linear(context.width, widths[-1])
        self.features = nn.ModuleList(Linear(context.width, width) for width in widths)
        insides = [Context(width, context.size, context.kind) for width in widths]
        self.windows = nn.ModuleList(DepthwiseConv(inside, kernel_size) for inside in insides)
        self.steps = nn.ModuleList(Linear(width // 2, width) for width in widths[:-1])
        self.out = Linear(context.width, context.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        p: Tensor = self.first(x) * _SCALE
        for j in reversed(range(len(self.features))):
            if j < len(self.steps):
                p = self.steps[j](p) * _SCALE
            p = self.windows[j](self.features[j](x), gate=p)
        out: Tensor = self.out(p)
        return out
