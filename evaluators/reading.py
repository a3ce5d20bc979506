"""Examples that are read while a network trains on those before: by processes of their own, where a split asks for it.

What is read depends on the numbers of the examples alone. Order and augmentation are decided in the process that
trains: a training is the same with workers and without, and goes on exactly where it was.
"""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mixnas.evaluators.tasks.task import Examples
from mixnas.search_space.errors import NasError

_log = logging.getLogger(__name__)

_AHEAD = 2  # parts that a worker has ready
_LATE = 0.1  # share of the time that may be spent on waiting before it is told of
_LOOKED_AT_S = 5.0  # so long a reading is watched before it is judged

Pair = tuple[Tensor, Tensor]


def workers_of(split: Examples) -> int:
    """How many processes a split is read by: what it says itself (`workers`), none of one that does not say.

    A process that may have none of its own (a share of a super-network's batches) reads by itself.
    """
    asked = getattr(split, "workers", 0)
    return 0 if multiprocessing.current_process().daemon else int(asked)


class Reader:
    """Gathers parts of a split, one after the other, and knows how long was waited for them.

    Args:
        split: Where examples are gathered from, on the CPU.
        workers: Processes that read ahead; 0 gathers when a part is asked for.

    Attributes:
        waited_s: Seconds for which the caller waited.
        seconds: Seconds since the first part of each reading was asked for.
    """

    def __init__(self, split: Examples, workers: int = 0) -> None:
        self._split, self._workers = split, workers
        self.waited_s = self.seconds = 0.0
        self._told = not hasattr(split, "workers")  # nothing could be done about it

    def parts(self, parts: Sequence[Tensor]) -> Iterator[Pair]:
        """Inputs and targets of each part, in order."""
        given = self._read(parts)
        while True:
            started = time.perf_counter()
            pair = next(given, None)
            waited = time.perf_counter() - started
            if pair is None:
                return
            self.waited_s += waited
            yield pair
            self.seconds += time.perf_counter() - started
            self._tell()

    def _read(self, parts: Sequence[Tensor]) -> Iterator[Pair]:
        if not self._workers or len(parts) < 2:
            for indices in parts:
                yield self._split.gather(indices)
            return
        loader = DataLoader(
            _Parts(self._split, parts),
            batch_size=None,
            num_workers=min(self._workers, len(parts)),
            prefetch_factor=_AHEAD,
            generator=torch.Generator(),  # else it draws a seed for the workers from the global one
        )
        for found in loader:
            if isinstance(found, NasError):
                raise found
            yield found

    def _tell(self) -> None:
        if not self._told and self.seconds > _LOOKED_AT_S and self.waited_s > _LATE * self.seconds:
            self._told = True
            _log.warning(
                "reading examples took %.0f%% of a training's time; give the task more workers, or more memory_gib to "
                "keep decoded ones in",
                100 * self.waited_s / self.seconds,
            )


class _Parts(Dataset[Pair | NasError]):
    """Parts by their number. An error is an answer: raised in a worker, it would come back as a text about workers."""

    def __init__(self, split: Examples, parts: Sequence[Tensor]) -> None:
        self._split, self._parts = split, parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> Pair | NasError:
        try:
            return self._split.gather(self._parts[number])
        except NasError as error:
            return error
