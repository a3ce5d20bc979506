"""Bayesian optimisation of a Pareto front: what is expensive is predicted from all that was evaluated so far.

Gaussian processes for the expensive metrics (`modelling.py`), exact expected hypervolume improvement (`acquisition.py`;
Emmerich, Giannakoglou and Naujoks 2006 for the criterion), random candidates and the neighbours of the front, and
batches whose members believe each other at their mean (Ginsbourger, Le Riche and Carraro 2010, "Kriging is well-suited
to parallelize optimization", section 4.2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import moocore
import numpy as np
from optuna.samplers import BaseSampler
from optuna.study import Study

from mixnas.search.strategies import STRATEGIES, Acceptable, Cheap, Question, Strategy
from mixnas.search.strategies.acquisition import ROUGHLY, Improvement, shortfall_of_known
from mixnas.search.strategies.drawing import BatchSampler, distinct, mutated, trial_generator
from mixnas.search.strategies.history import History
from mixnas.search.strategies.modelling import ROWS, Models, Wanted
from mixnas.search.study.pareto import non_dominated_minimised
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.settings import Between

_NEIGHBOURS = 2500  # candidates, at most, next to the front
_EXACT = 300  # candidates whose improvement is computed exactly
_PARENTS = 200  # members of the front, at most, whose neighbours are looked at
_POOL = 600  # architectures that the first points are taken from
_SAMPLE = 1000  # architectures whose predictions say where the reference point lies
_REPAIRS = 12  # rounds of mutation toward the constraints, where few random architectures keep them
_REFINEMENTS = 2  # rounds of looking at the neighbours of the best candidates
_REFINED = 8  # candidates whose neighbours are looked at
_HOPELESS = 0.2  # candidates of less chance not to fail, as a share of what does not fail on average, are left out
_LIKELY = 0.5  # who has less chance not to fail is not believed to be on the front before it is there
_LARGEST_BATCH = 200
_REMEMBERED = 200_000  # architectures whose cheap metrics are kept
_GROWTH = ((60, 1), (100, 2), (200, 5), (math.inf, 10))  # batches: up to so many evaluations, so many together


@STRATEGIES.register("predictor")
@dataclass(frozen=True, kw_only=True, slots=True)
class Predictor(Strategy):
    """Predicts what is expensive, and evaluates where the front is expected to gain most.

    Attributes:
        first: Architectures that are spread over the space before anything is predicted.
        batch: Architectures that are decided together; None for 1 at first, and more as the search goes on.
        share: Share of the time that proposing may take, above 0: where evaluations are quick, batches grow until it
            is kept. None where that does not matter. What is proposed then depends on the clock.
        candidates: Random architectures that each proposal is chosen from, beside the neighbours of the front.
    """

    first: Annotated[int, Between(4, 100_000)] = 12
    batch: Annotated[int, Between(1, 10_000)] | None = None
    share: Annotated[float, Between(0.01, 1)] | None = None
    candidates: Annotated[int, Between(50, 1_000_000)] = 2500

    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """See `Strategy`."""
        return PredictorSampler(question, cheap, acceptable, self)


class PredictorSampler(BatchSampler):
    """See the module."""

    def __init__(self, question: Question, cheap: Cheap | None, acceptable: Acceptable, config: Predictor) -> None:
        super().__init__(question, acceptable)
        self._config, self._cheap = config, cheap
        names = {} if cheap is None else cheap(question.space.encode_many([]))
        constraints = [c for c in question.constraints if c.comparison != "=="]
        self._objectives = [Wanted.of(objective) for objective in question.objectives]
        self._beforehand = [c for c in question.constraints if c.metric in names]
        self._later = [c for c in constraints if c.metric not in names]
        wanted = dict.fromkeys([*self._objectives, *map(Wanted.of, question.constraints)])
        self._known = [w for w in wanted if w.name in names]
        self._cheap_names = [w.name for w in self._known]
        self._cheap_found: dict[bytes, np.ndarray] = {}
        self._models = Models(question.space, [w for w in wanted if w.name not in names], self._known)
        self._history = History(question.space, list(dict.fromkeys(w.name for w in wanted)))
        self._columns = {w: self._history.names.index(w.name) for w in wanted}
        self._constraints = question.constraints
        self._reference = np.full(len(self._objectives), -np.inf)
        self._sample: np.ndarray | None = None
        self._looked_at = 0  # evaluations when the reference point was last looked at
        self._seconds = 0.0  # that the last proposal took
        self._corrected = False

    def forget_cheap(self) -> None:
        """See `strategies.Remembering`."""
        self._cheap_found.clear()
        self._corrected = True

    # -- batches ------------------------------------------------------------------------------------------------------

    def propose(self, study: Study, count: int, rng: np.random.Generator) -> list[Architecture]:
        """See `BatchSampler`; more than `count` where batches have grown beyond it."""
        started = time.perf_counter()
        history = self._history
        history.update(study)
        decided = self._space.encode_many(list(self._decided))
        known = history.known | {row.tobytes() for row in decided}
        pending = np.concatenate([history.pending, decided])
        evaluated = len(history.done) + len(history.failed)
        if evaluated + len(pending) < self._config.first or len(history.done) < 4:
            count = max(count, self._config.first - evaluated - len(pending))
            chosen = self._spread(count, known, np.concatenate([history.done, history.failed, pending]))
        else:
            chosen = self._improving(max(count, self._batch(evaluated)), known, pending, rng)
        self._seconds = time.perf_counter() - started
        found = [architecture for architecture in map(self._space.decode, chosen) if self._acceptable(architecture)]
        return found or [self._space.sample(rng)]

    def _batch(self, evaluated: int) -> int:
        config = self._config
        batch = config.batch or next(size for until, size in _GROWTH if evaluated < until)
        if config.share is None or not len(self._history.seconds):
            return batch
        one = max(float(np.median(self._history.seconds)), 1e-6)
        wanted = self._seconds / one * (1 - config.share) / config.share
        return max(batch, min(_LARGEST_BATCH, math.ceil(wanted)))

    def _chance(self, rows: np.ndarray) -> np.ndarray:
        """That an evaluation does not fail, of encoded architectures (rows,): learned from those that did."""
        return self._models.chance(rows)

    def _hopeful(self, rows: np.ndarray) -> np.ndarray:
        """Encoded architectures (rows, variables) without those that nearly surely fail.

        However small their chance, what is left at the end of a search that found the rest would be all theirs.
        """
        return rows[self._chance(rows) >= _HOPELESS * self._models.share]

    # -- architectures ------------------------------------------------------------------------------------------------

    def _before(self, rows: np.ndarray) -> tuple[dict[Wanted, np.ndarray], np.ndarray]:
        """What is known beforehand of encoded architectures, minimised, and by how much that breaks constraints."""
        if self._cheap is None or not (self._known or self._beforehand):
            return {}, np.zeros(len(rows))
        found = dict(zip(self._cheap_names, self._looked_up(rows).T, strict=True))
        broken = np.zeros(len(rows))
        for constraint in self._beforehand:
            metric = found[constraint.metric]
            broken += np.where(constraint.hold(metric), 0.0, np.maximum(constraint.violations(metric), 1e-12))
        return {w: w.sign * found[w.name] for w in self._known}, broken

    def _looked_up(self, rows: np.ndarray) -> np.ndarray:
        """The cheap metrics of encoded architectures (rows, metrics), each asked for once."""
        assert self._cheap is not None
        if len(self._cheap_found) > _REMEMBERED:
            self._cheap_found.clear()
        keys = [row.tobytes() for row in np.ascontiguousarray(rows)]
        new = {key: i for i, key in enumerate(keys) if key not in self._cheap_found}
        if new:
            metrics = self._cheap(rows[list(new.values())])
            columns = np.stack([np.asarray(metrics[name], dtype=float) for name in self._cheap_names], axis=1)
            self._cheap_found.update(zip(new, columns, strict=True))
        return np.array([self._cheap_found[key] for key in keys]).reshape(-1, len(self._cheap_names))

    def _draw_feasible(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random architectures that keep the constraints which are known beforehand, as far as they are found."""
        rows = distinct(self._space.sample_many(count, rng))
        broken = self._before(rows)[1]
        for _ in range(_REPAIRS):
            if (broken == 0).sum() >= min(count // 8, len(rows)):
                break
            parents = rows[np.argsort(broken, kind="stable")[: max(16, count // 20)]]
            children = mutated(self._space, parents[rng.integers(len(parents), size=count)], rng)
            rows = distinct(np.concatenate([rows, children]))
            broken = self._before(rows)[1]
        rows = rows[broken == 0]
        return rows[rng.permutation(len(rows))[:count]]

    def _spread(self, count: int, known: set[bytes], seen: np.ndarray) -> list[np.ndarray]:
        """Architectures far from each other and from what was seen; of each quantile of a size that is known."""
        rng = trial_generator(self._seed, 0)  # the same pool each time: a search that was stopped goes on with it
        pool = _not_in(self._draw_feasible(max(min(_POOL, self._config.candidates), 4 * count), rng), known)
        sizes, _ = self._before(pool)
        size = next((sizes[w] for w in self._known if w.sign > 0 and w in self._objectives), None)
        part = np.zeros(len(pool), dtype=np.intp)
        parts = 1
        if size is not None and len(pool):
            parts = self._config.first
            part = np.argsort(np.argsort(size, kind="stable")) * parts // len(pool)
        x = self._models.encoding.choices(pool)
        distance = np.full(len(pool), np.inf)
        for row in self._models.encoding.choices(seen):
            distance = np.minimum(distance, ((x - row) ** 2).sum(1))
        chosen: list[np.ndarray] = []
        for i in range(min(count, len(pool))):
            here = np.where(part == (len(seen) + i) % parts, distance, -1.0)
            best = int(np.argmax(here if here.max() > 0 else distance))
            if distance[best] <= 0:
                break
            chosen.append(pool[best])
            distance = np.minimum(distance, ((x - x[best]) ** 2).sum(1))
        return chosen

    def _improving(
        self, count: int, known: set[bytes], pending: np.ndarray, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """Those among random architectures and neighbours of the front that are expected to add most hypervolume."""
        done, values = self._history.done, self._history.values
        if self._corrected:  # those that were evaluated are believed as they are predicted now
            for w, metric in self._before(done)[0].items():
                values[:, self._columns[w]] = w.sign * metric
        minimised = {w: w.sign * values[:, column] for w, column in self._columns.items()}
        points = np.stack([minimised[w] for w in self._objectives], axis=1)
        feasible = np.ones(len(done), dtype=bool)
        for constraint in self._constraints:
            feasible &= constraint.hold(values[:, self._history.names.index(constraint.metric)])
        kept = _nearest_front(points, feasible)
        self._models.learn(
            done[kept],
            {w: minimised[w][kept] for w in self._models.wanted},
            {w: minimised[w][kept] for w in self._known},
            pending,
            self._before(pending)[0],
            len(done),
        )
        self._models.learn_failures(done[-ROWS:], self._history.failed[-ROWS:])
        front = points[feasible][non_dominated_minimised(points[feasible])]
        members = done[feasible][non_dominated_minimised(points[feasible])]
        candidates = self._candidates(members if len(members) else done[kept][:20], known, rng)
        if not len(candidates):
            return []
        reference = self._move_reference(points)
        if len(pending):
            believed = self._means(pending[self._chance(pending) >= _LIKELY])
            front = np.concatenate([front, believed]) if not self._later else front
        search = _Acquisition(self, front, reference, any_feasible=bool(feasible.any()))
        score = search.score(candidates, exact=False)
        best = candidates[np.argsort(-score, kind="stable")[:_EXACT]]
        for _ in range(_REFINEMENTS):
            order = np.argsort(-search.score(best, exact=True), kind="stable")
            near = self._hopeful(self._around(best[order[:_REFINED]], known | {row.tobytes() for row in best}))
            if not len(near):
                break
            near = near[np.argsort(-search.score(near, exact=False), kind="stable")[: _EXACT // 2]]
            best = np.concatenate([best[order[:_EXACT]], near])
        return search.batch(best, count)

    def _candidates(self, members: np.ndarray, known: set[bytes], rng: np.random.Generator) -> np.ndarray:
        if len(members) > _PARENTS:
            members = members[rng.permutation(len(members))[:_PARENTS]]
        near = self._around(members, known)
        near = near[rng.permutation(len(near))[:_NEIGHBOURS]]
        drawn = self._draw_feasible(self._config.candidates, rng)
        found = _not_in(distinct(np.concatenate([near, drawn])), known)
        hopeful = self._hopeful(found)
        return hopeful if len(hopeful) else found

    def _around(self, rows: np.ndarray, known: set[bytes]) -> np.ndarray:
        """The neighbours of architectures that are not known and keep the constraints known beforehand."""
        near = np.concatenate([self._space.neighbour_vectors(row) for row in rows])
        near = _not_in(distinct(near), known)
        return near[self._before(near)[1] == 0] if len(near) else near

    def _means(self, rows: np.ndarray) -> np.ndarray:
        """Objectives of architectures, minimised: known, or as predicted."""
        before, _ = self._before(rows)
        beliefs = self._models.beliefs(rows, before, exact=False)
        columns = [before[w] if w in before else self._models.scale(w).back(beliefs[w].mean) for w in self._objectives]
        return np.stack(columns, axis=1)

    def _move_reference(self, points: np.ndarray) -> np.ndarray:
        """The reference point: nearly the worst of what is predicted over the space.

        It is no further beyond the worst seen than that is from the best, lest a wild prediction of few points stays:
        it never comes nearer.

        Args:
            points: What was evaluated, minimised (rows, objectives).
        """
        evaluated = len(self._history.done)
        if evaluated < self._looked_at + max(1, self._looked_at // 12):
            return self._reference
        self._looked_at = evaluated
        if self._sample is None:
            self._sample = self._draw_feasible(min(_SAMPLE, self._config.candidates), trial_generator(self._seed, 1))
        if len(self._sample):
            before, _ = self._before(self._sample)
            beliefs = self._models.beliefs(self._sample, before, exact=False)
            for i, w in enumerate(self._objectives):
                values = before[w] if w in before else self._models.scale(w).back(beliefs[w].mean)
                best_seen, worst_seen = float(points[:, i].min()), float(points[:, i].max())
                worst = min(float(np.quantile(values, 0.99)), worst_seen + (worst_seen - best_seen))
                self._reference[i] = max(self._reference[i], worst * 1.05 if worst > 0 else worst)
        return self._reference


class _Acquisition:
    """What evaluating an architecture is worth."""

    def __init__(self, sampler: PredictorSampler, front: np.ndarray, reference: np.ndarray, any_feasible: bool) -> None:
        self._sampler, self._models, self._objectives = sampler, sampler._models, sampler._objectives
        self._reference, self._any_feasible = reference, any_feasible
        self._front = front
        self._improvement = Improvement(front, reference)
        few = self._improvement.boxes <= ROUGHLY
        self._rough = self._improvement if few else Improvement(front, reference, ROUGHLY)

    def score(self, rows: np.ndarray, *, exact: bool) -> np.ndarray:
        """(rows,), more is better."""
        before, _ = self._sampler._before(rows)
        beliefs = self._models.beliefs(rows, before, exact=exact)
        improvement = self._improvement if exact else self._rough
        known = {w: (b.mean, b.deviation) for w, b in beliefs.items()}
        return self._value(before, known, improvement, self._sampler._chance(rows))

    def _value(
        self,
        before: Mapping[Wanted, np.ndarray],
        beliefs: Mapping[Wanted, tuple[np.ndarray, np.ndarray]],
        improvement: Improvement,
        chance: np.ndarray,
    ) -> np.ndarray:
        from scipy.special import ndtr  # slow to import

        value = np.ones(len(chance))
        if self._any_feasible or not self._sampler._later:
            found = []
            for i, w in enumerate(self._objectives):
                bounds = improvement.bounds[i]
                if w in before:
                    found.append(shortfall_of_known(bounds, before[w]))
                else:
                    found.append(self._models.scale(w).shortfall(bounds, *beliefs[w]))
            value = improvement(found)
        for c in self._sampler._later:
            w = Wanted.of(c)
            mean, deviation = beliefs[w]
            bound = self._models.scale(w).forward(np.array([w.sign * c.bound]))[0]
            value = value * ndtr((bound - mean) / deviation)
        return value * chance

    def batch(self, rows: np.ndarray, count: int) -> list[np.ndarray]:
        """The best of encoded architectures, one after the other, each believed at its mean by the next."""
        before, _ = self._sampler._before(rows)
        beliefs = self._models.beliefs(rows, before, exact=True)
        variance = {w: b.deviation**2 - self._models.noise(w) for w, b in beliefs.items()}
        half = {w: b.half for w, b in beliefs.items()}
        chance = self._sampler._chance(rows)
        left = np.ones(len(rows), dtype=bool)
        chosen: list[np.ndarray] = []
        for _ in range(min(count, len(rows))):
            now = {w: (b.mean, np.sqrt(np.maximum(variance[w], 0) + self._models.noise(w))) for w, b in beliefs.items()}
            value = np.where(left, self._value(before, now, self._improvement, chance), -1.0)
            best = int(np.argmax(value))
            left[best] = False
            chosen.append(rows[best])
            if len(chosen) == count:
                break
            for w, b in beliefs.items():  # the posterior covariance with the one that was chosen
                one = b.design[best : best + 1]
                covariance = self._models.kernel(w, one, b.design)[0] - half[w][:, best] @ half[w]
                step = covariance / math.sqrt(max(variance[w][best], 0.0) + self._models.noise(w))
                variance[w] = variance[w] - step * step
                half[w] = np.vstack([half[w], step])
            if chance[best] < _LIKELY:
                continue
            point = [
                before[w][best] if w in before else self._models.scale(w).back(beliefs[w].mean[best : best + 1])[0]
                for w in self._objectives
            ]
            self._front = np.concatenate([self._front, [point]])
            self._improvement = Improvement(self._front, self._reference)
        return chosen


def _not_in(rows: np.ndarray, known: set[bytes]) -> np.ndarray:
    return rows[[row.tobytes() not in known for row in rows]] if len(rows) else rows


def _nearest_front(points: np.ndarray, feasible: np.ndarray) -> np.ndarray:
    """Which rows the models know: all, or those of the first ranks and a spread of the others."""
    if len(points) <= ROWS:
        return np.arange(len(points))
    rank = moocore.pareto_rank(points) + np.where(feasible, 0, len(points))
    order = np.argsort(rank, kind="stable")
    near, far = order[: ROWS // 2], order[ROWS // 2 :]
    spread = far[np.linspace(0, len(far) - 1, ROWS - len(near)).astype(int)]
    return np.sort(np.concatenate([near, spread]))
