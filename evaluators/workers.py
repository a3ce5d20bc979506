"""Processes on this machine that finish and evaluate architectures, each with an evaluator made from one spec.

A worker is a fresh process that imports this package, never the caller's script, so a script needs no
`if __name__ == "__main__"`. It makes the evaluator from the spec, answers one task after the other, and ends when its
caller ends, in whatever way. What only the caller's process knows (a class or an operator defined in a script) it
cannot make: `Workers.open` says so, and the caller does the work itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from mixnas.evaluators.answering import answered, set_threads
from mixnas.evaluators.protocol import Evaluator, EvaluatorSpec, Outcome, Request, attempt, finished
from mixnas.predictors.measuring.measure import fixed_threads
from mixnas.search_space.errors import MachineError, NasError, StoppedEarly
from mixnas.search_space.reporting import SILENT, Report, SilentReport

_logger = logging.getLogger(__name__)

_TRIES = 3
_OPEN_SECONDS = 300.0
_STILLBORN = 3  # so many replacements in a row that end before they are ready are no accident
_TELL_SECONDS = 0.2  # between two messages about the progress of one task
_WORTH_SECONDS = 30.0  # of work left, as the work so far lets expect: workers take some seconds to start
FINISH, EVALUATE = "finish", "evaluate"

# What a worker runs before it imports anything slow. Ctrl-C is for the caller, which ends its workers. Where the system
# is Linux, the worker is killed when the thread that started it ends (1 is PR_SET_PDEATHSIG), even while it is paused
# and cannot see its lifeline. That thread outlives its workers: one thread does all that is done within `Workers`.
_BEGIN = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != {caller}:
        os._exit(1)
from mixnas.evaluators.workers import serve
serve({descriptor})
"""


class WorkersUnavailableError(NasError):
    """Workers cannot make the evaluator; the caller's own process may."""


class WorkersEndedError(WorkersUnavailableError):
    """Workers end or hang before they are ready, which says nothing of what they know."""


@dataclass(frozen=True, slots=True)
class Lost(Outcome):
    """A task that was not answered, with the reason as its failure: its process ended, or was ended.

    Attributes:
        late: Whether it was ended because the task took too long.
    """

    late: bool = False


@dataclass(slots=True)
class _Task:
    key: int
    what: str
    request: Request
    tries: int = 0
    done: float = 0.0
    since: float = 0.0


