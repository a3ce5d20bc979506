"""The trials of a study as arrays, read once each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mixnas.search.study.results import INTERRUPTED
from mixnas.search_space.space import INACTIVE, SearchSpace


class History:
    """What is known of the architectures of a study; grows by `update` and forgets nothing.

    Args:
        space: Where they come from.
        names: The metrics to keep.

    Attributes:
        names: The metrics that are kept.
        done: Encoded architectures (rows, variables) whose metrics are known.
        values: Those metrics (rows, names).
        failed: Encoded architectures whose evaluation failed.
        pending: Those in flight.
        seconds: How long evaluations took, done ones (rows,).
    """

    def __init__(self, space: SearchSpace, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._positions = {v.name: (i, {x: p for p, x in enumerate(v.values)}) for i, v in enumerate(space.variables)}
        self._width = len(space.variables)
        self._next = 0
        self._open: list[int] = []  # trials that had not ended
        self._rows: dict[str, list[np.ndarray]] = {"done": [], "failed": [], "pending": []}
        self._values: list[list[float]] = []
        self._seconds: list[float] = []
        self.known: set[bytes] = set()

    def update(self, study: Study) -> None:
        """Read what is new."""
        trials = study.get_trials(deepcopy=False)
        looked_at = [*self._open, *range(self._next, len(trials))]
        self._open, self._next = [], len(trials)
        self._rows["pending"] = []
        for number in looked_at:
            self._take(trials[number])
        self.known = {row.tobytes() for rows in self._rows.values() for row in rows}

    def _take(self, trial: FrozenTrial) -> None:
        row = np.full(self._width, INACTIVE, dtype=np.int64)
        for name, value in trial.params.items():
            i, positions = self._positions[name]
            row[i] = positions[value]
        if trial.state == TrialState.COMPLETE:
            metrics = trial.user_attrs["metrics"]
            self._rows["done"].append(row)
            self._values.append([float(metrics[name]) for name in self.names])
            self._seconds.append(float(trial.user_attrs.get("seconds", 0.0)))
        elif trial.state == TrialState.FAIL:
            if trial.user_attrs.get("failure") != INTERRUPTED:
                self._rows["failed"].append(row)
        elif not trial.state.is_finished():
            self._open.append(trial.number)
            if "id" in trial.user_attrs:
                self._rows["pending"].append(row)

    def _matrix(self, what: str) -> np.ndarray:
        rows = self._rows[what]  # counted, lest a space without a choice have rows of nothing
        return np.array(rows, dtype=np.int64).reshape(len(rows), self._width)

    @property
    def done(self) -> np.ndarray:
        """See the class."""
        return self._matrix("done")

    @property
    def failed(self) -> np.ndarray:
        """See the class."""
        return self._matrix("failed")

    @property
    def pending(self) -> np.ndarray:
        """See the class."""
        return self._matrix("pending")

    @property
    def values(self) -> np.ndarray:
        """See the class."""
        return np.array(self._values, dtype=float).reshape(len(self._values), len(self.names))

    @property
    def seconds(self) -> np.ndarray:
        """See the class."""
        return np.array(self._seconds)
