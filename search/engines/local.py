"""The engine of this machine: evaluates in this process, or in several of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from mixnas.evaluators.protocol import Evaluator
from mixnas.evaluators.workers import (
    EVALUATE,
    Lost,
    Workers,
    WorkersEndedError,
    WorkersUnavailableError,
    share_of_threads,
)
from mixnas.search.engines import ENGINES, Engine
from mixnas.search.engines.elsewhere import HALVED, OUT_OF_MEMORY, Errand, Errands
from mixnas.search.engines.session import Session
from mixnas.search_space.errors import NasError, StoppedEarly
from mixnas.search_space.settings import Between, Seconds

_LOOK_SECONDS = 0.5


@ENGINES.register("local")
@dataclass(frozen=True, kw_only=True, slots=True)
class LocalEngine(Engine):
    """In this process, one batch after the other; or in processes of its own, of which each takes the next trial.

    Attributes:
        batch: Architectures that are proposed and evaluated together; of several workers, that each has at hand: with 2
            none waits for a proposal, and proposals know less.
        workers: Processes; 1 for none but this one.
        limit: Time that a trial may take until it is ended and has failed; then it is evaluated in another process in
            any case.
    """

    batch: Annotated[int, Between(1, 10_000)] = 1
    workers: Annotated[int, Between(1)] = 1
    limit: Seconds | None = None

    def run(self, session: Session, evaluator: Evaluator) -> None:
        """See `Engine`.

        Raises:
            NasError: The evaluator cannot be made in another process, or no other process lives long enough.
        """
        if self.workers > 1 or self.limit is not None:
            self._run_in_workers(session, evaluator)
            return
        while proposals := session.next(self.batch):
            outcomes = evaluator.evaluate([proposal.request for proposal in proposals])
            if len(outcomes) != len(proposals):
                raise NasError(
                    f"the evaluator {type(evaluator).__name__} gave {len(outcomes)} outcomes for {len(proposals)} "
                    "requests. evaluate(requests) gives one for each, in their order."
                )
            for proposal, outcome in zip(proposals, outcomes, strict=True):
                if outcome.failure.startswith(OUT_OF_MEMORY):
                    session.retried(proposal, f"{outcome.failure}; {HALVED}")
                    (outcome,) = evaluator.evaluate([replace(proposal.request, parts=2)])
                session.done(proposal, outcome)

    def _run_in_workers(self, session: Session, evaluator: Evaluator) -> None:
        if session.over:
            return
        count = max(1, min(self.workers, session.left))
        _, threads = share_of_threads(count)
        errands = Errands(session, evaluator, quiet=lambda: workers.paused())
        # one try each: what is lost is tried again by the errands, which note it in the study
        workers = Workers(errands.spec, count, threads, tries=1, limit=self.limit)
        running: dict[int, Errand] = {}
        with workers:
            try:
                workers.open(should_stop=lambda: session.stopped)
            except StoppedEarly:
                return
            except WorkersEndedError as error:
                raise NasError(
                    f"search.engine, workers: {self.workers}: {error} With workers: 1 and no limit none is started."
                ) from error
            except WorkersUnavailableError as error:
                raise NasError(
                    f"search.engine: {error} What only this process knows is evaluated here: set workers: 1, no limit."
                ) from error
            while True:
                for errand in errands.next(count * self.batch - len(running)):
                    running[errand.proposal.number] = errand
                    workers.submit(errand.proposal.number, EVALUATE, errand.request)
                if not running:
                    return
                for number, outcome in workers.answers(timeout=_LOOK_SECONDS):
                    errand = running.pop(number)
                    if not isinstance(outcome, Lost):
                        errands.done(errand, outcome)
                    elif outcome.late:
                        errands.late(errand, outcome.failure, outcome.seconds)
                    else:
                        errands.lost(errand, outcome.failure)
