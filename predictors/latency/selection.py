"""Drawing networks of every size: random choices give middling networks, and hardly ever the smallest or the largest.

Each network starts as a random one and is led to a size of its own, and the sizes are spread evenly over the space's
range on a logarithmic scale: one random choice after another is drawn anew, and kept unless it leads away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mixnas.search_space.space import INACTIVE, SearchSpace

_SWEEPS = 25  # proposals per choice, at most
_NEAR = 0.02  # of the target, on a logarithmic scale
_SCOUTS = 8

SizeOf = Callable[[np.ndarray], np.ndarray]


def unit_sizes(works: Sequence[Mapping[str, float] | None]) -> np.ndarray:
    """Operations and multiply-accumulates of units, each in those of the mean unit; NaN where one cannot be built.

    Operations that only change a view do not count. Operations decide what a small network takes, arithmetic a large.
    """
    sizes = np.full((len(works), 2), np.nan)
    for row, work in enumerate(works):
        if work is not None:
            calls = sum(v for name, v in work.items() if name.endswith(".calls") and name != "view.calls")
            macs = sum(v for name, v in work.items() if name.endswith(".macs") and ".rounds." not in name)
            sizes[row] = calls, macs
    return np.asarray((sizes / np.maximum(np.nanmean(sizes, axis=0), 1e-9)).sum(axis=1))


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
    _, low = _lead(space, size_of, np.full(_SCOUTS, -math.inf), rng)
    _, high = _lead(space, size_of, np.full(_SCOUTS, math.inf), rng)
    position = (rng.permutation(count) + rng.random(count)) / count
    found, _ = _lead(space, size_of, low.min() + position * (high.max() - low.min()), rng)
    return found


def _lead(
    space: SearchSpace, size_of: SizeOf, target: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random networks led to the targets (rows,), logarithms of sizes; they and the logarithms of their sizes."""
    counts = np.array([len(variable.values) for variable in space.variables])
    rows = np.arange(len(target))
    aim = np.clip(target, -1e6, 1e6)

    def measured(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            size = np.log(size_of(np.where(space.active(values), values, INACTIVE)))
        return size, np.where(np.isfinite(size), np.abs(size - aim), math.inf)

    values = rng.integers(0, counts, size=(len(target), len(counts)))
    size, distance = measured(values)
    for _ in range(_SWEEPS * len(counts)):
        if (distance < _NEAR).all():
            break
        proposed = values.copy()
        # A choice that nothing hangs on yet would be drawn in vain.
        weight = rng.random(values.shape) * space.active(values)
        at = weight.argmax(axis=1)
        proposed[rows, at] = rng.integers(0, counts[at])
        new_size, new_distance = measured(proposed)
        better = (new_distance <= distance) & (distance >= _NEAR)
        values[better], size[better], distance[better] = proposed[better], new_size[better], new_distance[better]
    return np.where(space.active(values), values, INACTIVE), size
