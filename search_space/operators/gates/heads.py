"""Gates on the heads of the output, and on the values that go in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mixnas.search_space.operators.gates.none import Mixer
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob, Value, register

_PAPER = "Qiu et al. 2025, Gated Attention for Large Language Models (arXiv 2505.06708)"


def _heads_divide(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if context.width % int(knobs["heads"]):
        return f"{knobs['heads']} heads do not divide width {context.width}"
    return None


@register(
    "gate",
    "g1_head_sigmoid",
    paper=f"{_PAPER}, section 3, the headwise gate at position G1",
    knobs={"heads": Knob(4, low=1, high=64, doc="heads; divides the width")},
    check=_heads_divide,
    pointwise=True,
)
class G1HeadSigmoid(nn.Module):
    """Acts on the output, computed from the input: each head's channels times one factor of sigmoid(W x), no bias.

    In the paper it stands before the output projection. A gate has the mixer's output: where the mixer ends in a
    projection, the heads are those of the projected channels.
    """

    def __init__(self, context: Context, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear = Linear(context.width, heads, bias=False)

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        factors = self.linear(x).sigmoid().unsqueeze(-1)
        return (mixer(x).unflatten(-1, (self.heads, -1)) * factors).flatten(-2)


@register("gate", "value_gate", paper=f"{_PAPER}, section 3, position G2: what is mixed is gated", pointwise=True)
class ValueGate(nn.Module):
    """Acts on the input: mixer(x * sigmoid(W x)), no bias.

    For a mixer that is linear in its input the values are the input. A mixer that makes its weights from its input, as
    attention does, makes them from what is gated.
    """

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.linear = Linear(context.width, context.width, bias=False)

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        return mixer(x * self.linear(x).sigmoid())  # in the type of x, whatever the policy
