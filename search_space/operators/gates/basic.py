"""Gates: `forward(x, mixer)` returns the gated output of `mixer`; each gate says what it acts on."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mixnas.kernels.glu import glu
from mixnas.search_space.registry import Context, Knob, register

Mixer = Callable[[Tensor], Tensor]


@register("gate", "none", paper="Yu et al. 2022, MetaFormer Is Actually What You Need (arXiv 2111.11418)")
class NoGate(nn.Module):
    """The mixer alone."""

    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        return mixer(x)


# The squeeze is a mean over all positions, which in a causal network would show the future.
@register(
    "gate",
    "se",
    kinds=("image", "sequence"),
    paper="Hu et al. 2018, Squeeze-and-Excitation Networks (arXiv 1709.01507), section 3",
    knobs={"reduction": Knob(4, low=1, high=64, doc="width over hidden width")},
)
class SqueezeExcitation(nn.Module):
    """Acts on the output: y * sigmoid(W2 relu(W1 mean(y))), one factor per channel."""

    def __init__(self, context: Context, *, reduction: int) -> None:
        super().__init__()
        hidden = max(1, context.width // reduction)
        self.squeeze = nn.Linear(context.width, hidden)
        self.excite = nn.Linear(hidden, context.width)

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        y = mixer(x)
        mean = y.mean(dim=tuple(range(1, y.dim() - 1)), keepdim=True)
        return y * self.excite(self.squeeze(mean).relu()).sigmoid()


@register(
    "gate",
    "output_sigmoid",
    paper="Qiu et al. 2025, Gated Attention for Large Language Models (arXiv 2505.06708), elementwise output gate",
)
class OutputSigmoid(nn.Module):
    """Acts on the output, computed from the input: mixer(x) * sigmoid(W x), one factor per element."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.linear = nn.Linear(context.width, context.width)

    def forward(self, x: Tensor, mixer: Mixer) -> Tensor:
        """x (B, ..., C), the normalised block input."""
        return glu(self.linear(x), mixer(x), "sigmoid")
