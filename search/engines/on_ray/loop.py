"""Our own loop on Ray: workers that live as long as the search, batches for what is quick, replacement of what dies."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from mixnas.evaluators import answering
from mixnas.evaluators.answering import Answerer, Where
from mixnas.evaluators.protocol import Outcome
from mixnas.search.engines.elsewhere import OUT_OF_MEMORY, Errand, Errands
from mixnas.search.engines.on_ray.cluster import Cluster
from mixnas.search.engines.session import Session
from mixnas.search_space.errors import MachineError, NasError

_logger = logging.getLogger(__name__)

LARGEST_BATCH = 256
_BATCH_SECONDS = 0.5  # that a batch is to take
_QUICK_SECONDS = 0.25  # trials below it have a second batch waiting at each worker
_LOOK_SECONDS = 0.5
_STILLBORN = 3  # so many workers in a row that end before they are ready are no accident
_ALONE_SECONDS = 300.0  # without any worker, until the search gives up
_LATEST = 50  # trials whose seconds say how long one takes


@dataclass(slots=True)
class _Batch:
    errands: list[Errand]
    answer: ray.ObjectRef


@dataclass(slots=True)
class _Worker:
    actor: Any
    says: ray.ObjectRef | None  # where it is, then whether it could make its evaluator; None once it is ready
    where: Where | None = None
    batches: deque[_Batch] = field(default_factory=deque)
    since: float = 0.0  # when the first of its batches was begun


class Loop:
    """A context manager; `run` carries out what the session proposes.

    Args:
        cluster: Connected.
        session: Of the search.
        errands: Of that session.
        limit: Seconds that a trial may take; a batch may take so many times as long as it has trials.

    Raises:
        NasError: No worker can make the evaluator, or one has other code.
    """

    def __init__(self, cluster: Cluster, session: Session, errands: Errands, limit: float | None = None) -> None:
        self._cluster, self._session, self._errands, self._limit = cluster, session, errands, limit
        share = cluster.share
        self._class = ray.remote(Answerer).options(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            resources=dict(share.resources),
            max_restarts=0,  # who is lost is replaced here, so that its batch is tried again once and is noted
            max_task_retries=0,
        )
        self._spec = ray.put(errands.spec)  # arrays in it are not copied by workers of one machine
        self._seconds: deque[float] = deque(maxlen=_LATEST)
        self._workers: list[_Worker] = []
        self._stillborn = 0
        self._alone_since = time.monotonic()

    def __enter__(self) -> Loop:
        self._workers = [self._begin() for _ in range(self._cluster.workers)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            with contextlib.suppress(Exception):  # the head may be gone
                ray.kill(worker.actor, no_restart=True)
        self._workers.clear()

    def _begin(self) -> _Worker:
        actor: Any = self._class.remote(self._cluster.share.extensions, self._cluster.share.threads)
        return _Worker(actor, actor.where.remote())

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self, most: float = math.inf) -> None:
        """Until the session proposes nothing more, or so many were begun, and nothing is in flight.

        Raises:
            MachineError: The cluster's head is gone.
            NasError: What the evaluator raised itself; or there is no worker.
        """
        while True:
            ready = [worker for worker in self._workers if worker.says is None]
            if ready:
                most -= self._fill(ready, most)
                self._alone_since = time.monotonic()
            busy = any(worker.batches for worker in self._workers)
            if not busy and not self._errands.waiting and (ready or self._session.over):
                return
            if not ready and time.monotonic() - self._alone_since > _ALONE_SECONDS:
                raise MachineError(
                    f"no worker could be had from the cluster for {_ALONE_SECONDS:.0f} s; what it has free: "
                    f"{ray.available_resources()}."
                )
            self._listen()
            self._end_late()
            self._cluster.check()

    def _fill(self, ready: list[_Worker], most: float) -> int:
        """Give each worker what it may have; returns how many were begun that had not been before."""
        begun = 0
        size = self._size()
        for depth in range(1 if size == 1 else 2):
            for worker in ready:
                if len(worker.batches) > depth:
                    continue
                waiting = self._errands.waiting  # alone each, as what was in a batch that was lost is to be
                wanted = 1 if waiting else int(min(size, most - begun))
                errands = self._errands.next(wanted) if wanted > 0 else []
                if not errands:
                    return begun
                begun += 0 if waiting else len(errands)
                self._send(worker, errands)
        return begun

    def _size(self) -> int:
        """Of the next batches: what takes half a second; less while little is known, and at the end."""
        seconds = statistics.median(self._seconds) if self._seconds else self._session.seconds()
        if seconds is None or seconds > _QUICK_SECONDS:
            return 1
        size = round(_BATCH_SECONDS / max(seconds, 1e-6))
        batches = 2 * len(self._workers)
        known, left = self._session.evaluated, self._session.left
        return max(1, min(LARGEST_BATCH, size, math.ceil(known / batches), math.ceil(left / batches)))

    def _send(self, worker: _Worker, errands: list[Errand]) -> None:
        if not worker.batches:
            worker.since = time.monotonic()
        answer = worker.actor.answer.remote([errand.request for errand in errands])
        worker.batches.append(_Batch(errands, answer))

    def _listen(self) -> None:
        """Wait for something to happen, and deal with it."""
        expected = {}
        for worker in self._workers:
            if worker.says is not None:
                expected[worker.says] = worker
            elif worker.batches:
                expected[worker.batches[0].answer] = worker
        found, _ = ray.wait(list(expected), num_returns=1, timeout=self._patience())
        for ref in found:
            worker = expected[ref]
            try:
                value = ray.get(ref)
            except RayTaskError as error:  # Ray's way to say that a method raised
                self._failed(worker, error)
            except RayError as error:
                self._cluster.check()
                self._lost(worker, error)
            else:
                if worker.says is not None:
                    self._introduced(worker, value)
                else:
                    self._answered(worker, value)

    def _patience(self) -> float:
        if self._limit is None:
            return _LOOK_SECONDS
        due = [self._due(worker) for worker in self._workers if worker.batches]
        return max(0.0, min([_LOOK_SECONDS, *(when - time.monotonic() for when in due)]))

    def _due(self, worker: _Worker) -> float:
        assert self._limit is not None
        return worker.since + self._limit * len(worker.batches[0].errands)

    # -- workers ------------------------------------------------------------------------------------------------------

    def _introduced(self, worker: _Worker, said: Where | str) -> None:
        if isinstance(said, Where):
            refuse_other_code(said)
            worker.where = said
            if said.host == socket.gethostname():
                self._cluster.pids.add(said.pid)
            worker.says = worker.actor.open.remote(self._spec)
        elif said:
            raise NasError(f"a worker on {worker.where and worker.where.host} cannot make the evaluator: {said}")
        else:
            worker.says, self._stillborn = None, 0

    def _answered(self, worker: _Worker, value: list[Outcome] | NasError) -> None:
        if isinstance(value, NasError):
            raise value
        batch = worker.batches.popleft()
        worker.since = time.monotonic()
        for errand, outcome in zip(batch.errands, value, strict=True):
            if not outcome.failure:
                self._seconds.append(outcome.seconds)
            self._errands.done(errand, outcome)

    def _failed(self, worker: _Worker, error: RayTaskError) -> None:
        raise NasError(f"a worker on {worker.where and worker.where.host} failed: {error}") from None

    def _lost(self, worker: _Worker, error: RayError) -> None:
        """Replace a worker, and have what was in it done again."""
        text = str(error)
        if worker.says is not None:
            self._stillborn += 1
            if self._stillborn >= _STILLBORN:
                raise NasError(f"{_STILLBORN} workers in a row were lost while they were starting: {text}")
        # of a machine that is gone Ray says at first that the worker cannot be reached, and only later that it has died
        elsewhere = isinstance(error, ActorUnavailableError) or "node has died" in text or "node was terminated" in text
        short = "low on memory" in text
        reason = "its machine was lost, or cannot be reached" if elsewhere else "the process that did it ended"
        _logger.warning("a worker was lost: %s", text.splitlines()[0] if text else type(error).__name__)
        batches = self._replace(worker)
        for i, batch in enumerate(batches):
            for errand in batch.errands:
                if i:
                    self._errands.back(errand)
                elif short and len(batch.errands) == 1:
                    self._errands.done(errand, Outcome(failure=f"{OUT_OF_MEMORY}: Ray ended the worker"))
                else:
                    alone = len(batch.errands) == 1
                    more = "" if alone else f", in a batch of {len(batch.errands)}"
                    blamed = alone and not elsewhere and not short and isinstance(error, RayActorError)
                    self._errands.lost(errand, f"{reason}{more}", blamed=blamed)

    def _end_late(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if self._limit is None or not worker.batches or now < self._due(worker):
                continue
            seconds = now - worker.since
            late, *others = self._replace(worker)
            reason = f"took longer than the limit of {self._limit:g} s"
            for errand in late.errands:
                if len(late.errands) == 1:
                    self._errands.late(errand, reason, seconds)
                else:
                    self._errands.lost(errand, f"{reason} each, in a batch of {len(late.errands)}", blamed=False)
            for batch in others:
                for errand in batch.errands:
                    self._errands.back(errand)

    def _replace(self, worker: _Worker) -> list[_Batch]:
        """End a worker for good, and begin another; returns the batches that it had."""
        with contextlib.suppress(Exception):
            ray.kill(worker.actor, no_restart=True)
        where = worker.where
        if where is not None and where.host == socket.gethostname():
            self._cluster.pids.discard(where.pid)
            if where.pid in self._cluster.processes():  # one that stands still does not hear Ray
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(where.pid, signal.SIGKILL)
        self._workers[self._workers.index(worker)] = self._begin()
        return list(worker.batches)


def refuse_other_code(where: Where) -> None:
    """Refuse a worker whose results would not be those of this process's code.

    Raises:
        NasError: With both versions.
    """
    here = answering.code_version()
    if where.code != here:
        raise NasError(
            f"search.engine: the worker {where.pid} on {where.host} runs {where.code}, and this search {here}. "
            "Their results do not compare. Install the same on all machines, and resume."
        )
