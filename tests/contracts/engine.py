"""What every engine keeps to. A test class inherits it and gives the fixture `engine`."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixnas.evaluators.protocol import Evaluator
from mixnas.search.engines import Engine
from mixnas.search.engines.session import Budget, Ending, Session
from mixnas.search.run.stopping import StopSignal
from mixnas.search.strategies.evolution import NSGA2
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.reading import read_results
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.errors import NasError, StoppedEarly
from mixnas.search_space.space import SearchSpace
from tests.search.problems import SPACE, TINY, FromFunction, analytic

OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})
CONSTRAINTS = parse_constraints(["params <= 1e4"])


def study_at(path, plain=SPACE) -> SearchStudy:
    space = SearchSpace.from_dict(plain)
    return SearchStudy(path, space, OBJECTIVES, CONSTRAINTS, strategy=NSGA2(population_size=6))


def carry_out(engine: Engine, study: SearchStudy, evaluator: Evaluator, budget: Budget, **options) -> Ending:
    with Session(study, budget, **options) as session:
        engine.run(session, evaluator)
        return session.ending()


class Kill:
    """Sends this process's signal, from whichever process evaluates; a second time a little later, if asked to."""

    def __init__(self, number: int, times: int = 1) -> None:
        self._pid, self._number, self._times = os.getpid(), number, times

    def __call__(self) -> None:
        for i in range(self._times):
            if self._pid == os.getpid():  # a thread that is sent one does not wake the main thread, which hears it
                signal.pthread_kill(threading.main_thread().ident, self._number)
            else:
                os.kill(self._pid, self._number)
            elsewhere = self._pid != os.getpid() or threading.current_thread() is not threading.main_thread()
            if i + 1 < self._times and elsewhere:
                time.sleep(0.5)  # signals are not queued: one that comes before the first is delivered is lost
        if self._times > 1:
            threading.Event().wait(0.2)  # a worker's thread: the main thread hears it


class Sleep:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self) -> None:
        time.sleep(self._seconds)


class Counted:
    """The made-up metrics, and a file that gets the id of each architecture that is evaluated, in whichever process.

    At the n-th evaluation it does something else first; with `later`, at each from then on.
    """

    def __init__(self, path: Path, n: int = 10**9, then: Callable[[], object] | None = None, later: bool = False):
        self._path, self._n, self._then, self._later = path, n, then, later
        path.touch()

    @property
    def ids(self) -> list[str]:
        return self._path.read_text().split()

    def __call__(self, architecture):
        with open(self._path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two that both count two more would leave out the n-th
            file.write(f"{architecture.id}\n")
            file.flush()
            count = len(self.ids)
        if self._then is not None and (count == self._n or (self._later and count > self._n)):
            self._then()
        return analytic(architecture)


def fragile(architecture):
    if int(architecture.id, 16) % 3 == 0:
        raise ValueError("every third\nor so")
    return analytic(architecture)


def broken(architecture):
    raise OSError(f"no data for {int(architecture.id, 16)}")


def stopped(architecture):
    raise StoppedEarly("asked to")


class EngineContract:
    """See the module."""

    def test_every_trial_of_the_budget_is_carried_out_once(self, engine, tmp_path):
        counted = Counted(tmp_path / "ids")
        with study_at(tmp_path / "j") as study:
            finish = carry_out(engine, study, FromFunction(counted), Budget(trials=25))
            assert finish.reason == "trials"
            evaluated = [r for r in study.results.records if r.evaluated]
            assert sorted(r.id for r in evaluated) == sorted(counted.ids) and len(set(counted.ids)) == 25
            for record in evaluated:
                assert record.metrics == analytic(record.architecture)

    def test_nothing_in_flight_is_evaluated_twice(self, engine, tmp_path):
        """To the last architecture of a small space, where proposals are bound to meet."""
        counted = Counted(tmp_path / "ids")
        with study_at(tmp_path / "j", TINY) as study:
            finish = carry_out(engine, study, FromFunction(counted), Budget(trials=1000))
            assert finish.reason == "exhausted"
            assert len(counted.ids) == len(set(counted.ids)) == study.space.size()

    def test_failures_are_recorded_and_count(self, engine, tmp_path):
        with study_at(tmp_path / "j") as study:
            carry_out(engine, study, FromFunction(fragile), Budget(trials=30))
            failed = [r for r in study.results.records if r.status == "failed"]
            assert study.results.evaluated == 30 and failed
            assert {r.failure for r in failed} == {"ValueError: every third or so"}
            assert all(int(r.id, 16) % 3 == 0 for r in failed)

    def test_when_the_first_trials_all_fail_alike_it_stops(self, engine, tmp_path):
        with study_at(tmp_path / "j") as study:
            with pytest.raises(NasError, match="first 5 trials all failed for the same reason: OSError: no data"):
                carry_out(engine, study, FromFunction(broken), Budget(trials=50))
            assert study.results.counts["failed"] == 5 and study.results.counts["running"] == 0

    def test_the_time_is_a_budget(self, engine, tmp_path):
        counted = Counted(tmp_path / "ids", 1, Sleep(0.02), later=True)
        with study_at(tmp_path / "j") as study:
            finish = carry_out(engine, study, FromFunction(counted), Budget(trials=10_000, seconds=0.3))
            assert finish.reason == "time" and 0 < study.results.evaluated == len(counted.ids) < 1000

    def test_a_stop_finishes_what_is_in_flight_and_a_resume_goes_on(self, engine, tmp_path):
        counted = Counted(tmp_path / "ids", 4, Kill(signal.SIGINT))
        with study_at(tmp_path / "j") as study:
            with StopSignal() as stop, pytest.raises(StoppedEarly, match="of 40 trials"):
                carry_out(engine, study, FromFunction(counted), Budget(trials=40), stop=stop)
            assert study.results.counts == {"done": len(counted.ids)} and 4 <= len(counted.ids) < 40
        again = Counted(tmp_path / "more ids")
        with study_at(tmp_path / "j") as study:
            carry_out(engine, study, FromFunction(again), Budget(trials=40))
            assert study.results.counts["done"] == 40 and len(set(counted.ids + again.ids)) == 40

    def test_an_abort_marks_what_is_in_flight_as_interrupted(self, engine, tmp_path):
        path = tmp_path / "j"
        counted = Counted(tmp_path / "ids", 9, Kill(signal.SIGINT, times=2))
        with study_at(path) as study:
            with StopSignal() as stop, pytest.raises((KeyboardInterrupt, StoppedEarly)):
                carry_out(engine, study, FromFunction(counted), Budget(trials=50), stop=stop)
            assert study.results.counts["running"] == 0
        counts = read_results(path, OBJECTIVES, CONSTRAINTS).counts
        assert counts["done"] >= 6 and set(counts) <= {"done", "interrupted"}

    def test_what_an_evaluator_raises_itself_ends_it(self, engine, tmp_path):
        with study_at(tmp_path / "j") as study:
            with pytest.raises(StoppedEarly, match="asked to"):
                carry_out(engine, study, FromFunction(stopped), Budget(trials=5))
            assert set(study.results.counts) == {"interrupted"}

    def test_trials_are_reported_once_and_only_when_safe(self, engine, tmp_path):
        reported = []
        with study_at(tmp_path / "j") as study:

            def on_trial(record):
                assert study.synced
                reported.append(record.number)

            carry_out(engine, study, FromFunction(analytic), Budget(trials=30), on_trial=on_trial)
            assert sorted(reported) == sorted(r.number for r in study.results.records if r.evaluated)
