"""Quantization policies of a block.

A policy is a module `policy(x, body)` that runs one residual branch in its arithmetic. `deploy(body)` turns the weights
inside into what is stored on the device, in place and without changing what the branch computes in evaluation;
`weight_bytes(body)` counts that storage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixnas.search_space.registry import Context, register

Body = Callable[[Tensor], Tensor]


@register("quant", "fp32", paper="IEEE 754-2019, binary32")
class FP32(nn.Module):
    """Single precision throughout."""

    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(self, x: Tensor, body: Body) -> Tensor:
        """Run `body` as it is."""
        return body(x)

    def deploy(self, body: nn.Module) -> None:
        """Nothing to do."""

    def weight_bytes(self, body: nn.Module) -> int:
        """Four bytes a weight."""
        return sum(p.numel() * p.element_size() for p in body.parameters())


@register("quant", "bf16", paper="Kalamkar et al. 2019, A Study of BFLOAT16 for Training (arXiv 1905.12322)")
class BF16(nn.Module):
    """Matrix products and convolutions in bfloat16, norms and the residual stream in float32 (autocast)."""

    _STORED = (nn.Linear, nn.Conv1d, nn.Conv2d)

    def __init__(self, context: Context) -> None:
        super().__init__()

    def forward(self, x: Tensor, body: Body) -> Tensor:
        """Run `body` under autocast; the result has the dtype of x."""
        if x.device.type == "meta":  # shapes only: there is no autocast to enter
            return body(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return body(x).to(x.dtype)

    def _stored(self, body: nn.Module) -> list[nn.Module]:
        return [m for m in body.modules() if isinstance(m, self._STORED)]

    def deploy(self, body: nn.Module) -> None:
        """Store the weights of projections and convolutions in bfloat16: autocast would round them the same way."""
        for module in self._stored(body):
            module.to(torch.bfloat16)

    def weight_bytes(self, body: nn.Module) -> int:
        """Two bytes for each weight of a projection or convolution, four for the others."""
        halves = {id(p) for module in self._stored(body) for p in module.parameters()}
        return sum(p.numel() * (2 if id(p) in halves else 4) for p in body.parameters())
