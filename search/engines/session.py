"""A session of a search: what is evaluated next, and what becomes of it. Engines are loops round it.

The session alone holds the budget, the first failures, checkpoints and the study. It is used from one thread.
"""

from __future__ import annotations

import logging
import math
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from mixnas.evaluators.protocol import Outcome
from mixnas.search.engines.climbing import Climbing
from mixnas.search.run.stopping import StopSignal
from mixnas.search.study.results import INTERRUPTED, TrialRecord
from mixnas.search.study.study import BudgetTaken, Continuation, Proposal, SearchStudy, SpaceExhausted
from mixnas.search_space.errors import MachineError, NasError, StoppedEarly, counted
from mixnas.search_space.reporting import SILENT, Report

_logger = logging.getLogger(__name__)

_SAME_FAILURES = 5  # so many failures from the start, all for the same reason, are the set-up's fault
_CHECKPOINT_SECONDS = 15.0
_LOOK_SECONDS = 1.0  # between two looks at what other drivers do
_LATEST = 50  # trials that say how long one takes


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much a search may spend.

    Attributes:
        trials: Evaluations (done or failed) in the whole study, with those of earlier sessions; of architectures,
            however far each is trained.
        seconds: Wall-clock time of this session, from when it is first asked for a proposal; None for no limit.
    """

    trials: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a search ended: "trials", "time" or "exhausted", and a sentence that says so."""

    reason: str
    message: str