class _Worker:
    """One process, as its caller sees it."""

    def __init__(self, threads: int) -> None:
        self.connection, theirs = Pipe()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", _BEGIN.format(caller=os.getpid(), descriptor=theirs.fileno())]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        # Its standard input is a lifeline: it ends when this process does, and nobody can write to it by accident.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self.task: _Task | None = None
        self.ready = False

    def tell(self, *message: Any) -> None:
        """Send; a worker that is gone is noticed when it is listened to."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(pickle.dumps(message))

    def end(self) -> int:
        """End it now; returns its status."""
        self.process.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.connection.close()
        return self.process.wait()


@dataclass
class Workers:
    """A context manager; within it, `submit` tasks and take `answers`, from one thread, whose end ends the processes.

    Attributes:
        spec: What the workers' evaluators are made from.
        count: Processes.
        threads: Of each, inside an operator.
        tries: How often a task is begun whose process ends, until it is `Lost`.
        limit: Seconds that a task may take, until its process is ended and it is `Lost`; None for no limit.
    """

    spec: EvaluatorSpec
    count: int
    threads: int = 1
    tries: int = _TRIES
    limit: float | None = None
    _workers: list[_Worker] = field(default_factory=list, init=False)
    _queue: deque[_Task] = field(default_factory=deque, init=False)
    _pickled: bytes = field(default=b"", init=False)
    _stillborn: int = field(default=0, init=False)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def open(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Start the processes, and wait until each has made its evaluator; one that is killed meanwhile is replaced.

        Args:
            should_stop: Asked while waiting.

        Raises:
            WorkersUnavailableError: One of them cannot, with its reason.
            WorkersEndedError: One ended by itself, several in a row were killed, or one is not ready in time.
            StoppedEarly: `should_stop` said so.
        """
        try:
            self._pickled = pickle.dumps(self.spec)
        except Exception as error:
            raise WorkersUnavailableError(f"the evaluator cannot be sent to another process: {error}") from error
        self._workers += [self._start() for _ in range(self.count)]
        for i in range(self.count):
            while not self._workers[i].ready:
                self._await(i, should_stop)

    def _await(self, i: int, should_stop: Callable[[], bool]) -> None:
        """Wait until one is ready, or was killed and is replaced."""
        worker, until = self._workers[i], time.monotonic() + _OPEN_SECONDS
        try:
            while not worker.connection.poll(0.2):
                if should_stop():
                    raise StoppedEarly("stopped while workers were starting.")
                if time.monotonic() > until:
                    raise WorkersEndedError(f"a worker was not ready after {_OPEN_SECONDS:.0f} s.")
            state, reason = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError) as error:
            status = worker.process.wait()
            worker.end()
            if status >= 0:
                text = f"a worker ended with status {status} before it was ready; what it wrote to stderr says why."
                raise WorkersEndedError(text) from error
            self._stillborn += 1
            if self._stillborn >= _STILLBORN:
                raise WorkersEndedError(_stillborn(status)) from error
            _logger.info("a worker ended by signal %d while it was starting; another one takes its place", -status)
            self._workers[i] = self._start()
            return
        if state != "ready":
            raise WorkersUnavailableError(reason)
        worker.ready, self._stillborn = True, 0

    def _start(self) -> _Worker:
        worker = _Worker(self.threads)
        worker.tell(self.threads, self._pickled)
        return worker

    @property
    def free(self) -> int:
        """How many more tasks would start at once."""
        return max(0, sum(worker.task is None for worker in self._workers) - len(self._queue))

    @property
    def busy(self) -> int:
        """Tasks that are not answered."""
        return sum(worker.task is not None for worker in self._workers) + len(self._queue)

    @property
    def progress(self) -> float:
        """How much of the tasks in flight is done, in tasks."""
        return sum(worker.task.done for worker in self._workers if worker.task is not None)

    def submit(self, key: int, what: str, request: Request) -> None:
        """Have a task done.

        Args:
            key: Comes back with the answer.
            what: `FINISH` or `EVALUATE`.
            request: Of what.
        """
        self._queue.append(_Task(key, what, request))
        self._deal()

    def _deal(self) -> None:
        for worker in self._workers:
            if self._queue and worker.ready and worker.task is None:
                worker.task = task = self._queue.popleft()
                task.tries, task.done, task.since = task.tries + 1, 0.0, time.monotonic()
                worker.tell(task.what, task.request)

    def answers(self, timeout: float | None = None) -> Iterator[tuple[int, Outcome]]:
        """What was answered meanwhile; waits for something to happen, which may be progress only.

        A process that dies is replaced and its task tried again; one that too many processes died of is `Lost`, unless
        they were killed from outside while they brought a network to its final weights. One that took longer than the
        limit is `Lost` at once.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            NasError: What the evaluator raised itself, or a process cannot be replaced.
            MachineError: The disk or the memory of this machine is used up, as far as that can be told.

        Yields:
            The key of a task and its outcome; of `FINISH` the outcome's network is what `Evaluator.finish` gave.
        """
        by_connection = {worker.connection: worker for worker in self._workers}
        found: list[tuple[int, Outcome]] = []
        for connection in wait(list(by_connection), self._patience(timeout)):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                kind, value = pickle.loads(worker.connection.recv_bytes())
            except (EOFError, OSError):
                found += self._replace(worker)
                continue
            if kind == "ready":
                worker.ready, self._stillborn = True, 0
            elif kind == "raised":  # no failure of the architecture: as in this process, it ends the work
                raise value
            elif kind == "failed":  # a replacement that cannot do what the first ones could
                raise NasError(f"a worker that took a dead one's place could not begin: {value}")
            elif worker.task is not None and kind == "progress":
                worker.task.done = value
            elif worker.task is not None:
                key, worker.task = worker.task.key, None
                found.append((key, value))
        found += self._end_late()
        self._deal()  # before anybody looks at an answer, so that no process waits for that
        yield from found

    def _patience(self, timeout: float | None) -> float | None:
        """How long to wait: until the next task is late, at most."""
        begun = [worker.task.since for worker in self._workers if worker.task is not None]
        if self.limit is None or not begun:
            return timeout
        left = max(0.0, min(begun) + self.limit - time.monotonic())
        return left if timeout is None else min(timeout, left)

    def _end_late(self) -> list[tuple[int, Outcome]]:
        now = time.monotonic()
        found: list[tuple[int, Outcome]] = []
        for worker in list(self._workers):
            task = worker.task
            if self.limit is not None and task is not None and now - task.since >= self.limit:
                worker.end()
                self._workers[self._workers.index(worker)] = self._start()
                reason = f"took longer than the limit of {self.limit:g} s"
                found.append((task.key, Lost(failure=reason, seconds=now - task.since, late=True)))
        return found

    def _replace(self, worker: _Worker) -> list[tuple[int, Outcome]]:
        status, task, began = worker.end(), worker.task, worker.ready
        self._stillborn += not began
        if self._stillborn >= _STILLBORN:
            raise NasError(_stillborn(status))
        self._workers[self._workers.index(worker)] = self._start()
        if task is None:
            return []
        if task.tries < self.tries:
            self._queue.appendleft(task)
            return []
        if (
            task.what == FINISH and status == -signal.SIGKILL
        ):  # nobody here sends it: where memory ends, the system does
            raise MachineError(
                f"architecture {task.request.architecture.id}: its process was killed from outside (signal 9) "
                f"{self.tries} times, as the system does when memory ends. Free some, or make batches or the space "
                "smaller."
            )
        often = f", {self.tries} times" if self.tries > 1 else ""
        reason = f"the process that did it ended by {_how(status)}{often}"
        return [(task.key, Lost(failure=reason, seconds=time.monotonic() - task.since))]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the processes stand still, and no time passes for the limit."""
        begun = time.monotonic()
        for worker in self._workers:
            worker.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for worker in self._workers:
                worker.process.send_signal(signal.SIGCONT)
                if worker.task is not None:
                    worker.task.since += time.monotonic() - begun


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


def _stillborn(status: int) -> str:
    killed = "The system sends signal 9 when memory ends: free some, or have fewer workers."
    other = "What they wrote to stderr may say why."
    return (
        f"{_STILLBORN} workers in a row ended while they were starting, the last by {_how(status)}. "
        f"{killed if status == -signal.SIGKILL else other}"
    )


def share_of_threads(tasks: int) -> tuple[int, int]:
    """How this process's threads are best shared: processes for so many tasks, and threads of each.

    Small networks gain little from a second thread and all from a second process.
    """
    import torch

    threads = torch.get_num_threads()
    count = max(1, min(threads, tasks))
    return count, max(1, threads // count)


class _Told(SilentReport):
    """Passes the progress of a task on, now and then."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._last = connection, time.monotonic()

    def __call__(self, done: float, total: float | None = None, **info: object) -> None:
        """See `Report`."""
        if total and time.monotonic() - self._last > _TELL_SECONDS:
            self._last = time.monotonic()
            self._connection.send_bytes(pickle.dumps(("progress", min(1.0, done / total))))


