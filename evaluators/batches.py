"""Batches of a split, wherever its examples come from: in memory, or read or computed when they are asked for.

Candidates are tiny, so a step's time is mostly Python and launches: an epoch is one permutation, examples are gathered
and augmented many batches at a time, and a split in memory lies on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from mixnas.evaluators.reading import Reader, workers_of
from mixnas.evaluators.tasks.task import Examples, Split

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""See `Task.augment`."""

_GATHERED_VALUES = 1 << 20  # so many input values are gathered and augmented at once: few calls, little memory


def gather(split: Examples, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Examples of a split, brought to a device.

    Args:
        split: Wherever it is.
        indices: (n,).
        device: Where to.
    """
    inputs, targets = split.gather(indices.cpu())
    return inputs.to(device), targets.to(device)


def in_order(split: Examples, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All examples of a split, `size` at a time; the last batch may be smaller."""
    for inputs, targets in Reader(split, workers_of(split)).parts(torch.arange(len(split)).split(size)):
        yield inputs.to(device), targets.to(device)


class Batches:
    """Full batches of a split for training, in random order.

    Args:
        split: Tensors in memory are moved to the device once.
        size: Examples a batch; all of a smaller split.
        augment: Applied to what is gathered; None for none.
        device: Where the batches are.

    Attributes:
        size: Examples a batch.
        per_epoch: Batches an epoch; an incomplete last one is left out.
    """

    def __init__(self, split: Examples, size: int, augment: Augment | None, device: torch.device) -> None:
        self._split = split.to(device) if isinstance(split, Split) else split
        self._augment = augment
        self._device = device
        self._reader = Reader(split, workers_of(split))
        self.size = min(size, len(split))
        self.per_epoch = len(split) // self.size
        example, _ = self._gather(torch.zeros(1, dtype=torch.int64, device=device))
        self._at_once = max(1, _GATHERED_VALUES // (self.size * example.numel()))

    def _gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self._split, Split):
            return self._split.gather(indices)
        return gather(self._split, indices, self._device)

    def _gathered(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self._split, Split):
            yield from (self._split.gather(indices) for indices in parts)
            return
        for inputs, targets in self._reader.parts([indices.cpu() for indices in parts]):
            yield inputs.to(self._device), targets.to(self._device)

    def epoch(
        self, generator: torch.Generator, *, skip: int = 0, seed_of: Callable[[int], int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch.

        Args:
            generator: On the device; source of the order of examples and of the augmentation.
            skip: Batches at the beginning that are not wanted, though drawn as if they were.
            seed_of: Seed of the augmentation by the number of the part, from 1, where an epoch is gathered in several
                parts. With it, skipped parts are not gathered at all; without, the generator goes on from part to part.
        """
        order = torch.randperm(len(self._split), generator=generator, device=self._device)
        parts = order[: self.per_epoch * self.size].split(self._at_once * self.size)
        first = 0 if seed_of is None else min(skip // self._at_once, len(parts))
        for part, (x, y) in enumerate(self._gathered(parts[first:]), start=first):
            unwanted = skip - part * self._at_once
            if seed_of is not None and part:
                generator.manual_seed(seed_of(part))
            if self._augment is not None:
                x, y = self._augment(x, y, generator)
            batches = zip(x.split(self.size), y.split(self.size), strict=True)
            yield from islice(batches, max(0, unwanted), None)

    def forever(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Epoch after epoch."""
        while True:
            yield from self.epoch(generator)
