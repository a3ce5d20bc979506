"""What to measure: which units, and networks of every size.

Random choices give middling networks, and hardly ever the smallest or the largest. So networks are drawn that lean to
the choices that make them small or large, more or less, and from the nearest of them each is led to a size of its own:
one random choice after another is drawn anew, and kept unless it leads away. The sizes are spread evenly over the
space's range on a logarithmic scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mixnas.predictors.latency.model import Columns
from mixnas.predictors.latency.trees import Trees
from mixnas.predictors.latency.unit_rows import UnitRows
from mixnas.search_space.space import INACTIVE, SearchSpace

_POOL = 4000  # uniform networks to start from, and as many that lean
_LEAN = 50.0  # in standard deviations of the logarithm of the size, at most
_NEIGHBOURS = 8  # nearest networks that one of is started from
_SWEEPS = 25  # proposals per choice, at most
_TRIES = 400  # proposals, at most
_NEAR = 0.02  # of the target, on a logarithmic scale
_SCOUTS = 8

SizeOf = Callable[[np.ndarray], np.ndarray]


def sample_rows(units: UnitRows, count: int, rng: np.random.Generator) -> np.ndarray:
    """So many random rows of these units, in random order, in which every operator, policy and frame occurs."""
    order = rng.permutation(len(units))
    if len(units) <= count:
        return order
    # Of each the first few that there are; more than `count` only where there are more operators than that.
    each = max(1, count // (2 * sum(map(len, (units.frames, *units.slots)))))
    chosen = np.zeros(len(units), dtype=bool)
    for column in units.rows[order].T:
        by_value = np.argsort(column, kind="stable")
        values = column[by_value]
        rank = np.arange(len(values)) - np.searchsorted(values, values)
        chosen[by_value[rank < each]] = True
    rest = np.flatnonzero(~chosen)
    chosen[rest[: max(0, count - int(chosen.sum()))]] = True
    return order[chosen]


def cover(settings: Columns, count: int) -> np.ndarray:
    """Greedy choice of `count` rows such that rare settings occur often."""
    items = np.zeros(settings.values.shape, dtype=np.int64)
    start = 0
    for column, values in enumerate(settings.values.T):
        found, which = np.unique(values, return_inverse=True)
        items[:, column] = start + which
        start += len(found)
    there = settings.values != 0
    seen = np.zeros(start)
    left = np.ones(len(items), dtype=bool)
    chosen: list[int] = []
    for _ in range(min(count, len(items))):
        gain = ((1.0 / (1 + seen[items]) ** 2) * there).sum(axis=1)
        best = int(np.argmax(np.where(left, gain, -1.0)))
        left[best] = False
        chosen.append(best)
        seen[items[best][there[best]]] += 1
    return np.array(chosen, dtype=np.int64)


def disagreement(known: np.ndarray, target: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(candidates,) standard deviation between small models, each fitted on another part of what was measured.

    Args:
        known: (measured, columns).
        target: (measured,) logarithms of milliseconds.
        wanted: (candidates, columns).
    """
    votes = []
    for seed in range(4):
        rows = np.random.default_rng(seed).integers(0, len(target), len(target))
        trees = Trees.fit(known[rows], target[rows], num_trees=40, depth=3, rate=0.2, subsample=1.0, seed=seed)
        votes.append(trees.predict(wanted))
    return np.asarray(np.std(votes, axis=0))


def unit_sizes(found: np.ndarray) -> np.ndarray:
    """Sizes of units from their calls and multiply-accumulates (units, 2), each in those of the mean unit, added up.

    Operations decide what a small network takes, arithmetic a large.
    """
    return np.asarray((found / np.maximum(np.nanmean(found, axis=0), 1e-9)).sum(axis=1))


def largest_affordable(sizes: np.ndarray, seconds_each: float, count: int, seconds: float) -> float:
    """The size up to which so many random networks take no longer, in the mean, than there is time for.

    Args:
        sizes: Of random networks; NaN of those that cannot be built.
        seconds_each: What a network of size one takes.
        count: How many networks.
        seconds: For all of them.

    Returns:
        Infinity where networks of any size do; never less than the size below which a twentieth of them lie.
    """
    sizes = np.sort(sizes[np.isfinite(sizes)])
    if not len(sizes):
        return math.inf
    affordable = seconds_each * count * np.cumsum(sizes) / np.arange(1, len(sizes) + 1) <= seconds
    if affordable.all():
        return math.inf
    return float(sizes[max(int(affordable.sum()), math.ceil(0.05 * len(sizes))) - 1])