class Session:
    """See the module. It is entered; what is in flight when it is left is marked as interrupted.

    Args:
        study: The study; what it already holds counts toward `budget.trials`.
        budget: Trials and time.
        stop: Asked before each proposal; None to leave Ctrl-C as it is.
        report: Told of progress: evaluations done, of how many, failures, hypervolume.
        keep: Given the outcome of each proposal that has a network, before the study takes its metrics.
        on_trial: Called with every finished trial, once it is safe on the disk (where trials are quick, several share
            one fsync, so that this comes up to a quarter of a second later, or with the next trial).
        checkpoint: Called every 15 seconds or so between trials (to write tables for people).
        climbing: Where trials are trained in rungs: whose training goes on. None has each trained to its end at once.
        failures_are_data: Failed trials are results like others: however many come first, the session goes on, and
            they are logged at the level of debugging alone.
    """

    def __init__(
        self,
        study: SearchStudy,
        budget: Budget,
        *,
        stop: StopSignal | None = None,
        report: Report = SILENT,
        keep: Callable[[Proposal, Outcome], None] | None = None,
        on_trial: Callable[[TrialRecord], None] | None = None,
        checkpoint: Callable[[], None] | None = None,
        climbing: Climbing | None = None,
        failures_are_data: bool = False,
    ) -> None:
        self._study, self._budget, self._stop = study, budget, stop or StopSignal()
        self._climbing = climbing
        self._exhausted = ""  # why nothing new can be begun, where that is so
        self._report, self._keep, self._on_trial, self._checkpoint = report, keep, on_trial, checkpoint
        self._started: float | None = None
        self._last_checkpoint = time.monotonic()
        self._looked = -math.inf
        self._in_flight: dict[int, tuple[Proposal, float]] = {}  # by trial number, with when it was proposed
        self._unreported: deque[TrialRecord] = deque()
        self._first_failures: list[str] | None = None if failures_are_data else []
        self._failed_at = logging.DEBUG if failures_are_data else logging.WARNING
        self._ending: Ending | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._study.sync()  # a trial whose end waited for the disk has ended
            with self._stop.shield():
                for proposal, begun in list(self._in_flight.values()):
                    # of one whose training was to go on, all is told but this, which is done again
                    if not isinstance(proposal, Continuation) and not self._study.has_ended(proposal):
                        self._fail(proposal, INTERRUPTED, time.monotonic() - begun)
            self._study.summarise()
        except MachineError:
            if error is None:
                raise
            # the disk that cannot be written is why it ends; the next session marks what was in flight
            _logger.debug("what was in flight could not be marked", exc_info=True)
        finally:
            self._report_safe_trials()

    # -- proposals ----------------------------------------------------------------------------------------------------

    def next(self, count: int = 1) -> list[Proposal]:
        """What to evaluate now.

        Args:
            count: At most so many.

        Returns:
            Proposals, whose outcomes `done` takes in any order. None where the search is over (`over`), or has to wait
            for what is in flight. Where all that is left is in flight with other drivers, it waits for what becomes of
            that.

        Raises:
            InfeasibleError: See `SearchStudy.ask`.
        """
        if self._started is None:  # what an engine needs to start its workers is no time of the search
            self._started = time.monotonic()
        while True:
            self._tell_progress()
            self._maybe_checkpoint()
            proposals = [] if self.over else self._propose(count)
            if proposals or self._in_flight or self.over or not self._study.elsewhere:
                return proposals
            time.sleep(_LOOK_SECONDS)

    def _propose(self, count: int) -> list[Proposal]:
        if not self.left and self._study.elsewhere and time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._study.refresh()
            self._looked = time.monotonic()
        proposals: list[Proposal] = []
        self._promote(count, proposals)
        wanted = len(proposals) + min(count - len(proposals), self.left)
        if wanted > len(proposals):
            self._study.begin_batch(wanted - len(proposals))
        while len(proposals) < wanted and not self._stop.requested:
            try:
                with self._stop.shield():
                    proposal = self._study.ask(self._budget.trials)
                    self._exhausted = ""
                    if self._climbing is not None:
                        proposal = self._climbing.first(proposal)
                    self._in_flight[proposal.number] = proposal, time.monotonic()
            except BudgetTaken:
                break
            except SpaceExhausted as end:
                self._exhausted = str(end)
                self._promote(count, proposals)
                if not self._in_flight and not self._study.elsewhere:
                    self._ending = Ending("exhausted", str(end))
                break
            except MachineError:
                raise
            except Exception:  # of a strategy: its trial is not in flight, and would stay open
                with self._stop.shield():
                    self._study.mark_interrupted(but=self._in_flight)
                raise
            proposals.append(proposal)
        return proposals

    def _promote(self, count: int, proposals: list[Proposal]) -> None:
        """Have trainings gone on with, as far as there is room for, and reason to."""
        while self._climbing is not None and len(proposals) < count and not self._stop.requested:
            found = self._climbing.next(last=self._last)
            if found is None:
                return
            self._in_flight[found.number] = found, time.monotonic()
            proposals.append(found)

    @property
    def _last(self) -> bool:
        """Whether nothing new is begun any more, and nothing is in flight."""
        return not self._in_flight and (not self.left or bool(self._exhausted))

    @property
    def _climbs(self) -> bool:
        """Whether a training goes on, or is to."""
        return self._climbing is not None and (bool(self._in_flight) or self._climbing.waits(last=self._last))

    @property
    def folder(self) -> Path:
        """Where the study is: what belongs to the run lies there."""
        return self._study.path.parent

    @property
    def left(self) -> int:
        """How many more trials the budget lets be proposed."""
        begun = sum(not isinstance(proposal, Continuation) for proposal, _ in self._in_flight.values())
        return max(0, self._budget.trials - self._study.results.evaluated - begun - self._study.elsewhere)

    @property
    def evaluated(self) -> int:
        """How many trials the study has."""
        return self._study.results.evaluated

    @property
    def stopped(self) -> bool:
        """Whether a stop was asked for."""
        return self._stop.requested

    @property
    def over(self) -> bool:
        """Whether nothing more will be proposed; something may still be in flight."""
        if self._ending is None:
            done, budget = self._study.results.evaluated, self._budget
            if done >= budget.trials and not self._climbs:
                self._ending = Ending("trials", f"{counted(done, 'trial')} evaluated.")
            elif self._time_is_up():
                self._ending = Ending("time", f"the time is up after {done} of {budget.trials} trials.")
        return self._ending is not None or self._stop.requested

    def _time_is_up(self) -> bool:
        limit, begun = self._budget.seconds, self._started
        return limit is not None and begun is not None and time.monotonic() - begun >= limit

    def ending(self) -> Ending:
        """Why the search ended.

        Raises:
            StoppedEarly: `stop` was requested; what was in flight then was finished first.
        """
        if not self.over or self._ending is None:
            done, wanted = self._study.results.evaluated, self._budget.trials
            raise StoppedEarly(f"stopped after {done} of {wanted} trials.")
        return self._ending

    def _tell_progress(self) -> None:
        results = self._study.results
        failed, volume = results.counts["failed"], results.hypervolume()
        self._report(results.evaluated, self._budget.trials, failed=failed, hypervolume=volume)

    def _maybe_checkpoint(self) -> None:
        if self._checkpoint is not None and time.monotonic() - self._last_checkpoint >= _CHECKPOINT_SECONDS:
            self._checkpoint()
            self._study.summarise()
            self._last_checkpoint = time.monotonic()

    # -- outcomes -----------------------------------------------------------------------------------------------------

    def done(self, proposal: Proposal, outcome: Outcome) -> TrialRecord:
        """Take what came of a proposal.

        Raises:
            NasError: The first trials all failed for the same reason, the outcome leaves out a metric, or the proposal
                is none that is in flight.
        """
        begun = self._check_in_flight(proposal)
        outcome = _plain(outcome, time.monotonic() - begun)
        failure = outcome.failure
        if not failure:
            self._check_complete(outcome.metrics)
            if self._keep is not None and outcome.network is not None and _share(proposal) == 1:
                self._keep(proposal, outcome)
        if self._climbing is not None:
            self._climbing.keep(proposal, outcome)
        with self._stop.shield():
            if isinstance(proposal, Continuation):
                assert self._climbing is not None
                record = self._climbing.further(proposal, outcome)
                self._landed(proposal, record)
                if failure:
                    _logger.warning("trial %d (%s) could not be trained on: %s", record.number, record.id, failure)
            elif failure:
                record = self._fail(proposal, failure, outcome.seconds)
                _logger.log(self._failed_at, "trial %d (%s) failed: %s", record.number, record.id, record.failure)
            else:
                record = self._study.tell(proposal, outcome.metrics, outcome.seconds, share=_share(proposal))
                self._landed(proposal, record)
                if self._climbing is not None:
                    self._climbing.told(record)
        self._report_safe_trials()
        self._check_first(record)
        return record

    def retried(self, proposal: Proposal, reason: str) -> None:
        """Note that what is in flight is tried again: whoever did it could not.

        Raises:
            NasError: The proposal is none that is in flight.
        """
        self._check_in_flight(proposal)
        _logger.warning("trial %d (%s) is tried again: %s", proposal.number, proposal.architecture.id, reason)
        with self._stop.shield():
            if isinstance(proposal, Continuation):
                assert self._climbing is not None
                self._climbing.retried(proposal, reason)
            else:
                self._study.note_retry(proposal, reason)

    def seconds(self) -> float | None:
        """How long the study's latest trials took, their median; None before there are any."""
        found = [record.seconds for record in self._study.results.records[-_LATEST:] if record.status == "done"]
        return statistics.median(found) if found else None

    def _check_in_flight(self, proposal: Proposal) -> float:
        """When it was proposed."""
        known, begun = self._in_flight.get(proposal.number, (None, 0.0))
        if known is None:
            raise NasError(
                f"trial {proposal.number} is not in flight: its outcome was taken already, or this session did not "
                "propose it. An engine gives one outcome for each proposal."
            )
        if known is not proposal and known.request != proposal.request:
            raise NasError(
                f"trial {proposal.number}: the outcome is of architecture {proposal.architecture.id}, and "
                f"{known.architecture.id} was proposed. An engine gives back the proposals that it was given."
            )
        return begun

    def _fail(self, proposal: Proposal, reason: str, seconds: float) -> TrialRecord:
        record = self._study.tell_failure(proposal, reason, seconds)
        self._landed(proposal, record)
        return record

    def _landed(self, proposal: Proposal, record: TrialRecord) -> None:
        del self._in_flight[proposal.number]
        if record.status != INTERRUPTED:  # which it is too where it was given to another driver meanwhile
            self._unreported.append(record)

    def _check_complete(self, metrics: Mapping[str, float]) -> None:
        results = self._study.results
        needed = [o.name for o in results.objectives] + [c.metric for c in results.constraints]
        missing = [name for name in needed if name not in metrics]
        if missing:
            raise NasError(
                f"the evaluator gives no metric {missing[0]!r}, which an objective or a constraint needs. "
                f"It gives: {', '.join(sorted(metrics)) or 'none'}."
            )

    def _report_safe_trials(self) -> None:
        """Hand over the trials that not even a power cut can lose any more."""
        while self._unreported and self._study.synced:
            record = self._unreported.popleft()
            if self._on_trial is not None:
                self._on_trial(record)

    def _check_first(self, record: TrialRecord) -> None:
        """Give up when the session has only failed so far, and always for the same reason (numbers aside)."""
        if self._first_failures is None:
            return
        self._first_failures.append(record.failure)
        alike = len({re.sub(r"\d+", "#", reason) for reason in self._first_failures}) == 1
        if record.status != "failed" or not alike:
            self._first_failures = None
        elif len(self._first_failures) >= _SAME_FAILURES:
            raise NasError(f"the first {_SAME_FAILURES} trials all failed for the same reason: {record.failure}")


