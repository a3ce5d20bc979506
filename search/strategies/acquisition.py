"""How much hypervolume an architecture is expected to add, and the scales on which metrics are modelled for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixnas.search.study.pareto import boxes_above, non_dominated_minimised

_MOST_BOXES = 4000


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
    """

    def __init__(self, front: np.ndarray, reference: np.ndarray) -> None:
        points = front[non_dominated_minimised(front)] if len(front) else front
        lower, upper = boxes_above(points, reference)
        rng = np.random.default_rng(0)
        while len(lower) > _MOST_BOXES and len(points) > 4:  # of many objectives: a front that is thinned out
            points = points[np.sort(rng.permutation(len(points))[: len(points) * 2 // 3])]
            lower, upper = boxes_above(points, reference)
        self.bounds, self._ends = [], []
        for low, high in zip(lower.T, upper.T, strict=True):
            bounds, index = np.unique(np.concatenate([low, high]), return_inverse=True)
            self.bounds.append(bounds)
            self._ends.append(index.reshape(2, -1))

    def __call__(self, shortfalls: list[np.ndarray]) -> np.ndarray:
        """(rows,) from each objective's expected shortfalls below its `bounds`, (rows, num_bounds)."""
        product = np.ones((len(shortfalls[0]), self._ends[0].shape[1]))
        for shortfall, (low, high) in zip(shortfalls, self._ends, strict=True):
            product *= np.maximum(shortfall[:, high] - shortfall[:, low], 0.0)
        return product.sum(axis=1)
