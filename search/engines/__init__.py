"""Engines: what carries out the trials of a search. One file each.

An engine is a frozen dataclass, whose fields are its options, with a loop round one `Session`:

    @ENGINES.register("mine")
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Mine(Engine):
        workers: int = 2

        def run(self, session, evaluator): ...

It asks the session for proposals, has them evaluated wherever it likes (`evaluator.spec` makes the evaluator again in
another process), and gives the outcomes back, in any order, from the thread that it was called in. The session holds
the budget, the study and all else that engines would otherwise each have to get right. Where somebody else owns the
loop, as Ray Tune does, its `suggest` is `session.next(1)` and its `on_trial_complete` is `session.done`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from mixnas.search.naming import Registry
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.schema import Schema

if TYPE_CHECKING:  # a worker that runs code of this package needs neither a study nor torch
    from mixnas.evaluators.protocol import Evaluator, Outcome, Request
    from mixnas.predictors.latency.source import LatencySource, LatencySpec
    from mixnas.search.engines.session import Session


class Engine(ABC):
    """See the module."""

    __slots__ = ()

    @abstractmethod
    def run(self, session: Session, evaluator: Evaluator) -> None:
        """Carry out what the session proposes, until it proposes nothing more and nothing is in flight.

        Whatever it raises, the session (which is entered) marks what was in flight as interrupted.

        Args:
            session: Gives proposals and takes outcomes.
            evaluator: Prepared.
        """

    def latency(self, spec: LatencySpec) -> LatencySource:
        """Where a search's latency comes from; another engine may know how to measure other machines than this one."""
        return spec.open()

    def finish(
        self,
        evaluator: Evaluator,
        requests: Sequence[Request],
        total: int,
        report: Report = SILENT,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Outcome]]:
        """Bring architectures to their final weights; see `evaluators.workers.finish_all`."""
        from mixnas.evaluators.workers import finish_all

        return finish_all(evaluator, requests, total, report, should_stop)

    def together(self) -> Callable[..., AbstractContextManager[None]] | None:
        """How processes are had that train a super-network together; None for those of this machine.

        See `evaluators.supernet.processes.processes`.
        """
        return None

    @classmethod
    def from_plain(cls, plain: Any, where: str) -> Engine:
        """Read `name`, or `{name: ..., option: value}`."""
        return ENGINES.read(plain, where)

    def to_plain(self) -> str | dict[str, Any]:
        """The inverse, every option written out."""
        return ENGINES.to_plain(self)

    @classmethod
    def schema(cls) -> Schema:
        """What `from_plain` reads, as a JSON Schema."""
        return ENGINES.schema()


ENGINES: Registry[Engine] = Registry("engine", __name__)
