"""Losses that an operator adds to the task's while it is trained, such as the balance of a mixture's experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_LOSSES: ContextVar[list[Tensor] | None] = ContextVar("_LOSSES", default=None)


def add_loss(loss: Tensor) -> None:
    """Take a number into account, if whoever runs the network asked for it; otherwise it is forgotten."""
    losses = _LOSSES.get()
    if losses is not None:
        losses.append(loss)


@contextmanager
def collected() -> Iterator[list[Tensor]]:
    """What operators add inside: a list that fills as they run. Theirs is added to the loss that is minimised.

    Examples:
        >>> import torch
        >>> with collected() as losses:
        ...     add_loss(torch.ones(()))
        >>> float(sum(losses))
        1.0
    """
    losses: list[Tensor] = []
    token = _LOSSES.set(losses)
    try:
        yield losses
    finally:
        _LOSSES.reset(token)
