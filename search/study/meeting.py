"""Whether architectures of a space keep constraints on what is known of them without evaluating: looking for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixnas.search.strategies.drawing import crossed, distinct, mutated
from mixnas.search.study.objectives import Comparison
from mixnas.search_space.errors import counted
from mixnas.search_space.space import SearchSpace

Known = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Metrics, each (rows,), of encoded architectures (rows, variables)."""

Taken = Callable[[np.ndarray], bool]
"""Whether an encoded architecture (variables,) that keeps the constraints is not wanted all the same."""

_LISTED = 20_000  # spaces up to this size are looked at to the last architecture
_DRAWN = 4096
_KEPT = 64  # of a generation
_GENERATIONS = 40


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
        values = ", ".join(
            f"{name} {_number(self.values[name])}" for name in dict.fromkeys(c.metric for c in constraints)
        )
        together = " together" if len(constraints) > 1 else ""
        return (
            f"{looked_at} none meets {', '.join(map(str, constraints))}{together}: the nearest has {values}: "
            f"{space.decode(self.vector)}. Change a bound to what that has, or widen the space."
        )


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
        pairs = rng.integers(len(rows), size=(2, 2 * _KEPT))
        near = [space.neighbour_vectors(rows[i]) for i in (0, int(rng.integers(len(rows))))]
        children = [mutated(space, rows.repeat(2, axis=0), rng), crossed(space, *rows[pairs], rng), *near]
        new = distinct(np.concatenate(children))
        more = judged(new)
        rows, missed, kept = (np.concatenate(both) for both in zip((rows, missed, kept), (new, *more), strict=True))
        _, once = np.unique(rows, axis=0, return_index=True)
        rows, missed, kept = rows[once], missed[once], kept[once]
    return found(rows, missed, kept)
