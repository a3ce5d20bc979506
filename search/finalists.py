"""Which trials are worth finishing, by what is believed of them: what a search saw of an architecture is noisy.

A super-network's judgement, or one short training, is one observation. The models of the strategy `predictor` know all
of a search's trials together, and how far one observation is to be trusted. The front as it was seen comes first. Where
that leaves places, those that are believed to belong there get them, one after the other, each for the hypervolume that
it is expected to add to those before it: what is uncertain near the front has a chance.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mixnas.search.finish import choose_finalists, nearest_to_bounds
from mixnas.search.promotion import best_keys
from mixnas.search.strategies.acquisition import Improvement, shortfall_of_known
from mixnas.search.strategies.modelling import ROWS, Models, Wanted
from mixnas.search.study.pareto import as_minimised, non_dominated_minimised
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search_space.space import SearchSpace

_FEWEST = 8  # trials from which on there are models
_MARGIN = 0.1  # of an objective's extent, by which the reference lies beyond its worst


def choose_believed(
    results: Results, space: SearchSpace, count: int, cheap: Collection[str], provisional: Collection[str] = ()
) -> list[TrialRecord]:
    """Finalists: the front, and whoever is expected to add most to it.

    Args:
        results: The trials of the search.
        space: Of their architectures.
        count: At most so many.
        cheap: Metrics that are known without evaluating, hence as they are.
        provisional: See `finish.choose_finalists`; where bounds on these leave places, those nearest to them get them.
    """
    records = [record for record in results.records if results.feasible(record)]
    objectives = results.objectives
    if len(records) < _FEWEST or all(o.name in cheap for o in objectives):
        return choose_finalists(results, count, provisional)
    values = np.array([results.values(record) for record in records])
    points = as_minimised(values, objectives)
    known = _nearest(points)
    records, points = [records[i] for i in known], points[known]
    front = {record.id for record in choose_finalists(results, count)}
    first = [i for i, record in enumerate(records) if record.id in front]
    chosen = [records[i] for i in _most_expected(results, space, records, points, count, cheap, first)]
    return chosen + nearest_to_bounds(results, provisional, count - len(chosen))


def _nearest(points: np.ndarray) -> np.ndarray:
    """Rows, as many as models know: front after front."""
    if len(points) <= ROWS:
        return np.arange(len(points))
    left, taken = np.arange(len(points)), np.empty(0, dtype=np.intp)
    while len(left) and len(taken) < ROWS:
        front = non_dominated_minimised(points[left])
        taken = np.concatenate([taken, left[front]])
        left = left[~front]
    return np.sort(taken[:ROWS])


def _most_expected(
    results: Results,
    space: SearchSpace,
    records: list[TrialRecord],
    points: np.ndarray,
    count: int,
    cheap: Collection[str],
    first: list[int],
) -> list[int]:
    """Which of the records, `first` first, then one after the other, each believed at its mean by the next."""
    wanted = [Wanted.of(objective) for objective in results.objectives]
    known = {w: points[:, i] for i, w in enumerate(wanted) if w.name in cheap}
    modelled = {w: points[:, i] for i, w in enumerate(wanted) if w.name not in cheap}
    rows = space.encode_many([record.architecture for record in records])
    models = Models(space, list(modelled), list(known))
    nothing = {w: np.empty(0) for w in known}
    models.learn(rows, modelled, known, rows[:0], nothing, len(rows))
    beliefs = models.beliefs(rows, known, exact=True)
    means = np.stack([known[w] if w in known else models.scale(w).back(beliefs[w].mean) for w in wanted], axis=1)
    extent = points.max(axis=0) - points.min(axis=0)
    reference = points.max(axis=0) + _MARGIN * np.where(extent > 0, extent, 1.0)
    left = np.ones(len(records), dtype=bool)
    left[first] = False
    chosen = list(first)
    while len(chosen) < min(count, len(records)):
        improvement = Improvement(means[chosen].reshape(-1, len(wanted)), reference)
        shortfalls = []
        for i, w in enumerate(wanted):
            bounds = improvement.bounds[i]
            if w in known:
                shortfalls.append(shortfall_of_known(bounds, known[w]))
            else:
                shortfalls.append(models.scale(w).shortfall(bounds, beliefs[w].mean, beliefs[w].deviation))
        expected = np.where(left, improvement(shortfalls), -1.0)
        best = int(np.argmax(expected))
        if expected[best] <= 0:
            break
        left[best] = False
        chosen.append(best)
    return chosen


def furthest(results: Results, count: int) -> list[TrialRecord]:
    """Finalists of a search in rungs in which no training came to its end: the best of those that came furthest.

    Args:
        results: The trials of the search.
        count: At most so many.
    """
    keeping = [record for record in results.records if results.feasible(record)]
    share = max((record.share for record in keeping), default=0.0)
    found = {record.number: record for record in keeping if record.share == share}
    values = {number: as_minimised(np.array(results.values(r)), results.objectives)[0] for number, r in found.items()}
    return [found[number] for number in best_keys({number: (point, 0.0) for number, point in values.items()}, count)]
