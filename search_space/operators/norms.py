"""Normalisation over channels. A norm takes its context and works on (..., C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixnas.kernels.norm import layer_norm, rms_norm
from mixnas.search_space.registry import Context, register


@register("norm", "layer", paper="Ba et al. 2016, Layer Normalization (arXiv 1607.06450)")
class LayerNorm(nn.LayerNorm):
    """Layer normalisation per token, eps 1e-6."""

    def __init__(self, context: Context) -> None:
        super().__init__(context.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return layer_norm(x, self.weight, self.bias, self.eps)


@register("norm", "rms", paper="Zhang and Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467)")
class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation per token, eps 1e-6."""

    def __init__(self, context: Context) -> None:
        super().__init__(context.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return rms_norm(x, self.weight, 1e-6)


# Statistics over the batch and all positions would let a position see later ones: not for causal tasks.
@register(
    "norm",
    "batch",
    kinds=("image", "sequence"),
    paper="Ioffe and Szegedy 2015, Batch Normalization (arXiv 1502.03167)",
)
class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over batch and positions; running statistics in evaluation."""

    def __init__(self, context: Context) -> None:
        super().__init__(context.width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


def norms_with_running_statistics(module: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    """The norms inside that keep statistics, which belong to the weights that they were collected with."""
    found = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    return [m for m in found if m.running_mean is not None]


def has_running_statistics(module: nn.Module) -> bool:
    """Whether any norm inside keeps statistics that depend on the weights used to collect them."""
    return bool(norms_with_running_statistics(module))


@torch.no_grad()
def reset_running_statistics(module: nn.Module) -> None:
    """Forget running statistics, and average the coming batches with equal weight until the next reset."""
    for norm in norms_with_running_statistics(module):
        norm.reset_running_stats()
        norm.momentum = None
