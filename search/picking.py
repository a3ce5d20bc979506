"""Which networks of a run are taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from mixnas.search.run.front import Front, Member
from mixnas.search.study.objectives import Objective, parse_filter, parse_objectives
from mixnas.search.study.pareto import as_minimised
from mixnas.search_space.errors import ConfigError, NasError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to choose, or none of them, which is as `one_se`, where a metric without a standard error is exact.

    Attributes:
        pick: Id of a final network, or its start.
        where: Filter over metrics: all of the front that satisfy it.
        knee: The knee of the front.
        one_se: The fastest of those within one standard error of the best by the first objective.
        weights: How much each objective matters, by its name; the rest do not.
        everything: The whole front.
    """

    pick: str | None = None
    where: str | None = None
    knee: bool = False
    one_se: bool = False
    weights: Mapping[str, float] | None = None
    everything: bool = False

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if self.pick is not None and not isinstance(self.pick, str):
            raise ConfigError(f"pick is {self.pick!r}: expected an id, or its start; trial=N takes a trial.")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: networks are chosen in one way at a time.")

    def of(self, front: Front, run: str = "") -> list[Member]:
        """The networks of a final front.

        Args:
            front: The front.
            run: As it is typed in a command, for messages; its name if not given.

        Raises:
            ConfigError: No such network, or nothing satisfies the filter.
            NasError: The run has no final front yet.
        """
        if not front.final:
            raise NasError(f"{front.run}: the search has not come to its final networks. nas resume {run or front.run}")
        if self.pick is not None:
            return [_by_id(front, self.pick)]
        if not front.members:
            raise NasError(
                f"{front.run}: no network is on the front{_of_constraints(front)}. Those that are not can be exported "
                f"by --pick: {', '.join(m.id for m in front.others) or 'there are none'}."
            )
        if self.where is not None:
            return _satisfying(front, self.where, run or front.run)
        if self.everything:
            return list(front.members)
        if self.knee:
            return [m for m in front.members if m.id == front.knee]
        if self.weights is not None:
            return [by_weights(front, self.weights)]
        return [within_one_error(front, required=self.one_se)]


def _of_constraints(front: Front) -> str:
    return f", under the constraints {', '.join(front.constraints)}" if front.constraints else ""


def _by_id(front: Front, pick: str) -> Member:
    found = [m for m in (*front.members, *front.others) if m.id.startswith(pick)]
    if len(found) != 1:
        ids = [m.id for m in (*front.members, *front.others)]
        problem = "stands for several networks" if found else "is none of the final networks"
        raise ConfigError(f"--pick: {pick!r} {problem}.{nearest(pick, ids)} They are: {', '.join(ids)}.")
    return found[0]


def _satisfying(front: Front, where: str, run: str) -> list[Member]:
    wanted = parse_filter(where, known=sorted({name for m in front.members for name in m.values}))
    found = [m for m in front.members if wanted.holds(m.values)]
    if not found:
        raise ConfigError(f"--where: no network of the front satisfies {where!r}. See them: nas front {run}")
    return found


def within_one_error(front: Front, *, required: bool = False) -> Member:
    """Of the networks within one standard error of the best by the first objective the fastest.

    The rule of one standard error: Breiman et al. 1984, Classification and Regression Trees, section 3.4.3.

    Args:
        front: Not empty; its members satisfy the constraints.
        required: Whether the standard error has to be known; else it is taken for 0 where it is not.

    Raises:
        ConfigError: It has to be, and is not.
    """
    first = parse_objectives(front.objectives)[0]
    sign = 1 if first.maximise else -1
    best = max(front.members, key=lambda m: sign * m.metrics[first.name])
    error = best.metrics.get(f"{first.name}_se")
    if error is None and required:
        raise ConfigError(
            f"--one-se: {front.run} does not know the standard error of {first.name}. Choose by --where or --pick."
        )
    least = sign * best.metrics[first.name] - (error or 0.0)
    near = [m for m in front.members if sign * m.metrics[first.name] >= least]
    return min(near, key=lambda m: (m.metrics.get("latency_ms", 0.0), m.metrics.get("params", 0.0)))


def by_weights(front: Front, weights: Mapping[str, float]) -> Member:
    """The network whose worst weighted loss is least; losses from 0, the best on the front, to 1, the worst on it.

    The weighted Chebyshev norm, which can reach every network of a front (Miettinen 1999, Nonlinear Multiobjective
    Optimization, section 3.4).

    Args:
        front: Not empty.
        weights: By objective; those that are left out weigh nothing.

    Raises:
        ConfigError: No such objective, or a weight is not positive.
    """
    objectives = parse_objectives(front.objectives)
    names = [o.name for o in objectives]
    for name, weight in weights.items():
        if name not in names:
            raise ConfigError(
                f"--weights: {name!r} is no objective.{nearest(name, names)} Allowed: {', '.join(names)}."
            )
        if not 0 < weight < float("inf"):
            raise ConfigError(f"--weights: {name}={weight}: expected a number above 0.")
    losses = scaled(front.members, objectives) * np.array([weights.get(name, 0.0) for name in names])
    order = np.lexsort((losses.sum(axis=1), losses.max(axis=1)))
    return front.members[int(order[0])]


def scaled(members: Sequence[Member], objectives: Sequence[Objective]) -> np.ndarray:
    """Objective values (members, objectives), from 0 for the best among these to 1 for the worst."""
    points = as_minimised(np.array([[m.metrics[o.name] for o in objectives] for m in members]), objectives)
    best, worst = points.min(axis=0), points.max(axis=0)
    found: np.ndarray = (points - best) / np.where(worst > best, worst - best, 1.0)
    return found
