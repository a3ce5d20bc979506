"""Multi-objective successive halving: which of many trainings go on, and how many fit into the time of a few.

Candidates are trained in rungs. After each the best are trained on, and the others stay as they are. Best is by rank of
non-domination, and within a rank by how much hypervolume a point adds (Schmucker, Donini, Zafar, Salinas and Archambeau
2021, "Multi-objective Asynchronous Successive Halving", sections 3 and 4, with the contribution of SMS-EMOA in the
place of their epsilon-net: Beume, Naujoks and Emmerich 2007, section 2.2).

Nothing here trains or knows of networks: any engine may use it. What goes on depends on the points alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import moocore
import numpy as np

from mixnas.search_space.settings import Between

_MARGIN = 0.1  # of a rank's extent, by which the reference lies beyond its worst


def best_first(points: np.ndarray, most: int | None = None) -> list[int]:
    """The order of candidates, the best first: by rank of non-domination, then by contribution to the hypervolume.

    Within a rank the best of each objective come first, in the order of the objectives: what they add is unbounded, as
    there is no neighbour on their other side (as the crowding distance of NSGA-II has it: Deb, Pratap, Agarwal and
    Meyarivan 2002, section III-B). So whoever is most accurate, or quickest, goes on as long as anybody does. Of the
    rest the one that adds least to the others is last, then the one that adds least to those left, and so on. Equal
    points are of one rank, and add nothing to each other. The reference lies a tenth of the rank's extent beyond its
    worst.

    Args:
        points: (candidates, objectives), less is better in all. With a NaN a candidate is behind all others.
        most: So many are wanted; None for all. Those that are asked for are the first of all.

    Returns:
        Indices of `points`; of those that are alike in all this, the first comes first.
    """
    points = np.asarray(points, dtype=float)
    wanted = len(points) if most is None else most
    usable = np.flatnonzero(~np.isnan(points).any(axis=1))
    order: list[int] = []
    if len(usable):
        rank = _ranks(points[usable])
        for r in np.unique(rank):
            if len(order) >= wanted:
                break
            members = usable[rank == r]
            order += [int(members[i]) for i in _by_contribution(points[members])]
    if len(order) < wanted:
        order += [i for i in range(len(points)) if i not in set(usable.tolist())]
    return order[:wanted]


def _ranks(points: np.ndarray) -> np.ndarray:
    """(candidates,) from 0: how many fronts have to be taken away until none dominates it."""
    if points.shape[1] == 1:
        return np.unique(points[:, 0], return_inverse=True)[1].reshape(-1)
    return np.asarray(moocore.pareto_rank(points))


def _by_contribution(points: np.ndarray) -> list[int]:
    """Order of points of one rank (rows, objectives), the one that adds most first."""
    low, high = points.min(axis=0), points.max(axis=0)
    extent = np.where(high > low, high - low, 1.0)
    scaled = (points - low) / extent
    reference = np.full(points.shape[1], 1.0 + _MARGIN)
    ends = _ends(points)
    left, removed = list(range(len(points))), []
    while len(left) > len(ends):
        whole = _volume(scaled[left], reference)
        inner = [i for i in left if i not in ends]
        adds = [whole - _volume(scaled[[j for j in left if j != i]], reference) for i in inner]
        least = min(adds)
        # of equal ones the last goes: rounding of the volume decides nothing
        worst = max(i for i, added in zip(inner, adds, strict=True) if added <= least + 1e-12 * whole)
        left.remove(worst)
        removed.append(worst)
    return [*ends, *reversed(removed)]


def _ends(points: np.ndarray) -> list[int]:
    """The best of each objective, in the objectives' order; of equally good ones that which is best by the others."""
    columns = range(points.shape[1])
    found = [
        int(np.lexsort([points[:, c] for c in reversed([j, *(c for c in columns if c != j)])])[0]) for j in columns
    ]
    return list(dict.fromkeys(found))


def _volume(points: np.ndarray, reference: np.ndarray) -> float:
    if points.shape[1] == 1:
        return float(reference[0] - points.min())
    return float(moocore.hypervolume(points, ref=reference))


@dataclass(frozen=True, slots=True)
class Rung:
    """One stage of the trainings.

    Attributes:
        candidates: How many are trained in it.
        begun: Share of a whole training that they have behind them.
        until: Share that they have after it.
    """

    candidates: int
    begun: float
    until: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Halving:
    """How many are trained how far.

    Attributes:
        rungs: Stages; with 1 all are trained to the end.
        factor: By which the share of a training grows from rung to rung.
        keep: Share of the networks that could be trained to the end that are: the rest of the time goes to more
            candidates at first. The fewer are kept, the more are begun.
    """

    rungs: Annotated[int, Between(1, 10)] = 1
    factor: Annotated[float, Between(1.1, 100)] = 3.0
    keep: Annotated[float, Between(0.01, 1)] = 0.6

    def shares(self) -> list[float]:
        """The share of a whole training after each rung, the last of them 1."""
        return [self.factor ** (i + 1 - self.rungs) for i in range(self.rungs)]

    def ladder(self, networks: int, available: int | None = None) -> list[Rung]:
        """The rungs that take as long as training `networks` to the end.

        From the first rung to the last the number of candidates falls by the same factor each time.

        Args:
            networks: How many could be trained to the end instead.
            available: How many candidates there are at most. Where they are too few to spend the time on, more of them
                go on.
        """
        shares = self.shares()
        if self.rungs == 1:
            return [Rung(min(networks, available or networks), 0.0, 1.0)]
        steps = np.diff([0.0, *shares])
        most = available if available is not None else 10_000_000
        kept = max(1, round(self.keep * networks))
        counts = self._counts(kept, networks, steps, most)
        for last in range(kept + 1, networks + 1):
            more = self._counts(last, networks, steps, most)
            if more[0] < most:
                break
            counts = more
        counts = [min(count, most) for count in counts]
        return [Rung(count, begun, until) for count, begun, until in zip(counts, [0.0, *shares], shares, strict=False)]

    def _counts(self, last: int, networks: int, steps: np.ndarray, most: int) -> list[int]:
        """How many in each rung, so that it costs `networks` whole trainings at most and `last` are left in the end."""

        def counts(ratio: float) -> list[int]:
            found = [last]
            for i in range(1, self.rungs):
                found.append(max(found[-1], int(min(last * ratio**i, most))))
            return found[::-1]

        low, high = 1.0, float(most) + 1  # beyond what is asked for: the middle never comes to the end
        for _ in range(60):  # cost grows with the ratio
            middle = (low * high) ** 0.5
            if float(np.dot(counts(middle), steps)) <= networks + 1e-9:
                low = middle
            else:
                high = middle
        return counts(low)


def promoted(points: np.ndarray, count: int) -> list[int]:
    """Which of a rung's candidates go on, in their order.

    Args:
        points: See `best_first`.
        count: How many, at most.
    """
    return sorted(best_first(points, count))
