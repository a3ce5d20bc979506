"""The process that is connected to Ray, and how the search's process, which never is, has it work.

Ray ends a process that is connected to it, without a word, when the raylet of its machine dies, and in other cases too.
That process is therefore a child of the one that searches: it runs our own loop or Ray Tune, and each of its questions
("what next?") and answers ("this came of it") goes to its parent, which holds session, study and evaluator. Where it
ends, the parent says so, and nothing is lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from mixnas.evaluators.answering import Where
from mixnas.evaluators.protocol import EvaluatorSpec, Outcome, Request
from mixnas.search.engines.on_ray.cluster import Cluster, Head, Here, Share, environment, knock, no_signals
from mixnas.search_space.errors import MachineError, NasError

if TYPE_CHECKING:  # the child needs neither a study nor torch
    from mixnas.search.engines.elsewhere import Errand, Errands
    from mixnas.search.engines.session import Session

_LOOK_SECONDS = 0.2
_HEAD_SECONDS = 5.0  # in which it shows that the head is gone, where Ray fails
_END_SECONDS = 10.0  # to say goodbye to a cluster that stays

# What the child runs before it imports anything slow. Ctrl-C and its like are for the parent, which ends it.
_BEGIN = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if sys.platform == "linux":
    import ctypes, os
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != {parent}:
        os._exit(1)
from {module} import serve
serve({descriptor})
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What the child is to do.

    Attributes:
        address: Of the cluster.
        share: Of each worker.
        workers: How many; None for as many as fit.
        through: "loop", "tune", or "auto": the loop until it is known how long trials take.
        worth_tune: Seconds of a trial from which "auto" is Tune; None for never.
        limit: Seconds that a trial may take.
        spec: Makes the evaluator, pickled.
        code: Which code workers must have.
        session: Of the processes of a Ray that was started here, for this.
        folder: Of that Ray's files.
    """

    address: str
    share: Share
    workers: int | None
    through: str
    worth_tune: float | None
    limit: float | None
    spec: bytes
    code: str
    session: int | None = None
    folder: str | None = None

    def chosen(self, seconds: float | None) -> str:
        """What carries trials out that take so long; "auto" where that is not known."""
        if self.through != "auto" or seconds is None:
            return self.through
        return "tune" if self.worth_tune is not None and seconds >= self.worth_tune else "loop"


@dataclass(frozen=True, slots=True)
class Flight:
    """A proposal that is evaluated, as the child knows it: the trial's number, and what is asked of a worker."""

    number: int
    request: Request


class Asks(Protocol):
    """What the loop and Tune ask of the search, and tell it: `Errands` and `Session`, wherever these are."""

    @property
    def waiting(self) -> int:
        """See `Errands`."""

    @property
    def left(self) -> int:
        """See `Session`."""

    @property
    def evaluated(self) -> int:
        """See `Session`."""

    @property
    def over(self) -> bool:
        """See `Session`."""

    def seconds(self) -> float | None:
        """See `Session`."""

    def next(self, count: int) -> list[Flight]:
        """See `Errands`."""

    def done(self, flight: Flight, outcome: Outcome) -> None:
        """See `Errands`."""

    def back(self, flight: Flight) -> None:
        """See `Errands`."""

    def late(self, flight: Flight, reason: str, seconds: float) -> None:
        """See `Errands`."""

    def lost(self, flight: Flight, reason: str, *, blamed: bool = True) -> None:
        """See `Errands`."""

    def here(self, pids: set[int]) -> None:
        """Which workers run on this machine, of a cluster that was not started for this search."""


def refuse_other_code(where: Where, code: str) -> None:
    """Refuse a worker whose results would not be those of the code of this search.

    Raises:
        NasError: With both versions.
    """
    if where.code != code:
        raise NasError(
            f"search.engine: the worker {where.pid} on {where.host} runs {where.code}, and this search {code}. "
            "Their results do not compare. Install the same on all machines, and resume."
        )


# -- the parent --------------------------------------------------------------------------------------------------------


def started(module: str, *, own: bool) -> tuple[subprocess.Popen[bytes], Connection]:
    """A child of this process that will be connected to Ray, and how to talk to it.

    Args:
        module: Whose `serve` it runs.
        own: Whether that is a Ray that is started for this search.
    """
    connection, theirs = Pipe()
    variables = os.environ | environment(own=own)
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    code = _BEGIN.format(parent=os.getpid(), descriptor=theirs.fileno(), module=module)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # ours is for results
        env=variables,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    return process, connection


