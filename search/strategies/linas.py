"""LINAS (Cummings et al. 2022, "A Hardware-Aware Framework for Accelerating Neural Architecture Search Across
Modalities", section 3.3): evolution on predictors, whose best are evaluated, a population at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import moocore
import numpy as np
from optuna.samplers import BaseSampler
from optuna.study import Study

from mixnas.predictors.encoding import MaskedEncoding
from mixnas.search.strategies import STRATEGIES, Acceptable, Cheap, Question, Strategy
from mixnas.search.strategies.drawing import BatchSampler, crossed, mutated
from mixnas.search.strategies.history import History
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.settings import Between


@STRATEGIES.register("linas")
@dataclass(frozen=True, kw_only=True, slots=True)
class Linas(Strategy):
    """Ridge or support-vector regression of each objective, and NSGA-II on what they say.

    Attributes:
        population_size: Architectures of a batch, the first of which is random; and of the evolution.
        generations: Of the evolution on the predictors, for each batch.
    """

    population_size: Annotated[int, Between(4, 10_000)] = 50
    generations: Annotated[int, Between(1, 100_000)] = 100

    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """See `Strategy`."""
        return LinasSampler(question, acceptable, self)


class LinasSampler(BatchSampler):
    """See the module."""

    def __init__(self, question: Question, acceptable: Acceptable, config: Linas) -> None:
        super().__init__(question, acceptable)
        self._config = config
        self._signs = np.array([-1.0 if objective.maximise else 1.0 for objective in question.objectives])
        self._history = History(question.space, [objective.name for objective in question.objectives])
        self._encoding = MaskedEncoding([v.values for v in question.space.variables])

    def propose(self, study: Study, count: int, rng: np.random.Generator) -> list[Architecture]:
        """See `BatchSampler`: a whole population, whatever is asked for."""
        history, size = self._history, self._config.population_size
        history.update(study)
        known = history.known | {row.tobytes() for row in self._space.encode_many(list(self._decided))}
        first = len(history.done) < 4 or len(known) < size
        rows = self._space.sample_many(20 * size, rng) if first else self._evolve(rng)
        wanted = max(count, size - len(known)) if first else max(count, size)
        found: dict[bytes, Architecture] = {}
        for row in rows:
            key = row.tobytes()
            if key not in known and key not in found:
                architecture = self._space.decode(row)
                if self._acceptable(architecture):
                    found[key] = architecture
                    if len(found) == wanted:
                        break
        return list(found.values()) or [self._space.sample(rng)]

    def _evolve(self, rng: np.random.Generator) -> np.ndarray:
        """Encoded architectures, those that the predictors put first in front."""
        history, size = self._history, self._config.population_size
        values = history.values * self._signs
        x = self._encoding(history.done)
        models = [_regression(x, values[:, i]) for i in range(values.shape[1])]

        def predict(rows: np.ndarray) -> np.ndarray:
            encoded = self._encoding(rows)
            return np.stack([model.predict(encoded) for model in models], axis=1)

        rows = history.done[_best_first(values)[:size]]
        points = predict(rows)
        seen, seen_points = [rows], [points]
        for _ in range(self._config.generations):
            order = _best_first(points)
            rows, points = rows[order[:size]], points[order[:size]]
            rank = np.arange(len(rows))  # of two drawn the one that stands further in front
            pairs = np.sort(rng.integers(len(rows), size=(size, 2, 2)), axis=2)[:, :, 0]
            first, second = rows[rank[pairs[:, 0]]], rows[rank[pairs[:, 1]]]
            crossing = (rng.random(size) < 0.9)[:, None]
            children = np.where(crossing, crossed(self._space, first, second, rng), first)
            children = mutated(self._space, children, rng)
            of_children = predict(children)
            seen.append(children)
            seen_points.append(of_children)
            both, index = np.unique(np.concatenate([rows, children]), axis=0, return_index=True)
            rows, points = both, np.concatenate([points, of_children])[index]
        everything, index = np.unique(np.concatenate(seen), axis=0, return_index=True)
        return everything[_best_first(np.concatenate(seen_points)[index])]


def _regression(x: np.ndarray, y: np.ndarray) -> Any:
    """Ridge or support vectors, whichever predicts held-out rows better."""
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVR

    models = [
        TransformedTargetRegressor(RidgeCV(alphas=np.logspace(-3, 3, 13)), transformer=StandardScaler()),
        TransformedTargetRegressor(SVR(C=10.0, epsilon=0.02), transformer=StandardScaler()),
    ]
    folds = KFold(4, shuffle=True, random_state=0)
    scores = [cross_val_score(m, x, y, cv=folds, scoring="neg_mean_squared_error").mean() for m in models]
    return models[int(np.argmax(scores))].fit(x, y)


def _best_first(points: np.ndarray) -> np.ndarray:
    """Order of minimised points (rows, objectives): by rank of domination, then by crowding (Deb et al. 2002)."""
    if points.shape[1] == 1:
        return np.argsort(points[:, 0], kind="stable")
    rank = np.asarray(moocore.pareto_rank(points))
    crowding = np.zeros(len(points))
    for r in np.unique(rank):
        members = np.flatnonzero(rank == r)
        for column in points[members].T:
            order = members[np.argsort(column, kind="stable")]
            values = np.sort(column)
            crowding[order[[0, -1]]] = np.inf
            if values[-1] > values[0]:
                crowding[order[1:-1]] += (values[2:] - values[:-2]) / (values[-1] - values[0])
    return np.lexsort([-crowding, rank])
