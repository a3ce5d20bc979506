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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mixnas.search.results import INTERRUPTED, TrialRecord
from mixnas.search.stopping import StopSignal
from mixnas.search.study import Proposal, SearchStudy, SpaceExhausted
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
            on_trial: Called with every finished trial, once it is safe on the disk.
            checkpoint: Called every 15 seconds or so between trials (to write tables for people).

        Returns:
            Why it ended.

        Raises:
            StoppedEarly: `stop` was requested; the trial in progress was finished first.
            KeyboardInterrupt: The second Ctrl-C; the trial in progress is marked as interrupted.
            NasError: The first trials all failed for the same reason, or the evaluator leaves out a metric.
            InfeasibleError: See `SearchStudy.ask`.
        """
        stop = stop or StopSignal()
        started = last_checkpoint = time.monotonic()
        first_failures: list[str] | None = []
        while True:
            done = study.results.evaluated
            if report is not None:
                report(
                    done, budget.trials, failed=study.results.counts["failed"], hypervolume=study.results.hypervolume()
                )
            if done >= budget.trials:
                return Finish("trials", f"{done} trials evaluated.")
            if budget.seconds is not None and time.monotonic() - started >= budget.seconds:
                return Finish("time", f"the time is up after {done} of {budget.trials} trials.")
            if stop.requested:
                raise StoppedEarly(f"stopped after {done} of {budget.trials} trials. The run can be resumed.")
            if checkpoint is not None and time.monotonic() - last_checkpoint >= _CHECKPOINT_SECONDS:
                checkpoint()
                last_checkpoint = time.monotonic()
            try:
                with stop.shield():
                    proposal = study.ask()
            except SpaceExhausted as end:
                return Finish("exhausted", str(end))
            record = self._carry_out(study, evaluator, proposal, stop)
            if on_trial is not None:
                on_trial(record)
            if first_failures is not None:
                first_failures = _check_first(first_failures, record)

    def _carry_out(self, study: SearchStudy, evaluator: Evaluator, proposal: Proposal, stop: StopSignal) -> TrialRecord:
        started = time.perf_counter()
        try:
            outcome = evaluate(evaluator, proposal.architecture)
        except (StoppedEarly, KeyboardInterrupt):
            with stop.shield():
                study.tell_failure(proposal, INTERRUPTED, time.perf_counter() - started)
            raise
        with stop.shield():
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
