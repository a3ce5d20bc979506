"""Whether architectures of a space keep constraints on what is known of them without evaluating: looking for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from mixnas.search.strategies.drawing import crossed, distinct, mutated
from mixnas.search.study.objectives import Comparison
from mixnas.search_space.cost import METRICS, cost
from mixnas.search_space.enumeration import weighted_corner
from mixnas.search_space.errors import counted
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

Known = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Metrics, each (rows,), of encoded architectures (rows, variables)."""

Taken = Callable[[np.ndarray], bool]
"""Whether an encoded architecture (variables,) that keeps the constraints is not wanted all the same."""

_LISTED = 20_000  # spaces up to this size are looked at to the last architecture
_DRAWN = 4096
_KEPT = 64  # of a generation
_GENERATIONS = 40
_CUTS = 30


@dataclass(frozen=True)
class Nearest:
    """The architecture that comes nearest to keeping constraints.

    Attributes:
        vector: Encoded.
        values: Of the metrics that the constraints are on.
        kept: Whether it keeps them all, and is wanted.
        looked_at: Architectures that were looked at.
        every: Whether that was the whole space.
    """

    vector: np.ndarray
    values: Mapping[str, float]
    kept: bool
    looked_at: int
    every: bool

    def told(self, space: SearchSpace, constraints: Sequence[Comparison]) -> str:
        """Why there is none, as far as is known: how many were looked at, the nearest, its values, and what to do."""
        number = counted(self.looked_at, "architecture")
        looked_at = f"of all {number} of the space" if self.every else f"of {number} that were looked at"
        together = " together" if len(constraints) > 1 else ""
        return f"{looked_at} none meets {', '.join(map(str, constraints))}{together}: {self.words(space, constraints)}"

    def words(self, space: SearchSpace, constraints: Sequence[Comparison]) -> str:
        """Which it is, its values, and what to do."""
        values = ", ".join(
            f"{name} {_number(self.values[name])}" for name in dict.fromkeys(c.metric for c in constraints)
        )
        architecture = space.decode(self.vector)
        return f"the nearest has {values}: {architecture}. Change a bound to what that has, or widen the space."


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def nearest(
    space: SearchSpace, known: Known, constraints: Sequence[Comparison], first: np.ndarray, taken: Taken | None = None
) -> Nearest:
    """Look for an architecture that keeps constraints: at every one of a small space; else by evolution.

    Evolution goes by the sum of what is missed of each constraint, as a share of its bound; the neighbours of the best
    are all looked at in each generation, so that it ends where no single choice comes nearer.

    Args:
        space: Where.
        known: Gives the constraints' metrics.
        constraints: At least one.
        first: Encoded architectures to begin with (rows, variables): where one of these keeps them, that is all.
        taken: Asked of those that keep them, one after the other until one is wanted; None where all are.
    """
    looked_at = 0

    def judged(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far rows are from keeping them, and which do; of those that do the first that is not taken alone."""
        nonlocal looked_at
        looked_at += len(rows)
        metrics = known(rows)
        missed = sum(np.maximum(c.violations(metrics[c.metric]), 0.0) for c in constraints)
        kept = np.all([c.hold(metrics[c.metric]) for c in constraints], axis=0)
        if taken is not None:
            free = next((i for i in np.flatnonzero(kept) if not taken(rows[i])), None)
            kept = np.arange(len(rows)) == (-1 if free is None else free)
        return np.asarray(missed), kept

    def found(rows: np.ndarray, missed: np.ndarray, kept: np.ndarray, *, every: bool = False) -> Nearest:
        best = int(np.lexsort((missed, ~kept))[0])
        metrics = known(rows[best : best + 1])
        values = {name: float(metrics[name][0]) for name in {c.metric for c in constraints}}
        return Nearest(rows[best], values, bool(kept[best]), looked_at, every)

    if len(first):
        missed, kept = judged(first)
        if kept.any():
            return found(first, missed, kept)
    if space.size() <= _LISTED:
        looked_at, rows = 0, space.every()
        return found(rows, *judged(rows), every=True)
    rng = np.random.default_rng(0)
    rows = distinct(np.concatenate([first, space.sample_many(_DRAWN, rng)]))
    missed, kept = judged(rows)
    for _ in range(_GENERATIONS):
        if kept.any():
            break
        best = np.argsort(missed, kind="stable")[:_KEPT]
        rows, missed, kept = rows[best], missed[best], kept[best]
        one, other = rows[rng.integers(len(rows), size=(2, 2 * _KEPT))]
        near = [space.neighbour_vectors(rows[i]) for i in (0, int(rng.integers(len(rows))))]
        children = [mutated(space, rows.repeat(2, axis=0), rng), crossed(space, one, other, rng), *near]
        new = distinct(np.concatenate(children))
        more = judged(new)
        rows, missed, kept = (np.concatenate(both) for both in zip((rows, missed, kept), (new, *more), strict=True))
        _, once = np.unique(rows, axis=0, return_index=True)
        rows, missed, kept = rows[once], missed[once], kept[once]
    return found(rows, missed, kept)


def ruled_out(space: SearchSpace, io: IOSpec, constraints: Sequence[Comparison]) -> bool:
    """Whether it is certain that no architecture keeps constraints on costs that add up over operators.

    However much each constraint weighs, the least weighted sum of what architectures miss of them is exact
    (`enumeration.corner`). Where it is above 0 for some weights, nothing keeps them all. Weights are looked for by
    cutting planes (Kelley 1960, The Cutting-Plane Method for Solving Convex Programs). Where there are none, nothing is
    known.

    Args:
        space: The space.
        io: What its networks read and answer.
        constraints: Those on metrics that do not add up are not looked at.
    """
    from scipy.optimize import linprog

    sides = [
        (METRICS.index(c.metric), sign, c.bound, abs(c.bound) or 1.0)
        for c in constraints
        if c.metric in METRICS
        for sign, comparisons in ((1.0, ("<", "<=", "==")), (-1.0, (">", ">=", "==")))
        if c.comparison in comparisons
    ]
    if len(sides) < 2:
        return False  # of one alone the corners tell
    metric, sign, bound, scale = (np.array(column) for column in zip(*sides, strict=True))
    weights = np.full(len(sides), 1 / len(sides))
    cuts: list[np.ndarray] = []
    for _ in range(_CUTS):
        factors = np.bincount(metric, weights * sign / scale, minlength=len(METRICS))
        architecture = weighted_corner(space, io, dict(zip(METRICS, factors.tolist(), strict=True))).architecture
        missed = sign * (np.array(astuple(cost(architecture, io)), dtype=float)[metric] - bound) / scale
        if weights @ missed > 1e-9:
            return True
        cuts.append(missed)
        # The most that is still possible: the greatest t with weights @ cut >= t for every cut.
        table = np.hstack([-np.array(cuts), np.ones((len(cuts), 1))])
        equal = np.append(np.ones(len(sides)), 0.0)[None]
        solved = linprog(
            np.append(np.zeros(len(sides)), -1.0),
            A_ub=table,
            b_ub=np.zeros(len(cuts)),
            A_eq=equal,
            b_eq=[1.0],
            bounds=[*[(0.0, 1.0)] * len(sides), (None, None)],
        )
        if not solved.success or -solved.fun <= 1e-9:
            return False
        weights = solved.x[:-1]
    return False
