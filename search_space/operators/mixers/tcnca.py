"""Temporal convolution with chunked attention: what is far comes by dilated windows, what is near by attention."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Linear, window_conv
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "tcnca",
    kinds=("sequence", "causal"),
    paper="Terzic et al. 2023, TCNCA: Temporal Convolution Network with Chunked Attention for Scalable Sequence "
    "Processing (arXiv 2312.05605); gates of Ma et al. 2023, MEGA (arXiv 2209.10655), section 3",
    knobs={
        "kernel_size": Knob(5, choices=(3, 5, 9, 17)),
        "dilation": Knob(2, choices=(2, 3, 4), doc="factor between one window's dilation and the next one's"),
        "depth": Knob(3, choices=(1, 2, 3, 4), doc="windows, one on the other"),
        "chunk": Knob(64, low=1, high=4096, doc="tokens that attend to each other"),
    },
    one_length=True,
)
class TCNCA(nn.Module):
    """update * (silu(carry(z) + out(silu(reset(z)) * a)) - x), z = silu(windows(x) + skip x), update = sigmoid of z.

    The windows are depthwise, of dilation 1, d, d^2, ..., in the place of MEGA's moving average: tokens up to
    (k - 1)(1 + d + ...) away. a is attention inside chunks, of one head, with a learned bias for each distance; queries
    and keys are silu(shared(z)), C / 4 wide, times and plus vectors of their own, values silu(value(x)). MEGA's layer
    adds (1 - update) x, which is this and the branch's own x.

    No code of the authors is public: that the windows are depthwise, without a function between them, and the sizes
    inside are a reading of their text.
    """

    slicing: ClassVar = {"distance": ("center",)}

    def __init__(self, context: Context, *, kernel_size: int, dilation: int, depth: int, chunk: int) -> None:
        super().__init__()
        width, inside = context.width, max(1, context.width // 4)
        self.causal, self.dilation, self.chunk = context.kind == "causal", dilation, min(chunk, context.tokens)
        self.windows = nn.ParameterList(torch.empty(width, 1, kernel_size) for _ in range(depth))
        for window in self.windows:
            nn.init.kaiming_uniform_(window, a=5**0.5)
        self.skip = nn.Parameter(torch.ones(width))
        self.shared, self.value = Linear(width, inside), Linear(width, width)
        self.scales, self.offsets = nn.Parameter(0.02 * torch.randn(2, inside)), nn.Parameter(torch.zeros(2, inside))
        self.reset, self.update, self.carry = (Linear(width, width) for _ in range(3))
        self.out = Linear(width, width, bias=False)
        self.distance = nn.Parameter(torch.zeros(2 * self.chunk - 1))

    def _mask(self, chunk: int, tokens: int) -> Tensor:
        """(chunks, chunk, chunk), or one for all: what is added to the logits, -inf where nobody may look."""
        place = torch.arange(chunk, device=self.distance.device)
        mask = self.distance[place.unsqueeze(1) - place + len(self.distance) // 2].unsqueeze(0)
        if self.causal:
            return mask.masked_fill(place > place.unsqueeze(1), float("-inf"))
        if tokens % chunk == 0:
            return mask
        outside = torch.arange(-(-tokens // chunk) * chunk, device=place.device).view(-1, 1, chunk) >= tokens
        return mask.masked_fill(outside, float("-inf"))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = v.shape[1]
        chunk = min(self.chunk, tokens)
        q, k, v = (F.pad(t, (0, 0, 0, -tokens % chunk)).unflatten(1, (-1, chunk)) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(chunk, tokens).to(q.dtype))
        return y.flatten(1, 2)[:, :tokens]

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to the same."""
        z = x
        for i, window in enumerate(self.windows):
            z = window_conv(z, window, causal=self.causal, dilation=self.dilation**i, groups=x.shape[-1])
        z = F.silu(z + self.skip * x)
        shared = F.silu(self.shared(z))
        q, k = (shared * scale + offset for scale, offset in zip(self.scales, self.offsets, strict=True))
        v = F.silu(self.value(x))
        read = F.silu(self.reset(z)) * self._attended(q.to(v.dtype), k.to(v.dtype), v)
        candidate = F.silu(self.carry(z) + self.out(read))
        return (self.update(z).sigmoid() * (candidate - x)).contiguous()
