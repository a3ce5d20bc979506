"""What a search has found: its trials, the Pareto front among them, and the tables that people read."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mixnas.search.study.objectives import Comparison, Objective
from mixnas.search.study.pareto import REFERENCE_TRIALS, Reference, as_minimised, knee
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import shown

Status = Literal["done", "failed", "interrupted", "duplicate", "infeasible", "running"]
INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Stretch:
    """What came of a part of a trial's training.

    Attributes:
        share: Of a whole training, that it had behind it then.
        metrics: What the evaluator returned; empty where it failed.
        seconds: Time of the evaluation.
        failure: Why it failed; then the trial is what it was before.
        retries: Why it was tried again, each time that it was.
    """

    share: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str = ""
    retries: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """Plain data; what is empty is left out."""
        plain = {"share": self.share, "metrics": dict(self.metrics), "seconds": self.seconds}
        more = {"failure": self.failure, "retries": list(self.retries)}
        return plain | {name: value for name, value in more.items() if value}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Stretch:
        """The inverse.

        Raises:
            TypeError, ValueError: It is none.
        """
        found = cls(**{**plain, "retries": tuple(map(str, plain.get("retries", ())))})
        for value in (found.share, found.seconds, *found.metrics.values()):
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise TypeError(f"a number of a stretch of its training is {shown(value)}")
        if not 0 < found.share <= 1:
            raise ValueError(f"a stretch of its training ends at {found.share}")
        return found


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: Its number in the study.
        status: "done", "failed" (evaluated, with a reason), "interrupted" (the process ended; may be evaluated again),
            "duplicate" and "infeasible" (proposed, not evaluated, not counted), or "running".
        id: Id of the architecture; empty when the process ended before there was one.
        architecture_json: Its canonical JSON.
        metrics: Everything that the evaluator returned.
        seconds: Time of the evaluation.
        failure: Why it failed, was interrupted or not evaluated.
        retries: Why it was tried again, each time that it was.
        queued: Whether the run wanted it beside what its search was given (`SearchStudy.queue`).
        share: Of a whole training, that its metrics are of.
        stretches: What came of each part of its training, where it was trained in parts (`search.promotion`).
    """

    number: int
    status: Status
    id: str = ""
    architecture_json: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str = ""
    retries: tuple[str, ...] = ()
    queued: bool = False
    share: float = 1.0
    stretches: tuple[Stretch, ...] = ()

    def trained_on(self, stretches: Iterable[Stretch]) -> TrialRecord:
        """With what came of more of its training; its metrics are those of the last part that did not fail."""
        known = (*(self.stretches or (Stretch(self.share, self.metrics, self.seconds),)), *stretches)
        last = [stretch for stretch in known if not stretch.failure][-1]
        seconds = sum(stretch.seconds for stretch in known)
        return replace(self, metrics=last.metrics, share=last.share, seconds=seconds, stretches=known)

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture itself."""
        return Architecture.from_canonical(json.loads(self.architecture_json))  # its operators may be another's

    @property
    def whole(self) -> bool:
        """Whether it was trained to the end: nothing else is compared with those that were."""
        return self.share >= 1

    @property
    def evaluated(self) -> bool:
        """Whether it counts toward the budget, unless it was queued."""
        return self.status in ("done", "failed")


class Results:
    """The trials of a study, the front kept up to date with each that is added.

    Args:
        objectives: In the order of the study's values.
        constraints: What a member of the front has to satisfy.
        records: Trials so far.
        reference: The box of the hypervolume, once it is fixed.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        constraints: Sequence[Comparison] = (),
        records: Iterable[TrialRecord] = (),
        reference: Reference | None = None,
    ) -> None:
        self.objectives = tuple(objectives)
        self.constraints = tuple(constraints)
        self.reference = reference
        self.records: list[TrialRecord] = []
        self.counts: Counter[str] = Counter()
        self.queued = 0  # how many of those that were evaluated are beside the search's budget
        self._first_values: list[list[float]] = []
        self._front: list[TrialRecord] = []
        self._front_points = np.empty((0, len(self.objectives)))  # minimised
        self._hypervolume: float | None = None
        for record in records:
            self.add(record)

    def values(self, record: TrialRecord) -> list[float]:
        """The objective values of a finished trial."""
        return [float(record.metrics[o.name]) for o in self.objectives]

    def feasible(self, record: TrialRecord) -> bool:
        """Whether a finished trial satisfies all constraints, by its metrics of whatever training it had."""
        return record.status == "done" and all(c.holds(record.metrics) for c in self.constraints)

    def add(self, record: TrialRecord) -> None:
        """Take a trial in; fixes the hypervolume's box when it is the one that the rule waits for."""
        self.records.append(record)
        self.counts[record.status] += 1
        self.queued += record.queued and record.evaluated
        if record.status != "done":
            return
        if self.reference is None:
            first = record.stretches[0].metrics if record.stretches else record.metrics
            self._first_values.append([float(first[o.name]) for o in self.objectives])
            if len(self._first_values) >= REFERENCE_TRIALS:
                self.reference = Reference.of(np.array(self._first_values), self.objectives)
        if self.feasible(record) and record.whole:
            self._add_to_front(record)

    def replace(self, record: TrialRecord) -> None:
        """Take in what a trial has become by more of its training."""
        at = next(i for i in range(len(self.records) - 1, -1, -1) if self.records[i].number == record.number)
        before, self.records[at] = self.records[at], record
        if record.whole and not before.whole and self.feasible(record):
            self._add_to_front(record)

    def agree(self, reference: Reference) -> None:
        """Take the box that others have fixed."""
        self.reference, self._hypervolume = reference, None

    def _add_to_front(self, record: TrialRecord) -> None:
        point = as_minimised(np.array(self.values(record)), self.objectives)[0]
        if np.isnan(point).any() or (self._front_points <= point).all(axis=1).any():
            return
        stays = ~(self._front_points >= point).all(axis=1)
        self._front = [member for member, keep in zip(self._front, stays, strict=True) if keep] + [record]
        self._front_points = np.vstack([self._front_points[stays], point])
        self._hypervolume = None

    @property
    def evaluated(self) -> int:
        """Trials done and failed. Without the `queued`, they count toward the budget of the search."""
        return self.counts["done"] + self.counts["failed"]

    def front(self) -> list[TrialRecord]:
        """The feasible trials that no feasible trial dominates, the best of the first objective first.

        Of those alone that had a whole training.
        """
        order = np.lexsort(self._front_points.T[::-1])
        return [self._front[i] for i in order]

    def hypervolume(self) -> float | None:
        """Of the front, in the box of `Reference`; None until `REFERENCE_TRIALS` trials have fixed that box."""
        if self.reference is None:
            return None
        if self._hypervolume is None:
            values = np.array([self.values(record) for record in self._front]).reshape(-1, len(self.objectives))
            self._hypervolume = self.reference.hypervolume(values, self.objectives)
        return self._hypervolume

    def knee(self) -> TrialRecord | None:
        """The front's knee (see `pareto.knee`); None when the front is empty."""
        front = self.front()
        return front[knee(np.array([self.values(record) for record in front]), self.objectives)] if front else None

    def metric_names(self) -> list[str]:
        """Every metric of any trial, the objectives first."""
        names = dict.fromkeys(o.name for o in self.objectives)
        for record in self.records:
            names.update(dict.fromkeys(record.metrics))
        return list(names)

    def to_csv(self) -> str:
        """All trials as a table, one line each, the architecture last."""
        metrics = self.metric_names()
        front = {record.number for record in self._front}
        parts = any(record.stretches for record in self.records)
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        trained = ["trained"] if parts else []
        first = ["trial", "id", "status", "pareto", "feasible", *trained]
        writer.writerow([*first, *metrics, "seconds", "failure", "architecture"])
        for r in sorted(self.records, key=lambda r: r.number):  # several may have been in flight together
            done = r.status == "done"
            cells: list[object] = [r.number in front, self.feasible(r)] if done else ["", ""]
            cells += [r.share if done else ""] if parts else []
            values = [r.metrics.get(name, "") for name in metrics]
            writer.writerow([r.number, r.id, r.status, *cells, *values, r.seconds, r.failure, r.architecture_json])
        return out.getvalue()
