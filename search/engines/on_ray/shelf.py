"""Where a training that was left off lies on a cluster, until the worker that goes on with it takes it.

States are megabytes, and Ray Tune writes the configuration of a trial down again and again; so that holds none, and
the state goes through the object store. (Our own loop hands objects of the store to its workers as arguments.) The
process that is connected to Ray owns them, and what they are made of lies in the run's folder: the end of a worker, or
of the shelf, loses nothing. Who finds none begins anew, and comes to the same.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from mixnas.evaluators.protocol import Request

_logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 60.0


class _Shelf:
    """An actor: references by key; what they refer to never comes here."""

    def __init__(self) -> None:
        self._there: dict[int, list[ray.ObjectRef]] = {}

    def put(self, key: int, held: list[ray.ObjectRef]) -> None:
        self._there[key] = held

    def take(self, key: int) -> list[ray.ObjectRef]:
        return self._there.get(key, [])

    def drop(self, key: int) -> None:
        self._there.pop(key, None)


class Shelf:
    """See the module; of the process that is connected to Ray. The actor is begun when it is needed first."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._name = ""
        self._owned: dict[int, ray.ObjectRef] = {}

    def lay(self, key: int, request: Request) -> tuple[Request, Any]:
        """A request without its state, and where that lies: what `taken` wants; None where there is no state.

        Args:
            key: Says which, until it is cleared.
            request: Any.
        """
        part = request.part
        if part is None or part.state is None:
            return request, None
        bare = replace(request, part=replace(part, state=None))
        try:
            if self._actor is None:
                self._name = f"shelf-{uuid.uuid4()}"
                self._actor = ray.remote(_Shelf).options(name=self._name, num_cpus=0, max_restarts=0).remote()
            self._owned[key] = ray.put(part.state)
            # it is there before anybody looks for it: calls of two processes come in no order
            ray.get(self._actor.put.remote(key, [self._owned[key]]), timeout=_PATIENCE_SECONDS)
        except RayError:
            _logger.warning("the process that hands out trainings to go on with was lost; another takes its place")
            self.end()
            return bare, None
        return bare, (self._name, key)

    def clear(self, key: int) -> None:
        """It is not wanted any more."""
        if self._owned.pop(key, None) is not None and self._actor is not None:
            self._actor.drop.remote(key)

    def end(self) -> None:
        """End the actor."""
        self._owned.clear()
        if self._actor is not None:
            with contextlib.suppress(Exception):  # the head may be gone
                ray.kill(self._actor, no_restart=True)
            self._actor = None


def taken(request: Request, place: Any) -> Request:
    """A request with its state again, in a worker; without, where that cannot be had.

    Args:
        request, place: As `Shelf.lay` gave them.
    """
    if place is None:
        return request
    name, key = place
    state: bytes | None = None
    with contextlib.suppress(Exception):
        actor: Any = ray.get_actor(name)
        for held in ray.get(actor.take.remote(key), timeout=_PATIENCE_SECONDS):
            state = ray.get(held, timeout=_PATIENCE_SECONDS)
    assert request.part is not None
    return replace(request, part=replace(request.part, state=state))
