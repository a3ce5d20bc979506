"""Pareto front, hypervolume and knee of sets of objective vectors with mixed directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import moocore
import numpy as np

from mixnas.search.study.objectives import Objective

REFERENCE_TRIALS = 10


def as_minimised(values: np.ndarray, objectives: Sequence[Objective]) -> np.ndarray:
    """Values (num_points, num_objectives) with the sign of maximised objectives flipped: less is better everywhere."""
    array = np.asarray(values, dtype=np.float64).reshape(-1, len(objectives))
    return array * np.array([-1.0 if o.maximise else 1.0 for o in objectives])


def non_dominated(values: np.ndarray, objectives: Sequence[Objective]) -> np.ndarray:
    """Which points are on the Pareto front.

    Args:
        values: Objective values (num_points, num_objectives). A point with NaN is never a member, and dominates none.
        objectives: Their directions.

    Returns:
        Boolean mask (num_points,). Of points with equal values the first is a member and the others are not.
    """
    return non_dominated_minimised(as_minimised(values, objectives))


def non_dominated_minimised(points: np.ndarray) -> np.ndarray:
    """`non_dominated` of points (num_points, num_objectives) of which less is better in all objectives."""
    mask = ~np.isnan(points).any(axis=1)
    if not mask.any():
        return mask
    if points.shape[1] == 1:
        return np.arange(len(points)) == int(np.nanargmin(points[:, 0]))
    mask[mask] = moocore.is_nondominated(points[mask])
    return mask


def boxes_above(
    front: np.ndarray, reference: np.ndarray, most: float = math.inf
) -> tuple[np.ndarray, np.ndarray] | None:
    """Disjoint boxes that together are what a new point can add: not dominated by the front, within the reference.

    Local upper bounds, each with the points that define it (Lacour, Klamroth and Fonseca 2017, "A box decomposition
    algorithm to compute the hypervolume indicator", sections 3 and 4).

    Args:
        front: Points (num_points, num_objectives), less is better in all; they may dominate each other.
        reference: (num_objectives,).
        most: Boxes at most.

    Returns:
        Lower corners, -inf where a box is open, and upper corners, each (num_boxes, num_objectives); None as soon as
        there are more than `most`: of four objectives and hundreds of points there may be millions.
    """
    dimensions = len(reference)
    points = front[(front < reference).all(axis=1)]
    points = points[non_dominated_minimised(points)]
    upper = reference[None].astype(float)
    defining = np.full((1, dimensions, dimensions), -np.inf)  # of each bound, a point for each objective
    defining[0, np.arange(dimensions), np.arange(dimensions)] = reference
    for point in points[np.argsort(points[:, 0], kind="stable")]:
        inside = (point < upper).all(axis=1)
        new_upper, new_defining = [upper[~inside]], [defining[~inside]]
        bounds, definers = upper[inside], defining[inside]
        for j in range(dimensions):
            others = np.delete(definers[:, :, j], j, axis=1)
            here = point[j] >= others.max(axis=1) if dimensions > 1 else np.ones(len(bounds), dtype=bool)
            moved, moved_definers = bounds[here].copy(), definers[here].copy()
            moved[:, j] = point[j]
            moved_definers[:, j] = point
            new_upper.append(moved)
            new_defining.append(moved_definers)
        upper, defining = np.concatenate(new_upper), np.concatenate(new_defining)
        if len(upper) > most:
            return None
    lower = np.full_like(upper, -np.inf)
    for j in range(1, dimensions):
        lower[:, j] = defining[:, :j, j].max(axis=1)
    real = (lower < upper).all(axis=1)
    return lower[real], upper[real]


@dataclass(frozen=True, slots=True)
class Reference:
    """The box that hypervolume is measured in, fixed once for a whole run.

    The rule: of the first `REFERENCE_TRIALS` finished trials, feasible or not, take the worst and the best value of
    each objective; the reference point is the worst, moved away from the best by a tenth of the distance between
    them, and the distance from there to the best is the unit of length. Hypervolume is then free of the objectives'
    units; a run starts somewhere below 1 and may pass 1, because later trials can be better than the best of the
    first. A point that is worse than the reference point in any objective adds nothing. Since the box depends on
    nothing that happens later, the number can only grow within a run; it is stored with the study.

    Attributes:
        point: The reference point, in the objectives' own units and directions (num_objectives,).
        span: Length of one unit per objective, positive (num_objectives,).
    """

    point: tuple[float, ...]
    span: tuple[float, ...]

    @classmethod
    def of(cls, values: np.ndarray, objectives: Sequence[Objective]) -> Reference:
        """Fix the box by these values (num_points >= 1, num_objectives)."""
        points = as_minimised(values, objectives)
        worst, best = points.max(axis=0), points.min(axis=0)
        # an objective that does not vary gets a box of its own size, so that it cancels out instead of dividing by 0
        margin = np.where(worst > best, 0.1 * (worst - best), np.maximum(np.abs(worst), 1.0))
        point = as_minimised(worst + margin, objectives)[0] + 0.0  # -0 is 0
        return cls(tuple(point.tolist()), tuple((worst + margin - best).tolist()))

    def hypervolume(self, values: np.ndarray, objectives: Sequence[Objective]) -> float:
        """Hypervolume (no unit) of a set of points (num_points, num_objectives); 0 of none."""
        points = as_minimised(values, objectives)
        if not len(points):
            return 0.0
        scaled = (points - as_minimised(np.array(self.point), objectives)) / np.array(self.span)
        scaled = scaled[(scaled < 0).all(axis=1)]
        if not len(scaled):
            return 0.0
        return float(moocore.hypervolume(scaled, ref=np.zeros(len(objectives))))


def knee(values: np.ndarray, objectives: Sequence[Objective]) -> int:
    """Index of the front's knee: the point nearest to the ideal one.

    Each objective is scaled to 0 (the best on the front) to 1 (the worst on it), the distance is Euclidean, and of
    equally near points the first is taken.

    Args:
        values: The front (num_points >= 1, num_objectives).
        objectives: Their directions.
    """
    points = as_minimised(values, objectives)
    best, worst = points.min(axis=0), points.max(axis=0)
    scaled = (points - best) / np.where(worst > best, worst - best, 1.0)
    return int(np.argmin((scaled**2).sum(axis=1)))