class Driver:
    """The child, as the search's process sees it. A context manager, which ends it; all from one thread.

    It begins to import Ray at once, so that this takes no time later.

    Args:
        own: Whether it is for a Ray that is started for this search.
    """

    def __init__(self, *, own: bool) -> None:
        self._own = own
        self._process, self._connection = started(__name__, own=own)
        self._flying: dict[int, Errand] = {}

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End it, which may be done twice; Ctrl-C waits meanwhile."""
        with no_signals():
            self._connection.close()
            if self._process.poll() is None and not self._own:  # with Ray itself, which ends next, there is no farewell
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_END_SECONDS)
            self._process.kill()
            self._process.wait()

    def connect(self, work: Work, head: Head | None, should_stop: Callable[[], bool]) -> bool:
        """Have it connect to the cluster; whether it did, and `should_stop` did not say otherwise meanwhile.

        Raises:
            NasError: It cannot.
            MachineError: Ray, or the child, ended.
        """
        self._address, self._head = work.address, head
        self._here = Here(work.session)
        with contextlib.suppress(OSError):  # it has ended: said below
            self._connection.send_bytes(pickle.dumps(work))
        while not self._connection.poll(_LOOK_SECONDS):
            self._check()
            if should_stop():
                return False
        self._heard()
        return True

    def quiet(self) -> contextlib.AbstractContextManager[object]:
        """A context in which no worker runs on this machine, once it is connected."""
        return self._here.quiet()

    def serve(self, session: Session, errands: Errands) -> None:
        """Answer what it asks, until it has nothing left to do.

        Raises:
            NasError: What the evaluator raised itself; a worker cannot make it, or has other code; Ray failed.
            MachineError: Ray, or the child, ended.
        """
        for _ in self.steps(session, errands):
            pass

    def steps(self, session: Any, errands: Any) -> Iterator[None]:
        """`serve`, with a step for each question, and now and then without one."""
        while True:
            if not self._connection.poll(_LOOK_SECONDS):
                self._check()
                yield
                continue
            said = self._heard()
            if said is None:
                return
            name, args, more = said
            reply = pickle.dumps(self._answer(session, errands, name, args, more))
            with contextlib.suppress(OSError):  # it has ended: noticed when it is listened to
                self._connection.send_bytes(reply)
            yield

    def _answer(self, session: Any, errands: Any, name: str, args: tuple[Any, ...], more: Any) -> Any:
        if name == "next":
            found = errands.next(*args)
            self._flying |= {errand.proposal.number: errand for errand in found}
            return [Flight(errand.proposal.number, errand.request) for errand in found]
        if name in ("done", "late", "lost", "back"):
            if name == "lost":
                self._check()  # with all of Ray no retry is worth a note
            flight, *rest = args
            return getattr(errands, name)(self._flying.pop(flight.number), *rest, **more)
        if name == "here":
            (self._here.pids,) = args
            return None
        if name == "log":
            where, level, text = args
            logging.getLogger(where).log(level, "%s", text)
            return None
        if name == "waiting":
            return errands.waiting
        if name == "seconds":
            return session.seconds()
        assert name in ("left", "evaluated", "over")
        return getattr(session, name)

    def _heard(self) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
        """A question; None where there will be none."""
        try:
            kind, value = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._ended() from None
        if kind == "asks":
            question: tuple[str, tuple[Any, ...], dict[str, Any]] = value
            return question
        if kind == "raised":
            self._check()
            raise value
        if kind == "failed":
            self._check(_HEAD_SECONDS)
            self._knock(value)
            raise NasError(f"search.engine: Ray failed: {value}")
        return None

    def _check(self, patience: float = 0.0) -> None:
        if self._head is not None:
            self._head.check(patience)
        if self._process.poll() is not None and not self._connection.poll():
            raise self._ended()

    def _ended(self) -> MachineError:
        """Why the child is gone."""
        status = self._process.wait()
        try:
            if self._head is not None:
                self._head.check(_HEAD_SECONDS)
            self._knock("the process that was connected to it ended")
        except MachineError as error:
            return error
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return MachineError(
            f"search.engine: the process that was connected to Ray ended ({how}), as it does when the daemon of Ray on "
            "this machine (raylet) dies. The trials that were reported are safe. See that the cluster is whole (ray "
            "status), then resume the run."
        )

    def _knock(self, why: str) -> None:
        """Say so where the head of a cluster that was there does not answer any more."""
        if self._head is None and self._address != "auto":
            try:
                knock(self._address)
            except NasError:
                raise MachineError(
                    f"search.engine: the Ray cluster at {self._address} answers no more ({why}). The trials that were "
                    "reported are safe. Start it again, then resume the run."
                ) from None


def pickled(value: Any) -> bytes:
    """An evaluator's spec, or the like, for the child; what only this process knows goes with it.

    Raises:
        NasError: Ray is not installed, or the value cannot be carried to another process.
    """
    try:
        from ray import cloudpickle
    except ImportError as error:
        raise NasError(f"search.engine: Ray cannot be imported ({error}). Install 'ray[tune]'.") from error
    try:
        found: bytes = cloudpickle.dumps(value)
    except Exception as error:
        raise NasError(f"search.engine: the evaluator cannot be carried to another process: {error}") from error
    return found


# -- the child ---------------------------------------------------------------------------------------------------------


class _Parent:
    """`Asks`, over a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def call(self, name: str, *args: Any, **more: Any) -> Any:
        with self._lock:
            self.tell("asks", (name, args, more))
            return pickle.loads(self._connection.recv_bytes())

    def tell(self, kind: str, value: Any = None) -> None:
        self._connection.send_bytes(pickle.dumps((kind, value)))

    @property
    def waiting(self) -> int:
        return int(self.call("waiting"))

    @property
    def left(self) -> int:
        return int(self.call("left"))

    @property
    def evaluated(self) -> int:
        return int(self.call("evaluated"))

    @property
    def over(self) -> bool:
        return bool(self.call("over"))

    def seconds(self) -> float | None:
        found: float | None = self.call("seconds")
        return found

    def next(self, count: int) -> list[Flight]:
        found: list[Flight] = self.call("next", count)
        return found

    def done(self, flight: Flight, outcome: Outcome) -> None:
        self.call("done", flight, outcome)

    def back(self, flight: Flight) -> None:
        self.call("back", flight)

    def late(self, flight: Flight, reason: str, seconds: float) -> None:
        self.call("late", flight, reason, seconds)

    def lost(self, flight: Flight, reason: str, *, blamed: bool = True) -> None:
        self.call("lost", flight, reason, blamed=blamed)

    def here(self, pids: set[int]) -> None:
        self.call("here", pids)


