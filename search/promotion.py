"""Asynchronous successive halving: whose training goes on, of those that were left off, while others are begun.

A rung is a share of a whole training. Whenever a worker is free, the topmost rung is looked for in which somebody is
among the best `1 / factor` of all that came so far and was not trained on yet; where there is nobody, another training
is begun. Nobody waits for a rung to be full (Li, Jamieson, Rostamizadeh, Gonina, Hardt, Recht and Talwalkar 2020, "A
System for Massively Parallel Hyperparameter Tuning", section 3.2 and algorithm 2). Best is as `halving.best_first` has
it (Schmucker, Donini, Zafar, Salinas and Archambeau 2021, "Multi-objective Asynchronous Successive Halving").

Nothing here trains or knows of networks, and what is decided depends on what was found alone, not on its order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from mixnas.search.halving import best_first
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.settings import Between


@dataclass(frozen=True, kw_only=True, slots=True)
class Asynchronous:
    """In which rungs a search trains. Off with one rung, and neither epochs nor steps of the first.

    Attributes:
        rungs: How many, the last being the whole training.
        factor: By which the share of a training grows from rung to rung; one in so many goes on.
        epochs: Of the first rung, which then says how many there are.
        steps: Likewise, in steps.
    """

    rungs: Annotated[int, Between(1, 20)] = 1
    factor: Annotated[float, Between(1.1, 100)] = 3.0
    epochs: Annotated[int, Between(1)] | None = None
    steps: Annotated[int, Between(1)] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("epochs", "steps") if getattr(self, name) is not None]
        given += ["rungs"] if self.rungs > 1 else []
        if len(given) > 1:
            raise ConfigError(f"search.halving: {' and '.join(given)} say where the first rung is. Give one of them.")

    @property
    def on(self) -> bool:
        """Whether there is more than one rung."""
        return self.rungs > 1 or self.epochs is not None or self.steps is not None

    def shares(self, steps: int, per_epoch: int) -> tuple[float, ...]:
        """The share of a whole training after each rung, the last of them 1; each is a whole number of steps.

        Args:
            steps: Of a whole training.
            per_epoch: Steps of an epoch.

        Raises:
            ConfigError: A rung would have no step of its own.
        """
        first = self.steps if self.epochs is None else self.epochs * per_epoch
        if first is None:
            ends = [round(steps * self.factor ** (i + 1 - self.rungs)) for i in range(self.rungs)]
        else:
            count = max(0, math.ceil(math.log(steps / first, self.factor) - 1e-9))
            ends = [round(first * self.factor**i) for i in range(count)] + [steps]
        if min(np.diff([0, *ends])) < 1 or len(ends) < 2:
            raise ConfigError(
                f"search.halving: a training has {steps} steps, and the rungs would end after "
                f"{', '.join(map(str, ends))}. Have fewer rungs or a smaller factor, or begin earlier."
            )
        return tuple(end / steps for end in ends)

    def effort(self, shares: Sequence[float]) -> float:
        """Whole trainings that a trial costs, where one in `factor` goes on from each rung; more do, early on.

        Args:
            shares: After each rung.
        """
        return sum((b - a) / self.factor**i for i, (a, b) in enumerate(zip((0.0, *shares), shares, strict=False)))


class Rungs:
    """See the module.

    Args:
        count: Rungs.
        factor: One in so many goes on.
    """

    def __init__(self, count: int, factor: float) -> None:
        self._factor = factor
        self._found: list[dict[int, tuple[np.ndarray, float]]] = [{} for _ in range(count)]
        self._gone: list[set[int]] = [set() for _ in range(count)]
        self._best: dict[int, tuple[int, list[int]]] = {}  # by rung: of how many, and who they are

    def add(self, key: int, rung: int, point: np.ndarray, missed: float = 0.0) -> None:
        """What was found of one after a rung.

        Args:
            key: Says which; of those that are equally good, the lowest comes first.
            rung: From 0.
            point: (objectives,), less is better in all.
            missed: By how much it breaks the constraint that it breaks most; 0 where it keeps all.
        """
        self._found[rung][key] = np.asarray(point, dtype=float), missed
        self._best.pop(rung, None)

    def promote(self, key: int, rung: int) -> None:
        """Note that one goes on from a rung."""
        self._gone[rung].add(key)

    def drop(self, key: int, rung: int) -> None:
        """Note that one could not go on from a rung: it is as if it had never come there."""
        self._found[rung].pop(key, None)
        self._best.pop(rung, None)

    def promotable(self, *, last: bool = False) -> tuple[int, int] | None:
        """Who goes on now, and from which rung; None where another training is to be begun.

        Args:
            last: Whether none will be begun any more, and none is in flight: each rung then sends at least one on.
        """
        for rung in range(len(self._found) - 2, -1, -1):
            there = len(self._found[rung])
            count = math.floor(there / self._factor + 1e-9)
            if last:
                count = max(count, min(1, there))
            for key in self._best_of(rung, count):
                if key not in self._gone[rung]:
                    return key, rung
        return None

    def _best_of(self, rung: int, count: int) -> list[int]:
        known = self._best.get(rung)
        if known is None or known[0] != count:
            known = self._best[rung] = count, best_keys(self._found[rung], count)
        return known[1]


def best_keys(found: dict[int, tuple[np.ndarray, float]], count: int) -> list[int]:
    """The best of these: those that keep all constraints by `best_first`, then those that miss them by least.

    Args:
        found: By key: point and how much a constraint is missed by, see `Rungs.add`.
        count: At most so many.
    """
    keys: Sequence[int] = sorted(found)
    keeping = [key for key in keys if found[key][1] <= 0]
    breaking = sorted((key for key in keys if found[key][1] > 0), key=lambda key: found[key][1])
    if not count:
        return []
    best = best_first(np.stack([found[key][0] for key in keeping]), count) if keeping else []
    return [*(keeping[i] for i in best), *breaking][:count]
