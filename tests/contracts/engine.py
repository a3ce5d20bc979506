"""What every engine keeps to. A test class inherits it and gives the fixture `engine`."""

from __future__ import annotations

import os
import signal
import threading
import time

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


class Counted:
    """The made-up metrics, with what was evaluated; from the n-th evaluation on it does something else first."""

    def __init__(self, n: int = 10**9, then=lambda: None) -> None:
        self.ids: list[str] = []
        self._lock = threading.Lock()
        self._n, self._then = n, then

    def __call__(self, architecture):
        with self._lock:
            self.ids.append(architecture.id)
            count = len(self.ids)
        if count >= self._n:
            self._then()
        return analytic(architecture)


class EngineContract:
    """See the module."""

    def test_every_trial_of_the_budget_is_carried_out_once(self, engine, tmp_path):
        counted = Counted()
        with study_at(tmp_path / "j") as study:
            finish = carry_out(engine, study, FromFunction(counted), Budget(trials=25))
            assert finish.reason == "trials"
            evaluated = [r for r in study.results.records if r.evaluated]
            assert sorted(r.id for r in evaluated) == sorted(counted.ids) and len(set(counted.ids)) == 25
            for record in evaluated:
                assert record.metrics == analytic(record.architecture)

    def test_nothing_in_flight_is_evaluated_twice(self, engine, tmp_path):
        """To the last architecture of a small space, where proposals are bound to meet."""
        counted = Counted()
        with study_at(tmp_path / "j", TINY) as study:
            finish = carry_out(engine, study, FromFunction(counted), Budget(trials=1000))
            assert finish.reason == "exhausted"
            assert len(counted.ids) == len(set(counted.ids)) == study.space.size()

    def test_failures_are_recorded_and_count(self, engine, tmp_path):
        def fragile(architecture):
            if int(architecture.id, 16) % 3 == 0:
                raise ValueError("every third\nor so")
            return analytic(architecture)

        with study_at(tmp_path / "j") as study:
            carry_out(engine, study, FromFunction(fragile), Budget(trials=30))
            failed = [r for r in study.results.records if r.status == "failed"]
            assert study.results.evaluated == 30 and len(failed) > 2
            assert {r.failure for r in failed} == {"ValueError: every third or so"}
            assert all(int(r.id, 16) % 3 == 0 for r in failed)

    def test_when_the_first_trials_all_fail_alike_it_stops(self, engine, tmp_path):
        def broken(architecture):
            raise OSError(f"no data for {int(architecture.id, 16)}")

        with study_at(tmp_path / "j") as study:
            with pytest.raises(NasError, match="first 5 trials all failed for the same reason: OSError: no data"):
                carry_out(engine, study, FromFunction(broken), Budget(trials=50))
            assert study.results.counts["failed"] == 5 and study.results.counts["running"] == 0

    def test_the_time_is_a_budget(self, engine, tmp_path):
        counted = Counted(1, lambda: time.sleep(0.02))
        with study_at(tmp_path / "j") as study:
            finish = carry_out(engine, study, FromFunction(counted), Budget(trials=10_000, seconds=0.3))
            assert finish.reason == "time" and 0 < study.results.evaluated == len(counted.ids) < 1000

    def test_a_stop_finishes_what_is_in_flight_and_a_resume_goes_on(self, engine, tmp_path):
        stop = StopSignal()
        counted = Counted(4, stop.request)
        with study_at(tmp_path / "j") as study:
            with pytest.raises(StoppedEarly, match="of 40 trials"):
                carry_out(engine, study, FromFunction(counted), Budget(trials=40), stop=stop)
            assert study.results.counts == {"done": len(counted.ids)} and 4 <= len(counted.ids) < 40
        again = Counted()
        with study_at(tmp_path / "j") as study:
            carry_out(engine, study, FromFunction(again), Budget(trials=40))
            assert study.results.counts["done"] == 40 and len(set(counted.ids + again.ids)) == 40

    def test_an_abort_marks_what_is_in_flight_as_interrupted(self, engine, tmp_path):
        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.2)  # a worker's thread: the main thread hears it

        path = tmp_path / "j"
        with study_at(path) as study:
            with StopSignal() as stop, pytest.raises((KeyboardInterrupt, StoppedEarly)):
                carry_out(engine, study, FromFunction(Counted(9, interrupt)), Budget(trials=50), stop=stop)
            assert study.results.counts["running"] == 0
        counts = read_results(path, OBJECTIVES, CONSTRAINTS).counts
        assert counts["done"] >= 6 and set(counts) <= {"done", "interrupted"}

    def test_what_an_evaluator_raises_itself_ends_it(self, engine, tmp_path):
        def stopped(architecture):
            raise StoppedEarly("asked to")

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