def draw_by_size(space: SearchSpace, size_of: SizeOf, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random networks whose sizes are spread evenly, on a logarithmic scale, from the smallest to the largest.

    Args:
        space: The space.
        size_of: Sizes (rows,) of encoded networks (rows, variables); NaN for one that cannot be built.
        count: How many.
        rng: Draws them.

    Returns:
        (count, variables) encoded networks; in a small space some are alike.
    """
    if not space.variables or count < 1:
        return space.sample_many(max(count, 0), rng)
    pool = _Pool.drawn(space, size_of, rng)
    _, low = pool.led(np.full(_SCOUTS, -math.inf), rng)
    _, high = pool.led(np.full(_SCOUTS, math.inf), rng)
    position = (rng.permutation(count) + rng.random(count)) / count
    found, _ = pool.led(low.min() + position * (high.max() - low.min()), rng)
    return found


@dataclass(frozen=True)
class _Pool:
    """Random networks of many sizes to start from.

    Attributes:
        space: Their space.
        size_of: See `draw_by_size`.
        values: (networks, variables), inactive choices made all the same.
        size: (networks,) logarithms of their sizes; NaN of those that cannot be built.
    """

    space: SearchSpace
    size_of: SizeOf
    values: np.ndarray
    size: np.ndarray

    @classmethod
    def drawn(cls, space: SearchSpace, size_of: SizeOf, rng: np.random.Generator) -> _Pool:
        """Half of them uniform; the others lean, each as strongly as it happens, to choices that make networks large or
        small in that half."""
        counts = np.array([len(variable.values) for variable in space.variables])
        first = rng.integers(0, counts, size=(_POOL, len(counts)))
        size = _measured(space, size_of, first)
        built = np.isfinite(size)
        active = space.active(first) & built[:, None]
        centred = np.where(built, size - size[built].mean(), 0.0) if built.any() else np.zeros(_POOL)
        scale = max(float(centred.std()), 1e-9)
        lean = _LEAN * rng.uniform(-1, 1, _POOL) ** 3
        second = np.empty_like(first)
        for v, count in enumerate(counts):
            chosen, weight = first[active[:, v], v], centred[active[:, v]]
            effect = np.bincount(chosen, weight, count) / np.maximum(np.bincount(chosen, minlength=count), 1) / scale
            # The largest of values with Gumbel noise is a draw by their exponentials.
            second[:, v] = (lean[:, None] * effect + rng.gumbel(size=(_POOL, count))).argmax(axis=1)
        values = np.concatenate([first, second])
        return cls(space, size_of, values, np.concatenate([size, _measured(space, size_of, second)]))

    def led(self, target: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Networks led to the targets (rows,), logarithms of sizes; they and the logarithms of their sizes."""
        counts = np.array([len(variable.values) for variable in self.space.variables])
        rows = np.arange(len(target))
        aim = np.clip(target, -1e6, 1e6)

        def distance_of(size: np.ndarray) -> np.ndarray:
            return np.where(np.isfinite(size), np.abs(size - aim), math.inf)

        away = np.abs(np.where(np.isfinite(self.size), self.size, math.inf) - aim[:, None])
        near = np.argpartition(away, _NEIGHBOURS, axis=1)[rows, rng.integers(0, _NEIGHBOURS, len(rows))]
        values, size = self.values[near].copy(), self.size[near]
        distance = distance_of(size)
        for _ in range(min(_SWEEPS * len(counts), _TRIES)):
            if (distance < _NEAR).all():
                break
            proposed = values.copy()
            # A choice that nothing hangs on yet would be drawn in vain.
            weight = rng.random(values.shape) * self.space.active(values)
            at = weight.argmax(axis=1)
            proposed[rows, at] = rng.integers(0, counts[at])
            new_size = _measured(self.space, self.size_of, proposed)
            new_distance = distance_of(new_size)
            better = (new_distance <= distance) & (distance >= _NEAR)
            values[better], size[better], distance[better] = proposed[better], new_size[better], new_distance[better]
        return np.where(self.space.active(values), values, INACTIVE), size


def _measured(space: SearchSpace, size_of: SizeOf, values: np.ndarray) -> np.ndarray:
    """Logarithms of sizes; NaN of what cannot be built."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(size_of(np.where(space.active(values), values, INACTIVE))))