def serve(descriptor: int) -> None:
    """What a worker does: make the evaluator it is told of, then answer one task after the other."""
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    connection = Connection(descriptor)
    try:
        threads, spec = pickle.loads(connection.recv_bytes())
        evaluator = _made(connection, threads, spec)
        while evaluator is not None:
            what, request = pickle.loads(connection.recv_bytes())
            connection.send_bytes(pickle.dumps(_answer(evaluator, what, request, connection)))
    except (EOFError, OSError):
        return


def _end_with_the_caller() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):  # not sys.stdin, whose lock a thread that waits would hold when Python ends
            pass
    os._exit(1)


def _made(connection: Connection, threads: int, spec: bytes) -> Evaluator | None:
    try:
        made = pickle.loads(spec)
        set_threads(threads)
        evaluator: Evaluator = made.open()
        evaluator.prepare()
    except Exception as error:
        connection.send_bytes(pickle.dumps(("failed", f"{type(error).__name__}: {error}")))
        return None
    connection.send_bytes(pickle.dumps(("ready", "")))
    return evaluator


def _answer(evaluator: Evaluator, what: str, request: Request, connection: Connection) -> tuple[str, Any]:
    if what == EVALUATE:
        found = answered(evaluator, [request])
        return ("raised", found) if isinstance(found, NasError) else ("answer", found[0])
    try:
        done = attempt(lambda asked: finished(evaluator, asked, _Told(connection)), request)
    except MachineError as error:
        return "raised", error
    return "answer", done


