"""Strategies side by side on a published table, where the exact front is known."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moocore
import numpy as np

from mixnas.evaluators.tabular import Table, TabularEvaluator
from mixnas.search.engines.session import Budget, Session
from mixnas.search.strategies import Strategy
from mixnas.search.study.objectives import Objective
from mixnas.search.study.pareto import as_minimised, non_dominated_minimised
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.errors import ConfigError, nearest

CHECKPOINTS = (25, 50, 100, 200, 400)
"""Evaluations after which the hypervolume is looked at."""


def objectives_of(table: Table, names: Sequence[str] | None) -> tuple[Objective, ...]:
    """Objectives by the names of a table's metrics, with the table's directions.

    Args:
        table: The table.
        names: Which; None for the first that is maximised and the first that is minimised.

    Raises:
        ConfigError: The table has no such metric, or one is named twice.
    """
    known = table.metrics
    if names is None:
        by_direction = [next((m for m in known.values() if m.direction == d), None) for d in ("max", "min")]
        names = [metric.name for metric in by_direction if metric is not None]
    for name in names:
        if name not in known:
            raise ConfigError(f"{table.name}: no metric {name!r}.{nearest(name, known)} It has: {', '.join(known)}.")
        if list(names).count(name) > 1:
            raise ConfigError(f"{table.name}: objective {name!r} stands twice. Keep one.")
    if not names:
        raise ConfigError(f"{table.name}: no objective is given. It has: {', '.join(known)}.")
    return tuple(Objective(name, known[name].direction) for name in names)


class Truth:
    """The exact front of a table, and its hypervolume.

    The reference point is 1.05 times the 99th percentile of a metric that is minimised, and the 1st percentile of one
    that is maximised.

    Attributes:
        objectives: In order.
        reference: The reference point, in the metrics' own units (num_objectives,).
        front: Number of points on the exact front.
        empty: Number of architectures that lack one of these metrics: they fail when they are evaluated.
        volume: Hypervolume of the front, in the metrics' units multiplied; None where a float cannot hold that.

    Args:
        table: The table.
        objectives: In order.

    Raises:
        ConfigError: No architecture has all of these metrics, none is better than the reference point, or a metric is
            too large for one.
    """

    def __init__(self, table: Table, objectives: Sequence[Objective]) -> None:
        self.objectives = tuple(objectives)
        values = np.stack([table.values[o.name] for o in objectives], axis=1)
        known = np.isfinite(values).all(axis=1)
        self.empty = int((~known).sum())
        values = values[known]
        names = ", ".join(o.name for o in objectives)
        if not len(values):
            raise ConfigError(f"{table.name}: no row has all of {names}, so that there is no front. Choose objectives.")
        self.reference = np.array([_reference(column, o) for o, column in zip(objectives, values.T, strict=True)])
        if not np.isfinite(self.reference).all():
            raise ConfigError(
                f"{table.name}: a reference point beyond the values of {names} is too large for a number. Allowed: "
                "values up to 1e308."
            )
        points = as_minimised(values, objectives)
        self.front = int(non_dominated_minimised(points).sum())
        # Products of metrics need not fit into a float. Shares are of volumes in units of which each objective spans
        # about one, and these units are powers of two, so that nothing is rounded on the way.
        span = np.ldexp(self._worst, -1) - np.ldexp(points.min(axis=0), -1)
        self._units = np.frexp(span)[1] + 1
        self._whole = self._volume(points)
        if self._whole <= 0:
            raise ConfigError(f"{table.name}: no architecture is better than the reference point in all objectives.")
        with np.errstate(over="ignore", under="ignore"):
            volume = float(np.ldexp(self._whole, self._units.sum()))
        self.volume = volume if sys.float_info.min <= volume <= sys.float_info.max else None

    @property
    def _worst(self) -> np.ndarray:
        """The reference point, less is better everywhere (num_objectives,)."""
        return np.asarray(as_minimised(self.reference, self.objectives)[0])

    def _volume(self, points: np.ndarray) -> float:
        """In the product of `_units`."""
        worst = self._worst
        points = points[(points < worst).all(axis=1)]
        if not len(points):
            return 0.0
        points, worst = np.ldexp(points, -self._units), np.ldexp(worst, -self._units)
        if points.shape[1] == 1:
            return float(worst[0] - points.min())
        return float(moocore.hypervolume(points, ref=worst))

    def share(self, values: np.ndarray) -> float:
        """Share of the exact hypervolume that these objective values (num_points, num_objectives) have."""
        return self._volume(as_minimised(values, self.objectives)) / self._whole


def _reference(column: np.ndarray, objective: Objective) -> float:
    """One coordinate of the reference point; infinite where it is too large for a number."""
    unit = np.frexp(np.abs(column).max())[1]  # of metrics near the largest float, the difference of two may not be one
    scaled = np.ldexp(column, -unit)
    found = np.quantile(scaled, 0.01) if objective.maximise else 1.05 * np.quantile(scaled, 0.99)
    with np.errstate(over="ignore"):
        return float(np.ldexp(found, unit))


@dataclass(frozen=True, slots=True)
class Course:
    """One search of a table.

    Attributes:
        share: Of the exact hypervolume, by number of evaluations.
        proposal_s: Wall-clock time that a proposal took, on average, in seconds.
    """

    share: dict[int, float]
    proposal_s: float


def _evaluator(table: Table, objectives: Sequence[Objective], cheap: Sequence[str]) -> TabularEvaluator:
    """Of the objectives, and of what is cheap beside them."""
    return TabularEvaluator(table.name, list(dict.fromkeys([*(o.name for o in objectives), *cheap])), cheap, table)


def search_table(
    table: Table, truth: Truth, strategy: Strategy, seed: int, trials: int, cheap: Sequence[str] = ()
) -> Course:
    """Search a table once.

    Args:
        table: The table.
        truth: Its objectives and exact hypervolume.
        strategy: What proposes.
        seed: Of the strategy.
        trials: Evaluations.
        cheap: Metrics that the strategy knows without evaluating.
    """
    evaluator = _evaluator(table, truth.objectives, cheap)
    proposing = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        SearchStudy(
            Path(folder) / "journal",
            table.space,
            truth.objectives,
            strategy=strategy,
            seed=seed,
            cheap=evaluator.cheap if cheap else None,
        ) as study,
        Session(study, Budget(trials=trials), failures_are_data=True) as session,
    ):
        while True:
            started = time.perf_counter()
            proposals = session.next(1)
            proposing += time.perf_counter() - started
            if not proposals:
                break
            (outcome,) = evaluator.evaluate([proposals[0].request])
            session.done(proposals[0], outcome)
        records = [record for record in study.results.records if record.evaluated]
        values = [study.results.values(record) if record.status == "done" else None for record in records]
    share = {}
    for count in checkpoints(trials):
        seen = [value for value in values[:count] if value is not None]
        share[count] = truth.share(np.array(seen).reshape(-1, len(truth.objectives)))
    return Course(share, proposing / max(len(records), 1))


def checkpoints(trials: int) -> list[int]:
    """The numbers of evaluations that are looked at, the last of them `trials`."""
    return [*(count for count in CHECKPOINTS if count < trials), trials]


def compare(
    table: Table,
    objectives: Sequence[Objective],
    strategies: dict[str, Strategy],
    *,
    trials: int,
    seeds: int,
    cheap: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    courses: Callable[[Strategy], Iterable[Course]] | None = None,
) -> dict[str, Any]:
    """Strategies side by side; plain data.

    Args:
        table: The table.
        objectives: In order.
        strategies: By what they are called in the answer.
        trials: Evaluations of each search.
        seeds: Searches of each strategy: seeds 0 to `seeds` - 1.
        cheap: Metrics that strategies know without evaluating.
        say: Told of each search.
        courses: The searches of a strategy in the order of their seeds, where somebody else carries them out (other
            processes); `search_table` one after the other if not given.
    """
    truth = Truth(table, objectives)
    _evaluator(table, objectives, cheap)  # refuses what is wrong before any search
    for strategy in strategies.values():
        strategy.check()
    found: dict[str, Any] = {}
    for name, strategy in strategies.items():
        done = []
        own = (search_table(table, truth, strategy, seed, trials, cheap) for seed in range(seeds))
        for seed, course in enumerate(own if courses is None else courses(strategy)):
            done.append(course)
            say(f"{name}, seed {seed}: {course.share[trials]:.4f} at {trials}, {course.proposal_s:.4f} s a proposal")
        shares = {count: np.array([c.share[count] for c in done]) for count in checkpoints(trials)}
        found[name] = {
            "share": {
                str(count): {"mean": float(s.mean()), "sd": float(s.std(ddof=1)) if seeds > 1 else 0.0}
                for count, s in shares.items()
            },
            "proposal_s": float(np.mean([c.proposal_s for c in done])),
        }
    return {
        "table": table.name,
        "lines": table.lines,
        "rows": table.space.size(),
        "empty": truth.empty,
        "objectives": {o.name: o.direction for o in objectives},
        "cheap": list(cheap),
        "reference": dict(zip((o.name for o in objectives), truth.reference.tolist(), strict=True)),
        "front": truth.front,
        "hypervolume": truth.volume,
        "trials": trials,
        "seeds": seeds,
        "strategies": found,
    }
