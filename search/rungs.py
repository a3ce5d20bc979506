"""Finishing as a search: many finalists are begun, and the best of them are trained to the end.

The rule is `halving`'s; this is what it means for networks in a run's folder. After each rung a network is written with
what it was found to be, so that a search that was killed goes on with the rung that it was in, decides as it would have
decided, and trains nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixnas.evaluators.protocol import Evaluator, InParts, Outcome, Part, Request, attempt
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.workers import finish_all
from mixnas.search.finish import RUNGS, FinalNetworks
from mixnas.search.halving import Halving, Rung, best_first
from mixnas.search.study.objectives import Comparison, Objective
from mixnas.search.study.pareto import as_minimised, non_dominated_minimised
from mixnas.search.study.results import TrialRecord
from mixnas.search_space.errors import StoppedEarly
from mixnas.search_space.files import stamped, write_json
from mixnas.search_space.formats.safetensors import load_network, read_extra, save_network
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import Report


class NetworksInRungs(FinalNetworks):
    """`FinalNetworks` that are trained in rungs.

    Args:
        folder, task, task_plain, recipe, finish: See `FinalNetworks`.
        halving: How many are trained how far.
        networks: How many could be trained to the end instead, in the same number of steps.
        objectives: What they are compared by: the task's metric and loss as found after a rung, the rest as known.
        constraints: Whoever breaks one goes on only where too few keep all.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        task_plain: Any,
        recipe: Any,
        *,
        halving: Halving,
        networks: int,
        objectives: Sequence[Objective],
        constraints: Sequence[Comparison] = (),
        finish: Callable[..., Iterable[tuple[int, Outcome]]] = finish_all,
    ) -> None:
        super().__init__(folder, task, task_plain, recipe, finish)
        self._halving, self._networks = halving, networks
        self._objectives, self._constraints = tuple(objectives), tuple(constraints)

    def finish(
        self, records: Sequence[TrialRecord], evaluator: Evaluator, report: Report, should_stop: Callable[[], bool]
    ) -> list[Network | str]:
        """See `FinalNetworks`.

        Those that no other dominates are judged on the test split though their training ended early, and have a network
        too; of the others that were left behind, the reason in its place says so.
        """
        if not isinstance(evaluator, InParts) or self._halving.rungs == 1:
            return super().finish(records, evaluator, report, should_stop)
        ladder = self._halving.ladder(self._networks, len(records))
        racing = list(range(len(records)))
        why: dict[int, str] = {}
        for number, rung in enumerate(ladder):
            racing = self._best(records, racing, number)[: rung.candidates]
            self._climb(records, racing, number, rung, evaluator, report, should_stop, why)
            racing = [i for i in racing if i not in why]
        left = [i for i in range(len(records)) if i not in why]
        last = {i: self._history(records[i].id)[-1] for i in left}
        points = np.array([self._point(records[i], last[i]) for i in left]).reshape(-1, len(self._objectives))
        kept = {i for i, stays in zip(left, non_dominated_minimised(points), strict=True) if stays} | set(racing)
        found: list[Network | str] = []
        for i, record in enumerate(records):
            found.append(why[i] if i in why else self._ended(record) if i in kept else self._left_behind(last[i]))
        return found

    def _left_behind(self, last: dict[str, Any]) -> str:
        metric = self._task.metric
        return (
            f"left behind after {last['share']:.0%} of its training, with {metric} {last['validation'][metric]:.4g}: "
            "others promised more"
        )

    def _climb(
        self,
        records: Sequence[TrialRecord],
        racing: Sequence[int],
        number: int,
        rung: Rung,
        evaluator: Evaluator,
        report: Report,
        should_stop: Callable[[], bool],
        why: dict[int, str],
    ) -> None:
        """Train those that race through a rung, as far as that is not done; into `why` goes what could not be."""
        left = [i for i in racing if len(self._history(records[i].id)) <= number]
        why |= {i: reason for i in left if (reason := self._why_not(records[i].id))}  # in this rung, before
        left = [i for i in left if i not in why]
        if not left:
            return
        total, name = len(racing), f"{evaluator.finishing} {number + 1} of {self._halving.rungs}"
        with report.phase(name, total, unit="networks", initial=total - len(left)) as phase:
            if should_stop():
                raise StoppedEarly(f"stopped in rung {number + 1} of {self._halving.rungs}.")
            requests = [
                Request(
                    records[i].architecture,
                    part=Part(rung.begun, rung.until, load_network(self.path(records[i].id)) if number else None),
                )
                for i in left
            ]
            for at, outcome in self._finish(evaluator, requests, total, phase, should_stop):
                if reason := self._written(records[left[at]], outcome, rung.until):
                    why[left[at]] = reason

    def _written(self, record: TrialRecord, outcome: Outcome, share: float) -> str:
        """Judge a network on the validation split after a rung and keep it; returns why that could not be."""
        judged: dict[str, Any] = {}

        def judge(request: Request) -> Outcome:
            if outcome.network is not None:
                judged.update(self._judge(outcome.network, ("validation",)))
            return outcome

        ended = attempt(judge, Request(record.architecture))
        if ended.network is None:
            write_json(self._failure(record.id), stamped({"failure": ended.failure, "recipe": self._recipe}))
            return ended.failure
        own = {"share": share, "validation": judged["validation"]}
        judged[RUNGS] = [*self._history(record.id), own]
        save_network(self.path(record.id), ended.network, judged)
        self._failure(record.id).unlink(missing_ok=True)
        return ""

    def _history(self, identity: str) -> list[dict[str, Any]]:
        """What a network was found to be after each rung that it went through by this recipe."""
        path = self.path(identity)
        extra = read_extra(path) if path.exists() else {}
        return list(extra.get(RUNGS, ())) if extra.get("recipe") == self._recipe else []

    def _best(self, records: Sequence[TrialRecord], racing: Sequence[int], number: int) -> list[int]:
        """Those that race, the best by the rung before first; at the beginning as they were chosen."""
        if not number:
            return list(racing)
        found = {i: self._history(records[i].id)[number - 1] for i in racing}
        missed = {i: self._missed(records[i], found[i]) for i in racing}
        keeping = [i for i in racing if missed[i] <= 0]
        points = np.array([self._point(records[i], found[i]) for i in keeping]).reshape(-1, len(self._objectives))
        breaking = sorted((i for i in racing if missed[i] > 0), key=lambda i: missed[i])
        return [*(keeping[i] for i in best_first(points)), *breaking]

    def _metrics(self, record: TrialRecord, found: dict[str, Any]) -> dict[str, float]:
        return {**record.metrics, **found["validation"]}

    def _point(self, record: TrialRecord, found: dict[str, Any]) -> np.ndarray:
        metrics = self._metrics(record, found)
        return as_minimised(np.array([metrics[o.name] for o in self._objectives]), self._objectives)[0]

    def _missed(self, record: TrialRecord, found: dict[str, Any]) -> float:
        """By how much the constraint is broken that is broken most; 0 where all are kept."""
        metrics = self._metrics(record, found)
        broken = [c.violation(metrics) for c in self._constraints if not c.holds(metrics)]
        return max(broken, default=0.0)

    def _ended(self, record: TrialRecord) -> Network | str:
        """Judge a network whose training has ended on the test split, if that is not done."""
        known = self._known(record.id)
        if known is not None:
            return known
        history = self._history(record.id)
        network = load_network(self.path(record.id))
        judged: dict[str, Any] = {}

        def judge(request: Request) -> Outcome:
            judged.update(self._judge(network, ("test",)))
            return Outcome(network=network)

        ended = attempt(judge, Request(record.architecture))
        if ended.network is None:
            return ended.failure
        extra = {**judged, "validation": history[-1]["validation"], RUNGS: history}
        save_network(self.path(record.id), network, extra)
        return load_network(self.path(record.id))