def finish_all(
    evaluator: Evaluator,
    requests: Sequence[Request],
    total: int,
    report: Report = SILENT,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Outcome]]:
    """Bring architectures to their final weights: in this process, or in several where that is quicker.

    How many threads each is trained with, and so its weights to the bit, depends on `total` and on the threads of this
    process, and on nothing else: not on how long it takes, nor on what a resume has left.

    Args:
        evaluator: Prepared.
        requests: Of which architectures; of a part of the way, where they say so.
        total: Of how many candidates these are what is left.
        report: Given how many are done, of `total`.
        should_stop: Asked before each and while they are trained.

    Yields:
        The index of a request and its outcome, whose network is what `Evaluator.finish` gave; in any order.

    Raises:
        StoppedEarly: `should_stop` said so.
    """
    done, on_cpu = total - len(requests), evaluator.device == "cpu"
    count, threads = share_of_threads(total) if on_cpu else (1, 1)
    with fixed_threads(threads) if on_cpu else contextlib.nullcontext():
        begun = time.monotonic()
        for i, request in enumerate(requests):
            left = len(requests) - i
            if should_stop():
                raise StoppedEarly(f"stopped after {done} of {total} candidates.")
            if i and count > 1 and left > 1 and (time.monotonic() - begun) / i * left > _WORTH_SECONDS:
                with Workers(evaluator.spec, min(count, left), threads) as workers:
                    try:
                        workers.open(should_stop)
                    except WorkersUnavailableError as error:
                        _logger.info("candidates are finished one after the other: %s", error)
                        count = 1
                    else:
                        yield from _in_workers(workers, dict(enumerate(requests[i:], i)), total, report, should_stop)
                        return
            part = _Part(report, done, total)
            yield i, attempt(lambda asked: finished(evaluator, asked, part, should_stop), request)  # noqa: B023
            done += 1
            report(done, total)


def _in_workers(
    workers: Workers, requests: dict[int, Request], total: int, report: Report, should_stop: Callable[[], bool]
) -> Iterator[tuple[int, Outcome]]:
    for key, request in requests.items():
        workers.submit(key, FINISH, request)
    while workers.busy:
        if should_stop():
            raise StoppedEarly(f"stopped after {total - workers.busy} of {total} candidates.")
        yield from workers.answers(timeout=0.5)
        report(round(total - workers.busy + workers.progress, 1), total)


class _Part(SilentReport):
    """Progress inside one of several networks."""

    def __init__(self, report: Report, number: int, total: int) -> None:
        self._report, self._number, self._total = report, number, total

    def __call__(self, done: float, total: float | None = None, **info: object) -> None:
        """See `Report`."""
        self._report(round(self._number + (done / total if total else 0), 1), self._total)
