"""How much hypervolume an architecture is expected to add, and the scales on which metrics are modelled for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mixnas.search.study.pareto import boxes_above, non_dominated_minimised

MOST_BOXES = 4000
"""Of an improvement, for some hundred candidates."""

ROUGHLY = 1000
"""The same for some thousand."""

_MOST_POINTS = 600  # of a front of three objectives and more: each takes a step of Python to build the boxes


@dataclass(frozen=True, slots=True)
class Scale:
    """A minimised metric y as `shift + exp(centre + spread * u)`, u being what is modelled as normal.

    With a shift of 0 that is the logarithm of a time or a size. With one a little below the best value seen it draws
    what is near the best apart and what is bad together.
    """

    shift: float
    centre: float
    spread: float

    @classmethod
    def of(cls, values: np.ndarray, *, positive: bool, margin: float) -> Scale:
        """A scale on which these values (rows,) have mean 0 and deviation 1.

        Args:
            values: Minimised.
            positive: Whether they are sizes or times, whose logarithm is taken as it is.
            margin: Else, how far below the best the shift lies, as a share of the distance from there to the median.
        """
        best = float(values.min())
        apart = float(np.median(values)) - best
        if apart <= 0:
            apart = float(values.mean()) - best
        shift = 0.0 if positive else best - margin * (apart or max(abs(best), 1.0))
        logs = np.log(values - shift)
        spread = float(logs.std())
        return cls(shift, float(logs.mean()), spread if spread > 1e-9 else 1.0)

    def forward(self, values: np.ndarray) -> np.ndarray:
        """Minimised values to u; -inf at the shift and below."""
        with np.errstate(divide="ignore"):
            logs: np.ndarray = np.log(np.maximum(values - self.shift, 0.0))
        return (logs - self.centre) / self.spread

    def back(self, u: np.ndarray) -> np.ndarray:
        """u to minimised values."""
        found: np.ndarray = self.shift + np.exp(np.clip(self.centre + self.spread * u, -700, 700))
        return found

    def shortfall(self, bounds: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
        """Expected amount by which y lies below bounds, E[max(bound - y, 0)]: of a shifted log-normal, exact.

        Args:
            bounds: (num_bounds,), in minimised units; -inf gives 0.
            mean, deviation: Of u, (rows,).

        Returns:
            (rows, num_bounds).
        """
        from scipy.special import ndtr  # slow to import

        room = np.maximum(bounds - self.shift, 0.0)[None]
        mu = (self.centre + self.spread * mean)[:, None]
        sigma = np.clip(self.spread * deviation, 1e-9, 8.0)[:, None]
        with np.errstate(divide="ignore"):
            z = (np.log(room) - mu) / sigma
        found: np.ndarray = room * ndtr(z) - np.exp(np.minimum(mu + 0.5 * sigma * sigma, 600)) * ndtr(z - sigma)
        return np.maximum(found, 0.0)


def shortfall_of_known(bounds: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`Scale.shortfall` of values that are known exactly (rows,)."""
    return np.maximum(bounds[None] - values[:, None], 0.0)


class Improvement:
    """Expected hypervolume improvement of independent objectives, exact: a sum over the boxes that a point can add.

    Attributes:
        bounds: Of each objective, the distinct ends of the boxes, the first of them may be -inf.

    Args:
        front: Minimised points (num_points, num_objectives).
        reference: (num_objectives,).
        most: Boxes at most: of a large front of three objectives and more some points are left out, by chance.
    """

    def __init__(self, front: np.ndarray, reference: np.ndarray, most: int = MOST_BOXES) -> None:
        points = front[non_dominated_minimised(front)] if len(front) else front
        rng = np.random.default_rng(0)
        if points.shape[1] > 2 and len(points) > _MOST_POINTS:
            points = points[np.sort(rng.permutation(len(points))[:_MOST_POINTS])]
        while (boxes := boxes_above(points, reference, most if points.shape[1] > 2 else math.inf)) is None:
            points = points[np.sort(rng.permutation(len(points))[: len(points) * 2 // 3])]
        lower, upper = boxes
        self.bounds, self._ends, self._units = [], [], []
        for low, high in zip(lower.T, upper.T, strict=True):
            bounds, index = np.unique(np.concatenate([low, high]), return_inverse=True)
            self.bounds.append(bounds)
            span = float(np.ptp(bounds[np.isfinite(bounds)]))
            # a power of two, so that nothing is rounded: metrics of 1e200 would have an infinite product
            self._units.append(2.0 ** math.frexp(span)[1] if span > 0 else 1.0)
            self._ends.append(index.reshape(2, -1))

    @property
    def boxes(self) -> int:
        """Of how many boxes it is the sum."""
        return int(self._ends[0].shape[1])

    def __call__(self, shortfalls: list[np.ndarray]) -> np.ndarray:
        """(rows,) from each objective's expected shortfalls below its `bounds`, (rows, num_bounds); in no unit."""
        product = np.ones((len(shortfalls[0]), self.boxes))
        for shortfall, (low, high), unit in zip(shortfalls, self._ends, self._units, strict=True):
            product *= np.maximum(shortfall[:, high] - shortfall[:, low], 0.0) / unit
        return product.sum(axis=1)
