"""Partial convolution: a dense window on some channels; the others pass, or are weighed against each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, WindowConv, normed
from mixnas.search_space.operators.norms import BatchNorm
from mixnas.search_space.registry import Context, Knob, Value, register


def _leaves_some(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if context.width < int(knobs["divisor"]):
        return f"divisor {knobs['divisor']} leaves no channel of width {context.width} to the convolution"
    if knobs["attention"] == "channel" and context.kind == "causal":
        return "attention: channel looks at means over all positions, and a causal task must not see the future"
    return None


@register(
    "mixer",
    "pconv",
    paper="Chen et al. 2023, FasterNet (arXiv 2303.03667), section 3.2; Partial Convolution Meets Visual Attention "
    "(PATNet), PAT_ch, as the authors' code has it",
    knobs={
        "divisor": Knob(4, choices=(2, 4, 8), doc="width over the channels that are convolved"),
        "kernel_size": Knob(3, choices=(3, 5, 7)),
        "attention": Knob("none", choices=("none", "channel"), doc="what happens to the other channels"),
    },
    check=_leaves_some,
)
class PartialConv(nn.Module):
    """The first C / divisor channels go through a dense convolution without bias, the others pass.

    attention channel: the others become norm(r * hardsigmoid(norm'(mean'(mean(r)) + std'(std(r))))), batch norms, with
    the mean and the standard deviation over all positions (0 where there is one) and two projections without biases.
    """

    def __init__(self, context: Context, *, divisor: int, kernel_size: int, attention: str) -> None:
        super().__init__()
        convolved = context.width // divisor
        self.split = [convolved, context.width - convolved]
        inside = Context(convolved, context.size, context.kind)
        self.window = WindowConv(inside, convolved, kernel_size, bias=False)
        self.attends = attention == "channel"
        if self.attends:
            rest = Context(self.split[1], context.size, context.kind)
            self.mean, self.std = (Linear(rest.width, rest.width, bias=False) for _ in range(2))
            self.weight_norm, self.norm = BatchNorm(rest), BatchNorm(rest)

    def _weighed(self, rest: Tensor) -> Tensor:
        positions = tuple(range(1, rest.dim() - 1))
        tokens = rest[0, ..., 0].numel()
        mean = rest.mean(dim=positions)
        # Of one position the deviation is 0, and the root has no derivative there.
        std = rest.std(dim=positions) if tokens > 1 else torch.zeros_like(mean)
        weight = F.hardsigmoid(normed(self.weight_norm, self.mean(mean) + self.std(std)))
        return normed(self.norm, rest * weight.view(rest.shape[0], *(1,) * len(positions), rest.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        convolved, rest = x.split(self.split, dim=-1)
        return torch.cat([self.window(convolved), self._weighed(rest) if self.attends else rest], dim=-1)
