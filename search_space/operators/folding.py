"""Batch norms in inference form: folded into the layer before them (Jacob et al. 2018, arXiv 1712.05877, section 3.2).

An operator says which norm reads which layer's output, where nobody else reads it, as pairs of names of its own
submodules: `folds = (("norm", "conv"),)`. A layer that a policy has put something else in the place of keeps its norm:
what it stores was trained without the norm's factors.

What has a smaller form of its own in inference says how to take it: a method `merge()`, which does so in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mixnas.search_space.operators.layers import Conv, DepthwiseConv, Linear

_LAYERS = (Linear, Conv, DepthwiseConv, nn.Linear, nn.Conv1d, nn.Conv2d)


class Folded(nn.Module):
    """Where a batch norm was whose work the layer before does."""

    weight = None

    def forward(self, x: Tensor) -> Tensor:
        """x unchanged."""
        return x


def takes_norm(layer: nn.Module) -> bool:
    """Whether a layer is stored and computed as it stands, so that it can take a norm in."""
    # No policy takes the place of a depthwise window, whatever stride it has; of the others it puts a class of its own.
    stands = type(layer) in _LAYERS or isinstance(layer, DepthwiseConv)
    return stands and getattr(layer, "compute", None) is None


def declared(operator: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths of batch norms inside and of the layers that they read, whether or not these take them in."""
    for path, module in operator.named_modules():
        for pair in getattr(module, "folds", ()):
            norm, layer = (f"{path}.{name}" if path else name for name in pair)
            yield norm, layer


def foldable(operator: nn.Module) -> dict[str, str]:
    """The paths of the norms that can be folded as an operator stands, each with that of its layer."""
    return {
        norm: layer
        for norm, layer in declared(operator)
        if isinstance(operator.get_submodule(norm), nn.modules.batchnorm._BatchNorm)
        and takes_norm(operator.get_submodule(layer))
    }


def merges(operator: nn.Module) -> bool:
    """Whether anything inside has a form of its own in inference."""
    return any(hasattr(module, "merge") for module in operator.modules())


@torch.no_grad()
def merge(operator: nn.Module) -> nn.Module:
    """Put everything inside that has a form of its own in inference into it, in place; returns the operator."""
    for module in list(operator.modules()):
        take_form = getattr(module, "merge", None)
        if take_form is not None:
            take_form()
    return operator


@torch.no_grad()
def fold(operator: nn.Module) -> nn.Module:
    """Fold and merge what can be, in place; returns the operator, which computes the same but for rounding."""
    merge(operator)
    for norm_path, layer_path in foldable(operator).items():
        norm, layer = operator.get_submodule(norm_path), operator.get_submodule(layer_path)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        mean, variance = norm.running_mean, norm.running_var
        assert isinstance(layer.weight, Tensor) and mean is not None and variance is not None
        factor = (variance.double() + norm.eps).rsqrt() * norm.weight
        bias = layer.bias - mean if isinstance(layer.bias, Tensor) else -mean
        scaled = layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.weight = nn.Parameter(scaled.to(layer.weight.dtype), layer.weight.requires_grad)
        layer.bias = nn.Parameter((bias * factor + norm.bias).to(norm.bias.dtype), layer.weight.requires_grad)
        parent, _, name = norm_path.rpartition(".")
        setattr(operator.get_submodule(parent), name, Folded())
    return operator
