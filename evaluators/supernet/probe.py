"""A linear probe: the last layer of a sub-network, fitted to training examples before the sub-network is judged.

The last layer of a super-network serves the features of every sub-network and suits those best that are trained in
every step. A linear probe (Alain and Bengio 2016, arXiv 1610.01644) judges the features themselves, as statistics of
batch norms are judged recalibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Steps of L-BFGS, and the price of leaving the inherited weights (times the squared distance). On 96 architectures, 8
# steps, and a price from 3e-3 to 0.1, ranked alike.
_STEPS = 15
_STAY = 1e-2


class LinearHead(Protocol):
    """A head whose last layer is linear."""

    linear: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """What the linear layer reads."""


def ends_linearly(head: object) -> TypeGuard[LinearHead]:
    """Whether a head can be probed."""
    return callable(getattr(head, "features", None)) and isinstance(getattr(head, "linear", None), nn.Linear)


def fitted(
    linear: nn.Linear, features: Sequence[Tensor], targets: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The layer that answers best for examples, close to the one given, which is left as it is.

    Args:
        linear: Where to start from.
        features: Of the examples that it is to be fitted to, each part (n, ..., C).
        targets: Theirs.
        loss_of: What is minimised, of outputs and targets.

    Returns:
        Outputs of features.
    """
    x = torch.cat(list(features))
    inherited = [tensor.detach() for tensor in (linear.weight, linear.bias) if tensor is not None]
    layer = [tensor.clone().requires_grad_() for tensor in inherited]
    optimizer = torch.optim.LBFGS(layer, max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(F.linear(x, *layer), targets)
        loss = loss + _STAY * (layer[0] - inherited[0]).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda read: F.linear(read, *layer)
