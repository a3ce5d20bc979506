"""What each operator's time is compared with: its oracle's own code where a library has it, else the plain composition.

A composition is the operator's formula as its authors write it, from torch's own functions and in the layout that they
use, with our module's weights: it must give our answer. `benchmarks/operators.py` times both, one after the other.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """Another way to compute an operator.

    Attributes:
        axis, name: The operator's.
        source: A library and its class, or "composition" and of what.
        first: Whether it takes channels first, as (B, C, ...).
        forward: `forward(module, x)`, with our module's weights. A gate acts on x itself.
        build: In place of the weights of ours: `build(module, x)` gives a module of a library with weights of its own.
        kinds: The kinds of task that it stands for.
    """

    axis: str
    name: str
    source: str
    first: bool
    forward: Forward | None = None
    build: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]] | None = None
    kinds: tuple[str, ...] = ("image", "sequence")


FORMS: list[Form] = []


def composition(
    name: str, what: str, *, axis: str = "mixer", first: bool = True, kinds: str = ""
) -> Callable[[Forward], Forward]:
    """Register a composition; see `Form`."""

    def decorate(forward: Forward) -> Forward:
        every = (kinds,) if kinds else ("image", "sequence")
        FORMS.append(Form(axis, name, f"composition: {what}", first, forward, kinds=every))
        return forward

    return decorate


def load() -> list[Form]:
    """All there are."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return FORMS


# -- pieces, channels first -------------------------------------------------------------------------------------------


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: object) -> Tensor:
    """torch's convolution of the input's dimensions."""
    return (F.conv2d if x.dim() == 4 else F.conv1d)(x, weight, bias, **options)  # type: ignore[operator, no-any-return]


def pointwise(x: Tensor, layer: nn.Module) -> Tensor:
    """A linear layer as a convolution of one tap."""
    return conv(x, layer.weight.view(*layer.weight.shape, *(1,) * (x.dim() - 2)), layer.bias)


def depthwise(x: Tensor, layer: nn.Module) -> Tensor:
    """A depthwise window that keeps the size."""
    return conv(x, layer.weight, layer.bias, padding=layer.padding, groups=x.shape[1])


def batch_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """A batch norm in evaluation."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def mean(x: Tensor) -> Tensor:
    """Of each channel, with the dimensions kept."""
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """A layer norm on channels last."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def heads(x: Tensor, layer: nn.Module, count: int) -> Tensor:
    """(B, N, C) tokens to (B, heads, N, d), projected."""
    return layer(x).view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def joined(y: Tensor) -> Tensor:
    """(B, heads, N, d) to (B, N, C)."""
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)
