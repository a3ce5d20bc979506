"""What is believed of the metrics of architectures, given those that were evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mixnas.predictors.encoding import ChoiceEncoding
from mixnas.predictors.gaussian import Design, GaussianProcess, Groups, Prior
from mixnas.search.strategies.acquisition import Scale
from mixnas.search.study.objectives import Comparison, Objective
from mixnas.search_space.space import SearchSpace

MARGIN = 0.8
"""Of the scale of a metric that is no size or time; see `Scale.of`."""

FIT_ROWS = 300
"""Rows, at most, that a model's parameters are fitted on."""

ROWS = 600
"""Rows, at most, that a model knows: those nearest to the front, and a spread of the others as many."""

_TREES = 50  # that tell which evaluations fail
_FIRST_ROWS = 120  # of the first fit where more than `ROWS` were evaluated: a search that goes on
_STEPS_OF_MANY = 10  # of a fit then


@dataclass(frozen=True, slots=True)
class Wanted:
    """A metric that a search goes by, minimised: `sign` times it.

    Attributes:
        name: The metric.
        sign: 1, or -1 where more is better.
    """

    name: str
    sign: int

    @classmethod
    def of(cls, asked: Objective | Comparison) -> Wanted:
        """What an objective or a constraint wants."""
        if isinstance(asked, Objective):
            return cls(asked.name, -1 if asked.maximise else 1)
        return cls(asked.metric, -1 if asked.comparison in (">", ">=") else 1)


@dataclass
class _Model:
    """One metric's: its process and its scale."""

    inputs: tuple[Wanted, ...]
    process: GaussianProcess
    scale: Scale
    fitted_at: int = 0
    shifts: np.ndarray = field(default_factory=lambda: np.zeros(0))
    spreads: np.ndarray = field(default_factory=lambda: np.ones(0))


@dataclass(frozen=True)
class Belief:
    """Of some architectures, one metric.

    Attributes:
        mean: (rows,) on the metric's scale.
        deviation: (rows,), the noise included: what is observed is what counts.
        half: See `GaussianProcess.posterior`; without rows where it was not asked for.
        design: As the process sees the rows.
    """

    mean: np.ndarray
    deviation: np.ndarray
    half: np.ndarray
    design: Design


