"""The finalists of a search brought to their final weights by a cluster's workers, each by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixnas.evaluators.protocol import Apart, Evaluator, EvaluatorSpec, Metric, Outcome, Request, attempt, finished
from mixnas.search.engines.on_ray.driver import Driver, Work, pickled
from mixnas.search_space.errors import StoppedEarly
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import SILENT, Report

_TRIES = 3


@dataclass(frozen=True, slots=True)
class FinishingSpec:
    """Makes an evaluator whose evaluations are `Evaluator.finish` of another's.

    Attributes:
        spec: Of that other.
    """

    spec: EvaluatorSpec

    def open(self) -> FinishingEvaluator:
        """Make it."""
        return FinishingEvaluator(self.spec.open(), self)


class FinishingEvaluator:
    """See `FinishingSpec`."""

    metrics: Mapping[str, Metric] = {}
    finishing = "nothing"

    def __init__(self, evaluator: Evaluator, spec: FinishingSpec) -> None:
        self._evaluator, self.spec = evaluator, spec

    @property
    def device(self) -> str:
        """See `Evaluator`."""
        return self._evaluator.device

    def prepare(self, report: Report = SILENT, should_stop: Callable[[], bool] | None = None) -> None:
        """See `Evaluator`."""
        self._evaluator.prepare(report, should_stop)

    def cheap(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """See `Evaluator`."""
        return {}

    def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """The outcomes have networks and no metrics."""
        return [attempt(lambda asked: finished(self._evaluator, asked), one) for one in requests]

    def finish(
        self, architecture: Any, report: Report = SILENT, should_stop: Callable[[], bool] | None = None
    ) -> Network:
        """See `Evaluator`."""
        return self._evaluator.finish(architecture, report, should_stop)


@dataclass(slots=True)
class _Finalist:
    number: int
    request: Request
    tries: int = 0

    @property
    def proposal(self) -> _Finalist:
        return self


class _Finishing:
    """What `Driver` asks and tells: as a session with its errands, whose trials are the finalists."""

    def __init__(self, requests: Sequence[Request], total: int, should_stop: Callable[[], bool]) -> None:
        self._waiting = deque(_Finalist(i, request) for i, request in enumerate(requests))
        self._should_stop = should_stop
        self.ended = total - len(requests)
        self.ready: deque[tuple[int, Outcome]] = deque()

    waiting = 0  # each goes alone in any case

    @property
    def left(self) -> int:
        return len(self._waiting)

    @property
    def evaluated(self) -> int:
        return self.ended

    @property
    def over(self) -> bool:
        return not self._waiting or self._should_stop()

    def seconds(self) -> float | None:
        return None

    def next(self, count: int) -> list[_Finalist]:
        return [] if self.over else [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]

    def done(self, one: _Finalist, outcome: Outcome) -> None:
        self.ended += 1
        self.ready.append((one.number, outcome))

    def late(self, one: _Finalist, reason: str, seconds: float) -> None:
        self.done(one, Outcome(failure=reason, seconds=seconds))

    def back(self, one: _Finalist) -> None:
        self._waiting.appendleft(one)

    def lost(self, one: _Finalist, reason: str, *, blamed: bool = True) -> None:
        one.tries += 1
        if one.tries < _TRIES:
            self.back(one)
        else:
            self.done(one, Outcome(failure=f"{reason}, {one.tries} times"))


def finish_on_ray(
    work: Work,
    evaluator: Evaluator,
    requests: Sequence[Request],
    total: int,
    report: Report = SILENT,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Outcome]]:
    """See `evaluators.workers.finish_all`; the threads of each training are those of a worker.

    Raises:
        NasError: See `Driver.serve`.
        MachineError: Ray, or what of it runs on this machine, ended.
        StoppedEarly: `should_stop` said so.
    """
    spec = evaluator.elsewhere() if isinstance(evaluator, Apart) else evaluator.spec
    finishing = _Finishing(requests, total, should_stop)
    if not requests:
        return
    with Driver(own=False) as driver:
        work = replace(work, spec=pickled(FinishingSpec(spec)), through="loop", limit=None)
        if driver.connect(work, None, should_stop):
            for _ in driver.steps(finishing, finishing):
                while finishing.ready:
                    yield finishing.ready.popleft()
                    report(finishing.ended, total)
                if should_stop():
                    break
    if should_stop() and finishing.ended < total:
        raise StoppedEarly(f"stopped after {finishing.ended} of {total} candidates.")
