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
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from mixnas.evaluators.answering import Answerer, Where
from mixnas.evaluators.protocol import EvaluatorSpec, Outcome, Request
from mixnas.search.engines.elsewhere import OUT_OF_MEMORY
from mixnas.search.engines.on_ray.cluster import Cluster, Here
from mixnas.search.engines.on_ray.driver import Asks, Flight, Work, refuse_other_code
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
    flights: list[Flight]
    answer: ray.ObjectRef


@dataclass(slots=True)
class _Worker:
    actor: Any
    says: ray.ObjectRef | None  # where it is, then whether it could make its evaluator; None once it is ready
    where: Where | None = None
    batches: deque[_Batch] = field(default_factory=deque)
    since: float = 0.0  # when the first of its batches was begun


def _without_state(request: Request) -> Request:
    return request if request.part is None else replace(request, part=replace(request.part, state=None))


class Loop:
    """A context manager; `run` carries out what the search proposes.

    Args:
        cluster: Connected.
        search: Asked what to evaluate, and told what came of it.
        spec: Makes the evaluator.
        work: With the limit of a trial; a batch may take so many times as long as it has trials.

    Raises:
        NasError: No worker can make the evaluator, or one has other code.
    """

    def __init__(self, cluster: Cluster, search: Asks, spec: EvaluatorSpec, work: Work) -> None:
        self._cluster, self._search, self._limit, self._code = cluster, search, work.limit, work.code
        self._here = Here(work.session)
        share = cluster.share
        self._class = ray.remote(Answerer).options(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            resources=dict(share.resources),
            max_restarts=0,  # who is lost is replaced here, so that its batch is tried again once and is noted
            max_task_retries=0,
        )
        self._spec = ray.put(spec)  # arrays in it are not copied by workers of one machine
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
        """Until the search proposes nothing more, or so many were begun, and nothing is in flight.

        Raises:
            MachineError: No worker is to be had.
            NasError: What the evaluator raised itself; or there is no worker.
        """
        while True:
            ready = [worker for worker in self._workers if worker.says is None]
            if ready:
                most -= self._fill(ready, most)
                self._alone_since = time.monotonic()
            busy = any(worker.batches for worker in self._workers)
            if not busy and not self._search.waiting and (ready or self._search.over):
                return
            if not ready and time.monotonic() - self._alone_since > _ALONE_SECONDS:
                raise MachineError(
                    f"no worker could be had from the cluster for {_ALONE_SECONDS:.0f} s; what it has free: "
                    f"{ray.available_resources()}."
                )
            self._listen()
            self._end_late()

    def _fill(self, ready: list[_Worker], most: float) -> int:
        """Give each worker what it may have; returns how many were begun that had not been before."""
        begun = 0
        size = self._size()
        for depth in range(1 if size == 1 else 2):
            for worker in ready:
                if len(worker.batches) > depth:
                    continue
                waiting = self._search.waiting  # alone each, as what was in a batch that was lost is to be
                wanted = 1 if waiting else int(min(size, most - begun))
                flights = self._search.next(wanted) if wanted > 0 else []
                if not flights:
                    return begun
                begun += 0 if waiting else len(flights)
                self._send(worker, flights)
        return begun

    def _size(self) -> int:
        """Of the next batches: what takes half a second; less while little is known, and at the end."""
        seconds = statistics.median(self._seconds) if self._seconds else self._search.seconds()
        if seconds is None or seconds > _QUICK_SECONDS:
            return 1
        size = round(_BATCH_SECONDS / max(seconds, 1e-6))
        batches = 2 * len(self._workers)
        known, left = self._search.evaluated, self._search.left
        return max(1, min(LARGEST_BATCH, size, math.ceil(known / batches), math.ceil(left / batches)))

    def _send(self, worker: _Worker, flights: list[Flight]) -> None:
        if not worker.batches:
            worker.since = time.monotonic()
        # states of trainings that are gone on with, each an object of the store, which Ray puts in its place
        parts = [flight.request.part for flight in flights]
        states = [None if part is None or part.state is None else ray.put(part.state) for part in parts]
        bare = [_without_state(flight.request) for flight in flights]
        worker.batches.append(_Batch(flights, worker.actor.answer.remote(bare, *states)))

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
        return worker.since + self._limit * len(worker.batches[0].flights)

    # -- workers ------------------------------------------------------------------------------------------------------

    def _introduced(self, worker: _Worker, said: Where | str) -> None:
        if isinstance(said, Where):
            refuse_other_code(said, self._code)
            worker.where = said
            if said.host == socket.gethostname():
                self._here.pids.add(said.pid)
                self._search.here(self._here.pids)
            worker.says = worker.actor.open.remote(self._spec)
        elif said:
            raise NasError(f"a worker on {worker.where and worker.where.host} cannot make the evaluator: {said}")
        else:
            worker.says, self._stillborn = None, 0

    def _answered(self, worker: _Worker, value: list[Outcome] | NasError) -> None:
        if isinstance(value, NasError):
            raise value
        batch = worker.batches.popleft()
        begun = time.monotonic()
        for flight, outcome in zip(batch.flights, value, strict=True):
            if not outcome.failure:
                self._seconds.append(outcome.seconds)
            self._search.done(flight, outcome)
        now = time.monotonic()
        worker.since = now
        for other in self._workers:  # who may have stood still meanwhile, as latency was measured
            other.since += now - begun if other is not worker else 0.0

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
            for flight in batch.flights:
                if i:
                    self._search.back(flight)
                elif short and len(batch.flights) == 1:
                    self._search.done(flight, Outcome(failure=f"{OUT_OF_MEMORY}: Ray ended the worker"))
                else:
                    alone = len(batch.flights) == 1
                    more = "" if alone else f", in a batch of {len(batch.flights)}"
                    blamed = alone and not elsewhere and not short and isinstance(error, RayActorError)
                    self._search.lost(flight, f"{reason}{more}", blamed=blamed)

    def _end_late(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if self._limit is None or not worker.batches or now < self._due(worker):
                continue
            seconds = now - worker.since
            late, *others = self._replace(worker)
            reason = f"took longer than the limit of {self._limit:g} s"
            for flight in late.flights:
                if len(late.flights) == 1:
                    self._search.late(flight, reason, seconds)
                else:
                    self._search.lost(flight, f"{reason} each, in a batch of {len(late.flights)}", blamed=False)
            for batch in others:
                for flight in batch.flights:
                    self._search.back(flight)

    def _replace(self, worker: _Worker) -> list[_Batch]:
        """End a worker for good, and begin another; returns the batches that it had."""
        with contextlib.suppress(Exception):
            ray.kill(worker.actor, no_restart=True)
        where = worker.where
        if where is not None and where.host == socket.gethostname():
            if where.pid in self._here.processes():  # one that stands still does not hear Ray
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(where.pid, signal.SIGKILL)
            self._here.pids.discard(where.pid)
            self._search.here(self._here.pids)
        self._workers[self._workers.index(worker)] = self._begin()
        return list(worker.batches)