class _Tells(logging.Handler):
    """What is logged here is logged by the parent."""

    def __init__(self, parent: _Parent) -> None:
        super().__init__()
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        self._parent.call("log", record.name, record.levelno, record.getMessage())


def serve(descriptor: int) -> None:
    """What the child does."""
    import ray  # noqa: F401 - while the cluster starts

    connection = Connection(descriptor)
    parent = _Parent(connection)
    try:
        work = pickle.loads(connection.recv_bytes())
        try:
            _carry_out(work, parent)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except NasError as error:
            parent.tell("raised", plain_error(error))
        except Exception as error:
            parent.tell("failed", f"{type(error).__name__}: {error}")
    except (EOFError, OSError):
        return


def plain_error(error: NasError) -> NasError:
    """An error that crosses to another process whole."""
    kind = type(error) if type(error).__module__ == NasError.__module__ else NasError
    return kind(str(error))


def _carry_out(work: Work, parent: _Parent) -> None:
    with Cluster(work.address, work.share, work.workers) as cluster:
        from mixnas.search.engines.on_ray.loop import Loop

        parent.tell("connected")
        logger = logging.getLogger("mixnas")
        logger.addHandler(_Tells(parent))
        logger.propagate = False
        spec: EvaluatorSpec = pickle.loads(work.spec)
        through = work.chosen(parent.seconds())
        if through != "tune":
            with Loop(cluster, parent, spec, work) as loop:
                if through == "auto":  # the first of each worker says how long one takes
                    loop.run(most=cluster.workers)
                    through = work.chosen(parent.seconds() or 0.0)
                if through == "loop":
                    loop.run()
        if through == "tune" and not parent.over:
            from mixnas.search.engines.on_ray.tune import run_in_tune

            run_in_tune(cluster, parent, spec, work)
        parent.tell("over")
