"""Depthwise convolution whose taps differ from place to place and are the same for every image."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.dispatch import keeping, tracing
from mixnas.kernels.work import counted
from mixnas.search_space.operators.windows import shifted
from mixnas.search_space.registry import Context, Knob, register


# Made once for all examples: none of it is among an example's multiply-accumulates.
@counted(lambda *_: 0)
def _generated(maps: Tensor, convs: nn.ParameterList, norms: nn.ModuleList, last: Tensor) -> Tensor:
    """(taps, *size, C) from maps (p, *size)."""
    conv = F.conv2d if maps.dim() == 3 else F.conv1d
    z = maps.unsqueeze(0)
    for weight, norm in zip(convs, norms, strict=True):
        z = norm(conv(z, weight, padding=1)).relu()
    axes = maps.dim() - 1
    made = conv(z, last.flatten(0, axes), padding=1)[0]
    return made.unflatten(0, (len(last), -1)).movedim(0, -1).contiguous()


@register(
    "mixer",
    "tv_conv",
    paper="Chen et al. 2022, TVConv: Efficient Translation Variant Convolution (arXiv 2203.10489), section 3",
    knobs={
        "kernel_size": Knob(3, choices=(3, 5)),
        "maps": Knob(4, choices=(1, 4, 8), doc="channels of the learned map of places"),
        "hidden": Knob(16, choices=(16, 32, 64), doc="channels of what makes the taps from it"),
        "layers": Knob(1, choices=(1, 2, 3), doc="of hidden channels, behind the first"),
    },
    one_length=True,
)
class TVConv(nn.Module):
    """y[u] = sum over the window's taps j of taps_j[u] * x[u + j], each channel by itself.

    taps = g(places): convolutions of 3 taps, each but the last with a layer norm over channels and all places and a
    relu, on learned maps that begin as ones. They are for one grid, and depend on no input: outside training they are
    made once and kept for as long as the weights stay as they are. A file holds what makes them. In causal tasks the
    window ends at the token. It has no projections: policies leave it as it is.
    """

    def __init__(self, context: Context, *, kernel_size: int, maps: int, hidden: int, layers: int) -> None:
        super().__init__()
        axes, size = len(context.size), context.size
        self.causal, self.kernel_size = context.kind == "causal", kernel_size
        self.places = nn.Parameter(torch.ones(maps, *size))
        widths = [maps, *[hidden] * layers, hidden]
        self.convs = nn.ParameterList(
            torch.empty(after, before, *(3,) * axes) for before, after in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.LayerNorm((hidden, *size)) for _ in self.convs)
        # By channel and tap, so that a slice to fewer channels or a smaller window is one of this tensor.
        last = torch.empty(context.width * kernel_size**axes, hidden, *(3,) * axes)
        for weight in (*self.convs, last):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        self.last = nn.Parameter(last.unflatten(0, (context.width, *(kernel_size,) * axes)))
        self._kept: tuple[list[tuple[int, int]], Tensor] | None = None

    @property
    def slicing(self) -> dict[str, tuple[str, ...]]:
        """See `supernet.slicing_rules`."""
        axes = self.places.dim() - 1
        window = ("lead", *("center",) * axes, "lead", *("center",) * axes)
        return {"last": window}

    def _taps(self) -> Tensor:
        """(taps, *size, C), kept where nothing is learned."""
        if torch.is_grad_enabled() or tracing() or any(p.is_inference() for p in self.parameters()):
            return _generated(self.places, self.convs, self.norms, self.last)
        # What changes a tensor in place counts its version up; what replaces it changes where it lies.
        weights = [(p.data_ptr(), p._version) for p in self.parameters()]
        if self._kept is None or self._kept[0] != weights:
            with keeping():
                self._kept = weights, _generated(self.places, self.convs, self.norms, self.last)
        return self._kept[1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        taps = self._taps().to(x.dtype)
        y = torch.zeros_like(x)
        for tap, moved in zip(taps, shifted(x, self.kernel_size, causal=self.causal), strict=True):
            y = torch.addcmul(y, moved, tap)
        return y