def _share(proposal: Proposal) -> float:
    """Of a whole training, that a proposal's outcome is of."""
    return 1.0 if proposal.request.part is None else proposal.request.part.until


def _plain(outcome: Outcome, elapsed: float) -> Outcome:
    """An outcome as it is kept: numbers of Python's own, of whatever kind they were; a failure where they are none.

    Args:
        outcome: As an evaluator gave it.
        elapsed: Seconds since it was asked for, where its own are no time.
    """
    failure: object = outcome.failure
    if isinstance(failure, BaseException):
        failure = f"{type(failure).__name__}: {failure}"
    text = str(failure) if failure else ""
    try:
        seconds = float(_number(outcome.seconds))
        seconds = seconds if math.isfinite(seconds) else elapsed
    except (TypeError, ValueError, OverflowError):
        seconds = elapsed
    metrics: dict[str, float] = {}
    for name, value in outcome.metrics.items() if not text else ():
        try:
            metrics[name] = _number(value)
            why = "" if math.isfinite(metrics[name]) else f"is {metrics[name]}"
        except (TypeError, ValueError):
            why = f"is {type(value).__name__}, not a number"
        except OverflowError:
            why = "is too large for a number"
        if not isinstance(name, str):
            why = f"has a name that is {type(name).__name__}, not text"
        if why:
            return Outcome({}, f"metric {name} {why}", seconds)
    return Outcome(metrics, text, seconds, outcome.network, outcome.state)


def _number(value: Any) -> float:
    """A number, or what holds just one: of NumPy, of torch, a decimal or a fraction.

    Raises:
        TypeError, ValueError: It is none.
        OverflowError: It is too large for a float.
    """
    if isinstance(value, Tensor | np.generic | np.ndarray):
        value = value.item() if math.prod(value.shape) == 1 else None
    if isinstance(value, str | bytes) or not hasattr(type(value), "__float__"):
        raise TypeError
    number = float(value)
    return value if type(value) is int else number
