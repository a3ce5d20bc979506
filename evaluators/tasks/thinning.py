"""A task with fewer examples: the option `at_most` of every task, for a look at whether a search would go through."""

from __future__ import annotations

import torch
from torch import Tensor

from mixnas.evaluators.tasks.task import SPLITS, Examples, Split, Task
from mixnas.search_space.errors import ConfigError, shown

OPTION = "at_most"


class Thinned:
    """Some of a split's examples; see `Examples`.

    Args:
        split: Whose.
        places: (n,) int64, which.
    """

    def __init__(self, split: Examples, places: Tensor) -> None:
        self._split, self._places = split, places

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._places)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`."""
        return self._split.gather(self._places[indices])


def thinned(task: Task, at_most: int) -> Task:
    """The task itself, each of its splits with at most so many examples, evenly spaced over what was there.

    Raises:
        ConfigError: Not a whole number from 1.
    """
    if not isinstance(at_most, int) or isinstance(at_most, bool) or at_most < 1:
        raise ConfigError(f"task: {OPTION} is {shown(at_most)}, it must be a whole number from 1.")
    for name in SPLITS:
        split: Examples = getattr(task, name)
        if len(split) <= at_most:
            continue
        places = torch.arange(at_most) * len(split) // at_most
        fewer = Split(*split.gather(places)) if isinstance(split, Split) else Thinned(split, places)
        setattr(task, name, fewer)
    return task
