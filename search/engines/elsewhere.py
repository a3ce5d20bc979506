"""What engines share that evaluate in other processes: what is in flight, what is tried again, what is given up.

a process that ends     its trial is tried again, at most `RETRIES` times, each noted in the study; one that ends two
                        processes while it is alone in them has failed: it is what ends them
a machine that is lost  counts as a retry, and is nobody's fault
a trial that is late    has failed
memory used up          is tried again with half a batch at a time, and then has failed
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mixnas.evaluators.protocol import Apart, Evaluator, EvaluatorSpec, Outcome, Request

if TYPE_CHECKING:  # who only needs the words below imports no study
    from mixnas.search.engines.session import Session
    from mixnas.search.study.study import Proposal

RETRIES = 3
ENDED_ALONE = 2  # processes
OUT_OF_MEMORY = "out of memory"  # as `evaluators.protocol.attempt` says it
HALVED = "now with half a batch at a time"
Quiet = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(slots=True)
class Errand:
    """A proposal that is evaluated elsewhere.

    Attributes:
        proposal: Which.
        request: What is asked of a worker.
        retries: How often it was tried again.
        ended: Processes that ended while it was alone in them.
    """

    proposal: Proposal
    request: Request
    retries: int = 0
    ended: int = 0


class Errands:
    """See the module. An engine gets errands from `next` and says what became of each, once, from the session's thread.

    Args:
        session: Of the search.
        evaluator: Prepared.
        quiet: A context in which nothing of this engine runs on this machine, for evaluators that measure there.
    """

    def __init__(self, session: Session, evaluator: Evaluator, quiet: Quiet = contextlib.nullcontext) -> None:
        self._session = session
        self._apart = evaluator if isinstance(evaluator, Apart) else None
        self._quiet = quiet if self._apart is not None and self._apart.quiet else contextlib.nullcontext
        self._again: deque[Errand] = deque()
        self.spec: EvaluatorSpec = evaluator.spec if self._apart is None else self._apart.elsewhere()

    @property
    def waiting(self) -> int:
        """How many wait to be tried again: each in a batch of its own, as one that it was in was lost."""
        return len(self._again)

    def next(self, count: int) -> list[Errand]:
        """What to evaluate now, at most so many; first what is tried again."""
        found = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        if count > len(found):
            found += [Errand(p, p.request) for p in self._session.next(count - len(found))]
        return found

    def done(self, errand: Errand, outcome: Outcome) -> None:
        """A worker answered."""
        if outcome.failure.startswith(OUT_OF_MEMORY) and errand.request.parts == 1:
            errand.request = replace(errand.request, parts=2)
            self._retry(errand, f"{outcome.failure}; {HALVED}")
            return
        if not outcome.failure and self._apart is not None:
            with self._quiet():
                outcome = self._apart.complete(errand.request, outcome)
        self._session.done(errand.proposal, outcome)

    def back(self, errand: Errand) -> None:
        """It was never begun: it waits again."""
        self._again.append(errand)

    def lost(self, errand: Errand, reason: str, *, blamed: bool = True) -> None:
        """Its worker was lost while it was evaluated.

        Args:
            errand: Alone there, or in a batch of which nobody knows how far it came.
            reason: How the worker ended.
            blamed: Whether the errand may be why, where it was alone.
        """
        errand.ended += blamed
        if errand.ended >= ENDED_ALONE or errand.retries >= RETRIES:
            often = f", {errand.ended} times" if errand.ended > 1 else ""
            tried = "" if errand.ended >= ENDED_ALONE else f", and {RETRIES} retries were lost before"
            self._session.done(errand.proposal, Outcome(failure=f"{reason}{often}{tried}"))
            return
        self._retry(errand, reason)

    def late(self, errand: Errand, reason: str, seconds: float) -> None:
        """It took longer than a trial may, alone."""
        self._session.done(errand.proposal, Outcome(failure=reason, seconds=seconds))

    def _retry(self, errand: Errand, reason: str) -> None:
        errand.retries += 1
        self._again.append(errand)
        self._session.retried(errand.proposal, reason)
