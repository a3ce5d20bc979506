"""Engines: what carries out the trials of a study.

`LocalEngine` evaluates one architecture after the other in this process. An engine for a cluster implements the same
`Engine.run`: it asks and tells here, in the process that holds the run directory, and has `evaluate` carried out in
its workers; nothing else of a search needs to know.
"""

from __future__ import annotations

import gc
import logging
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mixnas.search.run.stopping import StopSignal
from mixnas.search.study.results import INTERRUPTED, TrialRecord
from mixnas.search.study.study import Proposal, SearchStudy, SpaceExhausted
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import NasError, StoppedEarly

_logger = logging.getLogger(__name__)

Evaluator = Callable[[Architecture], Mapping[str, float]]

_SAME_FAILURES = 5  # so many failures from the start, all for the same reason, are the set-up's fault
_CHECKPOINT_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much a search may spend.

    Attributes:
        trials: Evaluations (done or failed) in the whole study, with those of earlier sessions.
        seconds: Wall-clock time of this session; None for no limit.
    """

    trials: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one evaluation: metrics, or the reason of its failure."""

    metrics: Mapping[str, float]
    failure: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a search ended: "trials", "time" or "exhausted", and a sentence that says so."""

    reason: str
    message: str


class Report(Protocol):
    """What an engine tells of its progress; `progress.Phase` is one."""

    def __call__(self, done: float, total: float | None = None, **info: object) -> None:
        """Say how much is done of how much."""


def evaluate(evaluator: Evaluator, architecture: Architecture) -> Outcome:
    """Evaluate one architecture; whatever goes wrong in it becomes the reason of this one's failure.

    Raises:
        StoppedEarly: The evaluator was asked to stop.
    """
    started = time.perf_counter()
    metrics: Mapping[str, float] = {}
    try:
        metrics = evaluator(architecture)
        failure = _unusable(metrics)
    except StoppedEarly:
        raise
    except Exception as error:
        failure = _reason(error)
        _logger.debug("architecture %s failed", architecture.id, exc_info=True)
    if failure.startswith("out of memory"):
        _free_memory()
    return Outcome({} if failure else metrics, failure, time.perf_counter() - started)


def _unusable(metrics: Mapping[str, float]) -> str:
    for name, value in metrics.items():
        try:
            finite = math.isfinite(value)
        except (TypeError, ValueError):
            return f"metric {name} is {type(value).__name__}, not a number"
        if not finite:
            return f"metric {name} is {value}"
    return ""


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    # torch.OutOfMemoryError by its name, so that a search without torch does not import it
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {text[:300]}".rstrip(": ")
    return f"{type(error).__name__}: {text[:500]}".rstrip(": ")


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


class Engine(Protocol):
    """Carries out trials of a study until the budget is spent."""

    def run(
        self,
        study: SearchStudy,
        evaluator: Evaluator,
        budget: Budget,
        *,
        stop: StopSignal | None = None,
        report: Report | None = None,
        on_trial: Callable[[TrialRecord], None] | None = None,
        checkpoint: Callable[[], None] | None = None,
    ) -> Finish:
        """See `LocalEngine.run`."""


class LocalEngine:
    """One architecture after the other, in this process."""

    def run(
        self,
        study: SearchStudy,
        evaluator: Evaluator,
        budget: Budget,
        *,
        stop: StopSignal | None = None,
        report: Report | None = None,
        on_trial: Callable[[TrialRecord], None] | None = None,
        checkpoint: Callable[[], None] | None = None,
    ) -> Finish:
        """Ask, evaluate and tell until the budget is spent.

        Args:
            study: The study; what it already holds counts toward `budget.trials`.
            evaluator: Metrics of an architecture; raising means that this trial failed.
            budget: Trials and time.
            stop: Asked between trials; None to leave Ctrl-C as it is.
            report: Told of progress: evaluations done, of how many, failures, hypervolume.
            on_trial: Called with every finished trial in order, once it is safe on the disk (where trials are quick,
                several share one fsync, so that this comes up to a quarter of a second later, or with the next trial).
            checkpoint: Called every 15 seconds or so between trials (to write tables for people).

        Returns:
            Why it ended.

        Raises:
            StoppedEarly: `stop` was requested; the trial in progress was finished first.
            KeyboardInterrupt: The second Ctrl-C; the trial in progress is marked as interrupted.
            NasError: The first trials all failed for the same reason, or the evaluator leaves out a metric.
            InfeasibleError: See `SearchStudy.ask`.
        """
        session = _Session(study, evaluator, budget, stop or StopSignal(), report, on_trial, checkpoint)
        try:
            return session.run()
        finally:
            study.sync()
            session.report_safe_trials()


class _Session:
    """One run of the local engine."""

    def __init__(
        self,
        study: SearchStudy,
        evaluator: Evaluator,
        budget: Budget,
        stop: StopSignal,
        report: Report | None,
        on_trial: Callable[[TrialRecord], None] | None,
        checkpoint: Callable[[], None] | None,
    ) -> None:
        self.study, self.evaluator, self.budget, self.stop = study, evaluator, budget, stop
        self.report, self.on_trial, self.checkpoint = report, on_trial, checkpoint
        self.started = self.last_checkpoint = time.monotonic()
        self.unreported: deque[TrialRecord] = deque()
        self.first_failures: list[str] | None = []

    def run(self) -> Finish:
        while (finish := self._finished()) is None:
            self._maybe_checkpoint()
            try:
                with self.stop.shield():
                    proposal = self.study.ask()
            except SpaceExhausted as end:
                return Finish("exhausted", str(end))
            record = self._carry_out(proposal)
            self.unreported.append(record)
            self.report_safe_trials()
            if self.first_failures is not None:
                self.first_failures = _check_first(self.first_failures, record)
        return finish

    def report_safe_trials(self) -> None:
        """Hand over the trials that not even a power cut can lose any more."""
        while self.unreported and self.study.synced:
            record = self.unreported.popleft()
            if self.on_trial is not None:
                self.on_trial(record)

    def _finished(self) -> Finish | None:
        results, budget = self.study.results, self.budget
        done = results.evaluated
        if self.report is not None:
            self.report(done, budget.trials, failed=results.counts["failed"], hypervolume=results.hypervolume())
        if done >= budget.trials:
            return Finish("trials", f"{done} trials evaluated.")
        if budget.seconds is not None and time.monotonic() - self.started >= budget.seconds:
            return Finish("time", f"the time is up after {done} of {budget.trials} trials.")
        if self.stop.requested:
            raise StoppedEarly(f"stopped after {done} of {budget.trials} trials.")
        return None

    def _maybe_checkpoint(self) -> None:
        if self.checkpoint is not None and time.monotonic() - self.last_checkpoint >= _CHECKPOINT_SECONDS:
            self.checkpoint()
            self.last_checkpoint = time.monotonic()

    def _carry_out(self, proposal: Proposal) -> TrialRecord:
        study = self.study
        started = time.perf_counter()
        try:
            outcome = evaluate(self.evaluator, proposal.architecture)
        except (StoppedEarly, KeyboardInterrupt):
            with self.stop.shield():
                study.tell_failure(proposal, INTERRUPTED, time.perf_counter() - started)
            raise
        with self.stop.shield():
            if outcome.failure:
                record = study.tell_failure(proposal, outcome.failure, outcome.seconds)
                _logger.warning("trial %d (%s) failed: %s", record.number, record.id, record.failure)
                return record
            needed = [o.name for o in study.results.objectives] + [c.metric for c in study.results.constraints]
            missing = [name for name in needed if name not in outcome.metrics]
            if missing:
                study.tell_failure(proposal, INTERRUPTED, outcome.seconds)
                raise NasError(
                    f"the evaluator gives no metric {missing[0]!r}, which an objective or a constraint needs. "
                    f"It gives: {', '.join(sorted(outcome.metrics)) or 'none'}."
                )
            return study.tell(proposal, outcome.metrics, outcome.seconds)


def _check_first(failures: list[str], record: TrialRecord) -> list[str] | None:
    """Collect the reasons while the session has only failed, and always for the same one (numbers aside)."""
    if record.status != "failed":
        return None
    failures = [*failures, record.failure]
    if len({re.sub(r"\d+", "#", reason) for reason in failures}) > 1:
        return None
    if len(failures) >= _SAME_FAILURES:
        raise NasError(f"the first {len(failures)} trials all failed for the same reason: {record.failure}")
    return failures
