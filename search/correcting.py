"""Measuring what a search holds to be best while it is still searching, and correcting its predictor by that.

A search finds what its predictor flatters: the networks of its front are predicted too quick more often than too slow.
At some points of the budget those that would be finalists are measured, the predictor is corrected
(`predictors.latency.correction`), and the rest of the budget is searched with what it says then. Measurements lie in
the run's manifest, so that a search that is resumed predicts as it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mixnas.predictors.latency.source import LatencySource
from mixnas.predictors.measuring.value import Latency
from mixnas.search.engines import Engine
from mixnas.search.engines.local import LocalEngine
from mixnas.search.finish import choose_finalists
from mixnas.search.problem import Problem
from mixnas.search.run.directory import Run
from mixnas.search.study.results import Results
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import IntegrityError, NasError, StoppedEarly

SHARES = (0.5, 0.75)
"""Shares of the trials after which is measured."""

_AT_ONCE = 8  # networks that are measured each time, at most
_LATENCY = "latency_ms"


class Correcting:
    """See the module.

    Args:
        run: Keeps what was measured.
        problem: What is searched.
        latency: Predicts; corrected from the start where something was measured before.
        should_stop: Asked before measuring.

    Raises:
        IntegrityError: What the manifest has of measurements cannot be read.
    """

    def __init__(self, run: Run, problem: Problem, latency: LatencySource, should_stop: Callable[[], bool]) -> None:
        self._run, self._problem, self._latency, self._should_stop = run, problem, latency, should_stop
        self._found, self._looked_at = _read(run) if self.wanted else ({}, 0)
        self._correct()

    @property
    def wanted(self) -> bool:
        """Whether latency counts in this search, is predicted, and can be measured."""
        problem = self._problem
        return _LATENCY in problem.named and problem.metrics[_LATENCY].cheap and self._latency.here

    def legs(self, begun: int, trials: int, engine: Engine) -> list[int]:
        """The numbers of trials up to which is searched before the next look, ascending; the last is all of them.

        Args:
            begun: Trials there are. It comes first itself where the look that was due by then was not taken.
            trials: The budget.
            engine: Ends between two looks, so that nothing else runs on this machine; a cluster is not begun anew
                for one.
        """
        often = self.wanted and isinstance(engine, LocalEngine)
        points = sorted({max(1, round(share * trials)) for share in SHARES}) if often else []
        missed = [begun] if any(self._looked_at < point <= begun < trials for point in points) else []
        return [*missed, *(point for point in points if begun < point < trials), trials]

    @property
    def measured(self) -> dict[str, Latency]:
        """Latency of what was measured, by id."""
        return {identity: latency for identity, (_, latency) in self._found.items()}

    def _correct(self) -> None:
        if self.wanted:
            self._latency.correct(list(self._found.values()), self._problem.space, self._problem.io)

    def measure(self, results: Results, trials: int) -> list[str]:
        """Measure those that would be finalists now and were not measured, and correct the predictor.

        Args:
            results: The trials so far.
            trials: How many that are, as `legs` counts them.

        Returns:
            The ids of those that were measured.

        Raises:
            StoppedEarly: `should_stop` said so.
        """
        likely = choose_finalists(self.current(results), _AT_ONCE, self._problem.provisional)
        new = [record for record in likely if record.id not in self._found]
        if self._should_stop():
            raise StoppedEarly("stopped before measuring candidates.")
        networks = [self._problem.untrained(record.architecture) for record in new]
        found = self._latency.measure_each(networks) if new else []
        known = {r.id: (r.architecture, one) for r, one in zip(new, found, strict=True) if isinstance(one, Latency)}
        self._found |= known
        self._looked_at = trials
        each = [{"architecture": a.to_dict(), "latency": one.to_plain()} for a, one in self._found.values()]
        self._run.update(measured={"after": trials, "networks": each})
        if known:
            self._correct()
        return list(known)

    def current(self, results: Results) -> Results:
        """The trials with the latency that is predicted of them now; of those that were measured, that."""
        if not self._found:
            return results
        done = [i for i, record in enumerate(results.records) if record.status == "done"]
        rows = self._problem.space.encode_many([results.records[i].architecture for i in done])
        now: np.ndarray = self._latency.predict_many(rows, self._problem.space, self._problem.io)
        records = list(results.records)
        for i, ms in zip(done, now.tolist(), strict=True):
            known = self._found.get(records[i].id)
            ms = ms if known is None else known[1].ms
            records[i] = replace(records[i], metrics={**records[i].metrics, _LATENCY: ms})
        return Results(results.objectives, results.constraints, records, results.reference)


def _read(run: Run) -> tuple[dict[str, tuple[Architecture, Latency]], int]:
    """What was measured by id, and after how many trials last."""
    found: dict[str, tuple[Architecture, Latency]] = {}
    plain: Mapping[str, Any] = run.manifest.get("measured") or {"after": 0, "networks": []}
    try:
        for one in plain["networks"]:
            architecture = Architecture.from_canonical(one["architecture"])
            found[architecture.id] = architecture, Latency.from_plain(dict(one["latency"]))
        return found, int(plain["after"])
    except (KeyError, TypeError, ValueError, NasError) as error:
        raise IntegrityError(f"{run.path / 'manifest.json'}: damaged: what was measured cannot be read.") from error
    return found