class Models:
    """A Gaussian process for each metric that is not known beforehand.

    A metric that is no time or size (accuracy) is also told the times and sizes of an architecture, as standardised
    logarithms: those that are known, and what is predicted of those that are not.

    Args:
        space: Of the architectures.
        wanted: The metrics that are modelled.
        known: Those that are known beforehand.

    Attributes:
        encoding: Of choices and counts.
        wanted: The metrics that are modelled.
        share: Of evaluations that did not fail, smoothed.
    """

    def __init__(self, space: SearchSpace, wanted: Sequence[Wanted], known: Sequence[Wanted]) -> None:
        variables = space.variables
        kinds = [(v.axis, v.option, v.knob) for v in variables]
        self.encoding = ChoiceEncoding([v.values for v in variables], [v.parent >= 0 for v in variables], kinds)
        self._count = max(len(variables), 1)
        self.wanted, self._known = tuple(wanted), tuple(w for w in known if w.sign > 0)
        self._models: dict[Wanted, _Model] = {}
        self._evaluated = self._refits = 0
        self.share = 1.0
        self._failures: Any = None
        self._failures_due = 0
        self._last: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def scale(self, wanted: Wanted) -> Scale:
        """The scale of a metric."""
        return self._models[wanted].scale

    def noise(self, wanted: Wanted) -> float:
        """Variance of the noise of a metric, on its scale."""
        return self._models[wanted].process.noise

    def kernel(self, wanted: Wanted, a: Design, b: Design) -> np.ndarray:
        """Prior covariance of rows, see `GaussianProcess.kernel`."""
        return self._models[wanted].process.kernel(a, b)

    # -- learning -----------------------------------------------------------------------------------------------------

    def learn(
        self,
        rows: np.ndarray,
        values: Mapping[Wanted, np.ndarray],
        known: Mapping[Wanted, np.ndarray],
        pending: np.ndarray,
        known_pending: Mapping[Wanted, np.ndarray],
        evaluated: int,
    ) -> None:
        """Fit to what was evaluated; those in flight are believed at their mean.

        With more than `ROWS` evaluated no more than one metric's parameters are fitted anew at a time, so that no
        proposal waits for all of them.

        Args:
            rows: Encoded (rows, variables), `ROWS` at most.
            values: Of each metric that is modelled, minimised (rows,).
            known: Of each that is known beforehand, likewise.
            pending: Encoded, in flight.
            known_pending: What is known of those.
            evaluated: How many were, those that `rows` leaves out included.
        """
        self._evaluated, self._refits = evaluated, 0
        positive = {w: w.sign > 0 and bool((values[w] > 0).all()) for w in self.wanted}
        sizes = [w for w in self.wanted if positive[w]]
        if len(sizes) == len(self.wanted) and not any(w.sign < 0 for w in self.wanted):
            sizes = sizes[1:]  # of nothing but sizes and times the first is the task's metric: a loss
        order = sorted(self.wanted, key=lambda w: w not in sizes)
        for wanted in order:
            inputs = tuple(self._usable(known)) if wanted in sizes else (*self._usable(known), *sizes)
            self._learn(wanted, inputs, positive[wanted], rows, values[wanted], known)
            if len(pending):
                self._believe(wanted, rows, values[wanted], known, pending, known_pending)
        self._models = {w: self._models[w] for w in order}

    def _usable(self, known: Mapping[Wanted, np.ndarray]) -> list[Wanted]:
        return [w for w in self._known if (known[w] > 0).all()]

    def _learn(
        self,
        wanted: Wanted,
        inputs: tuple[Wanted, ...],
        positive: bool,
        rows: np.ndarray,
        values: np.ndarray,
        known: Mapping[Wanted, np.ndarray],
    ) -> None:
        model = self._models.get(wanted)
        if model is None or model.inputs != inputs:
            model = _Model(inputs, self._process(len(inputs)), Scale(0, 0, 1))
            self._models[wanted] = model
        model.scale = Scale.of(values, positive=positive, margin=MARGIN)
        y = model.scale.forward(values)
        raw = self._raw(inputs, rows, known)
        model.shifts = raw.mean(axis=0)
        model.spreads = np.maximum(raw.std(axis=0), 1e-9)
        design = self._design(model, rows, raw)
        first, many = not model.fitted_at, self._evaluated > ROWS
        due = self._evaluated >= model.fitted_at + max(1, model.fitted_at // 12)
        if first or (due and not (many and self._refits)):
            roughly = first and many  # soon done again
            some = np.linspace(0, len(rows) - 1, min(len(rows), _FIRST_ROWS if roughly else FIT_ROWS)).astype(int)
            model.process.fit(design[some], y[some], iterations=_STEPS_OF_MANY if many else 60 if first else 20)
            model.fitted_at = 1 if roughly else self._evaluated
            self._refits += 1
        model.process.condition(design, y)

    def _believe(
        self,
        wanted: Wanted,
        rows: np.ndarray,
        values: np.ndarray,
        known: Mapping[Wanted, np.ndarray],
        pending: np.ndarray,
        known_pending: Mapping[Wanted, np.ndarray],
    ) -> None:
        model = self._models[wanted]
        first = self._design(model, rows, self._raw(model.inputs, rows, known))
        second = self._design(model, pending, self._raw(model.inputs, pending, known_pending))
        both = Design(*(np.vstack(pair) for pair in zip(first.parts, second.parts, strict=True)))
        model.process.condition(both, np.concatenate([model.scale.forward(values), model.process.mean(second)]))

    def _process(self, inputs: int) -> GaussianProcess:
        encoding, variables = self.encoding, self._count
        extra = np.arange(inputs)
        counted = len(encoding.count_group) > 0
        groups = Groups(
            linear=np.concatenate([np.zeros(len(encoding.group), dtype=np.intp), 1 + extra]),
            choices=np.concatenate([encoding.group, variables + extra]),
            counts=np.concatenate([encoding.count_group, encoding.count_group.max() + 1 + extra])
            if counted
            else np.zeros(0, dtype=np.intp),
        )
        prior = Prior(
            linear=(math.log(0.3), 1.0),
            choices=(0.5 - math.log(variables), 0.7),
            counts=(math.log(0.1), 1.0),
            signal=(math.log(0.5), 1.0),
            noise=(math.log(0.03), 1.0),
        )
        return GaussianProcess(groups, prior)

    def _raw(self, inputs: Sequence[Wanted], rows: np.ndarray, known: Mapping[Wanted, np.ndarray]) -> np.ndarray:
        """Logarithms of sizes and times (rows, inputs): known, or predicted."""
        columns = []
        for w in inputs:
            if w in known:
                columns.append(np.log(known[w]))
            else:
                columns.append(self._mean(w, rows, known))
        return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))

    def _design(self, model: _Model, rows: np.ndarray, raw: np.ndarray) -> Design:
        extra = (raw - model.shifts) / model.spreads
        x, counts = self._encoded(rows)
        linear = np.hstack([x * math.sqrt(2 / self._count), extra])
        with_counts = np.hstack([counts, extra]) if counts.shape[1] else np.zeros((len(rows), 0))
        return Design(linear, np.hstack([x, extra]), with_counts)

    def learn_failures(self, done: np.ndarray, failed: np.ndarray) -> None:
        """Learn where evaluations fail: encoded architectures (rows, variables) of which they did not, and did.

        Bagged trees (Breiman 1996, "Bagging predictors") on the values' places and on counts. What makes an evaluation
        fail is often one choice, or a few of them together: trees find those among a hundred others.
        """
        if not len(failed) or not len(done):
            return
        both = np.concatenate([done, failed])
        if self._failures is not None and len(both) < self._failures_due:
            return
        from sklearn.ensemble import RandomForestClassifier  # slow to import, and seldom needed

        self.share = (1 + len(done)) / (2 + len(both))
        self._failures_due = len(both) + max(1, len(both) // 50)
        trees = RandomForestClassifier(_TREES, max_features=None, min_samples_leaf=2, random_state=0)
        self._failures = trees.fit(self._places(both), np.arange(len(both)) < len(done))

    def chance(self, rows: np.ndarray) -> np.ndarray:
        """That an evaluation of encoded architectures does not fail (rows,)."""
        if self._failures is None or not len(rows):
            return np.full(len(rows), self.share)
        found: np.ndarray = self._failures.predict_proba(self._places(rows))[:, 1]
        return np.clip(found, 1e-6, 1.0)

    def _places(self, rows: np.ndarray) -> np.ndarray:
        return np.hstack([rows, self._encoded(rows)[1]])

    def _encoded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Choices and counts; of the rows that were asked about last they are there."""
        if self._last is None or self._last[0] is not rows:
            self._last = rows, self.encoding.choices(rows), self.encoding.counts(rows)
        return self._last[1], self._last[2]

    # -- asking -------------------------------------------------------------------------------------------------------

    def _mean(self, wanted: Wanted, rows: np.ndarray, known: Mapping[Wanted, np.ndarray]) -> np.ndarray:
        model = self._models[wanted]
        return model.process.mean(self._design(model, rows, self._raw(model.inputs, rows, known)))

    def beliefs(self, rows: np.ndarray, known: Mapping[Wanted, np.ndarray], *, exact: bool) -> dict[Wanted, Belief]:
        """Of encoded architectures (rows, variables), each metric.

        Args:
            rows: Encoded.
            known: What is known of them beforehand.
            exact: Whether each row's own deviation is wanted; else all have that of a few of them, which is quicker.
        """
        found: dict[Wanted, Belief] = {}
        means: dict[Wanted, np.ndarray] = {}
        for wanted, model in self._models.items():
            raw = [np.log(known[w]) if w in known else means[w] for w in model.inputs]
            design = self._design(model, rows, np.stack(raw, axis=1) if raw else np.zeros((len(rows), 0)))
            noise = model.process.noise
            if exact:
                mean, variance, half = model.process.posterior(design)
                found[wanted] = Belief(mean, np.sqrt(variance + noise), half, design)
            else:
                mean = model.process.mean(design)
                few = model.process.posterior(design[:: max(1, len(rows) // 64)])[1]
                found[wanted] = Belief(mean, np.full(len(rows), math.sqrt(few.mean() + noise)), mean[:0, None], design)
            means[wanted] = mean
        return found
