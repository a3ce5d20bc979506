"""After the search: which candidates are trained on, what came of them, and the front that is the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import moocore
import numpy as np

from mixnas.search.study.objectives import Comparison, Objective
from mixnas.search.study.pareto import as_minimised, knee, non_dominated
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search_space.architecture import Architecture


def choose_finalists(results: Results, count: int) -> list[TrialRecord]:
    """Members of the front that together span it: the best of each objective, then whichever adds most hypervolume.

    Args:
        results: The trials of the search.
        count: At most so many.
    """
    front = results.front()
    if len(front) <= count:
        return front
    points = as_minimised(np.array([results.values(record) for record in front]), results.objectives)
    span = points.max(axis=0) - points.min(axis=0)
    points = (points - points.min(axis=0)) / np.where(span > 0, span, 1)
    reference = np.full(points.shape[1], 1.1)
    chosen = list(dict.fromkeys(int(i) for i in points.argmin(axis=0)))[:count]
    while len(chosen) < count:
        rest = [i for i in range(len(front)) if i not in chosen]
        gains = [moocore.hypervolume(points[[*chosen, i]], ref=reference) for i in rest]
        chosen.append(rest[int(np.argmax(gains))])
    return [front[i] for i in sorted(chosen)]


@dataclass(frozen=True)
class Finalist:
    """A candidate that was trained to the end and measured.

    Attributes:
        architecture: Which.
        trial: Number of its trial in the study.
        metrics: Final: on the validation split (objectives and constraints refer to these), on the test split
            (`test_...`), measured latency with its interval, costs.
        searched: What the search went by: inherited or stand-alone metrics, predicted or measured latency.
        predicted: Predicted latency with its interval, where a predictor answered.
    """

    architecture: Architecture
    trial: int
    metrics: Mapping[str, float]
    searched: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """An entry of `pareto.json`."""
        return {
            "id": self.architecture.id,
            "trial": self.trial,
            "metrics": dict(self.metrics),
            "searched": dict(self.searched),
            "predicted": dict(self.predicted),
            "architecture": self.architecture.to_dict(),
        }


def final_front(
    finalists: Sequence[Finalist], objectives: Sequence[Objective], constraints: Sequence[Comparison]
) -> dict[str, Any]:
    """The finalists as plain data: the feasible ones that no other dominates, and the rest with the reason.

    Returns:
        "front" (best of the first objective first), "others" (each with a "reason"), "knee" (an id or None).
    """
    values = np.array([[f.metrics[o.name] for o in objectives] for f in finalists]).reshape(-1, len(objectives))
    broken = {i: [c for c in constraints if not c.holds(f.metrics)] for i, f in enumerate(finalists)}
    feasible = [i for i in range(len(finalists)) if not broken[i]]
    front = [feasible[i] for i in np.flatnonzero(non_dominated(values[feasible], objectives))] if feasible else []
    front.sort(key=lambda i: tuple(as_minimised(values[i], objectives)[0]))
    others = []
    for i, finalist in enumerate(finalists):
        if i not in front:
            reason = f"violates {', '.join(map(str, broken[i]))}" if broken[i] else "dominated"
            others.append({**finalist.to_plain(), "reason": reason})
    return {
        "front": [finalists[i].to_plain() for i in front],
        "others": others,
        "knee": finalists[front[knee(values[front], objectives)]].architecture.id if front else None,
    }


def architecture_of(record: TrialRecord) -> Architecture:
    """The architecture of a finished trial."""
    return Architecture.from_dict(json.loads(record.architecture_json), f"trial {record.number}")
