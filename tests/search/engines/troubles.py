"""Evaluators whose evaluations end their process, hang or run out of memory. Workers import this, so it is light."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from mixnas.evaluators.protocol import Outcome, attempt
from tests.search.problems import FromFunction, analytic


class OutOfMemoryError(RuntimeError):
    """Called as torch calls a GPU's."""


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still():
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(3600)


def hang():
    time.sleep(3600)


class Troubled(FromFunction):
    """The made-up metrics after `seconds`; a line "id pid" in `path` for each evaluation that was begun.

    At the evaluations whose numbers stand in `at` something happens first. Of five architectures in a row of ids, one
    ends its process each time (`deadly`), one is too large for the memory at hand, and fits in two parts or never
    (`large`), and one is not a number (`odd`).
    """

    def __init__(
        self,
        path: Path,
        at: dict[int, Callable[[], object]] | None = None,
        seconds: float = 0.0,
        deadly: bool = False,
        large: bool = False,
        odd: bool = False,
    ):
        self.path, self._at, self._seconds = path, at or {}, seconds
        self._deadly, self._large, self._odd = deadly, large, odd
        path.touch()

    @property
    def begun(self) -> list[str]:
        return [line.split()[0] for line in self.path.read_text().splitlines()]

    @property
    def pids(self) -> set[int]:
        return {int(line.split()[1]) for line in self.path.read_text().splitlines()}

    def evaluate(self, requests):
        return [attempt(self._evaluate, request) for request in requests]

    def _evaluate(self, request):
        with open(self.path, "a") as file:
            file.write(f"{request.architecture.id} {os.getpid()}\n")
        self._at.get(len(self.begun), lambda: None)()
        time.sleep(self._seconds)
        kind = int(request.architecture.id, 16) % 5
        if kind == 0 and self._deadly:
            end()
        if (kind == 1 and self._large and request.parts == 1) or (kind == 2 and self._large):
            raise OutOfMemoryError("tried to allocate 20 GiB")
        metrics = analytic(request.architecture)
        return Outcome({**metrics, "accuracy": math.nan} if kind == 3 and self._odd else metrics)


def kind_of(record) -> int:
    return int(record.id, 16) % 5


class Measured(FromFunction):
    """Its latency is measured where the search runs, while the file `running` does not grow."""

    quiet = True

    def __init__(self, path):
        super().__init__(analytic)
        self.path = path

    def elsewhere(self):
        return Ticking(self.path)

    def complete(self, request, outcome):
        before = self.path.stat().st_size
        time.sleep(0.2)
        still = self.path.stat().st_size == before
        return Outcome({**outcome.metrics, **analytic(request.architecture), "still": float(still)})


class Ticking(FromFunction):
    """Writes all the time that it evaluates, and knows nothing of latency."""

    def __init__(self, path):
        super().__init__(self._tick)
        self.path = path

    def _tick(self, architecture):
        for _ in range(40):
            time.sleep(0.01)
            with open(self.path, "a") as file:
                file.write(".")
        return {"accuracy": 0.5}


class InRungs(Troubled):
    """The made-up metrics, of which a training gives a part; a line "id pid begun until state" in `path` for each.

    Whoever is to go on has to be given the state that was left: the whole history of it, and padding, so that it is
    large for Ray.
    """

    def _evaluate(self, request):
        part, identity = request.part, request.architecture.id
        history = [] if part.state is None else json.loads(part.state)["history"]
        with open(self.path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two that both count two more would both have the trouble, or neither
            file.write(f"{identity} {os.getpid()} {part.begun} {part.until} {len(history)}\n")
            file.flush()
            climbed = self.climbed
        if climbed.count(climbed[-1]) == 1:  # who comes again, after a process ended, would be given up
            self._at.get(len(climbed), lambda: None)()
        assert history == [] or (history[0] == identity and history[-1] == part.begun)
        assert (part.begun == 0) == (not history), "it was to go on, and was given no state"
        time.sleep(self._seconds)
        metrics = analytic(request.architecture)
        known = [*(history or [identity]), part.until]
        state = json.dumps({"history": known, "padding": "x" * 300_000}).encode() if part.until < 1 else None
        learned = metrics["accuracy"] * (0.5 + 0.5 * part.until**0.5)
        return Outcome({**metrics, "accuracy": learned, "parts": float(len(known) - 1)}, state=state)

    @property
    def climbed(self) -> list[tuple[str, float, float]]:
        """Which architecture, from where and to where, in the order in which they were begun."""
        rows = [line.split() for line in self.path.read_text().splitlines()]
        return [(identity, float(begun), float(until)) for identity, _, begun, until, _ in rows]
