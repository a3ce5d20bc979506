from __future__ import annotations

import math
import os
import signal
import time

import numpy as np
import pytest

from mixnas.search.engines.engine import Budget, LocalEngine
from mixnas.search.run.stopping import StopSignal
from mixnas.search.study.study import SearchStudy, read_results
from mixnas.search_space.errors import NasError, StoppedEarly


@pytest.fixture
def study(tmp_path, space, objectives, constraints):
    with SearchStudy(tmp_path / "j", space, objectives, constraints, population_size=6) as study:
        yield study


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def test_a_trial_that_goes_wrong_is_recorded_and_the_search_goes_on(study, evaluator):
    calls = iter(range(1000))

    def fragile(architecture):
        metrics = evaluator(architecture)
        match next(calls) % 9:
            case 1:
                return {**metrics, "accuracy": math.nan}
            case 2:
                raise MemoryError
            case 3:
                raise ValueError("no such\nthing")
            case 4:
                return {**metrics, "loss": math.inf}
            case 5:
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
            case 6:
                return {**metrics, "name": "dwconv"}
            case 7:
                return {name: np.float32(value) for name, value in metrics.items()}
        return metrics

    LocalEngine().run(study, fragile, Budget(trials=27))
    records = [r for r in study.results.records if r.evaluated]
    assert study.results.counts["done"] == 9 and study.results.counts["failed"] == 18
    assert [r.failure for r in records[:9]] == [
        "", "metric accuracy is nan", "out of memory", "ValueError: no such thing", "metric loss is inf",
        "out of memory: CUDA out of memory. Tried to allocate 20 GiB.", "metric name is str, not a number", "", "",
    ]  # fmt: skip
    assert len({r.id for r in records}) == 27


def test_when_the_first_trials_all_fail_alike_it_stops(study):
    def broken(architecture):
        raise OSError(f"no data for {int(architecture.id, 16)}")

    with pytest.raises(NasError, match="first 5 trials all failed for the same reason: OSError: no data"):
        LocalEngine().run(study, broken, Budget(trials=50))
    assert study.results.counts["failed"] == 5


def test_a_missing_metric_stops_it(study):
    with pytest.raises(NasError, match=r"no metric 'latency_ms'.*It gives: accuracy"):
        LocalEngine().run(study, lambda a: {"accuracy": 1.0}, Budget(trials=50))


def test_the_time_is_a_budget(study, evaluator):
    def slow(architecture):
        time.sleep(0.02)
        return evaluator(architecture)

    finish = LocalEngine().run(study, slow, Budget(trials=10_000, seconds=0.2))
    assert finish.reason == "time" and 0 < study.results.evaluated < 100


def test_trials_are_reported_in_order_once_and_only_when_safe(study, evaluator, objectives, constraints):
    reported = []

    def on_trial(record):
        assert study.synced
        reported.append(record.number)

    LocalEngine().run(study, evaluator, Budget(trials=30), on_trial=on_trial)
    assert reported == [r.number for r in study.results.records if r.evaluated]


def test_progress_is_told(study, evaluator):
    told = []
    LocalEngine().run(study, evaluator, Budget(trials=12), report=lambda done, total, **info: told.append((done, info)))
    assert [done for done, _ in told] == list(range(13))
    assert told[0][1] == {"failed": 0, "hypervolume": None} and told[-1][1]["hypervolume"] > 0


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_interrupt_finishes_the_trial(study, evaluator):
    def interrupted(architecture):
        if study.results.evaluated == 3:
            interrupt()
        return evaluator(architecture)

    with StopSignal() as stop, pytest.raises(StoppedEarly, match="stopped after 4 of 50 trials") as error:
        LocalEngine().run(study, interrupted, Budget(trials=50), stop=stop)
    assert error.value.exit_status == 4
    assert study.results.counts == {"done": 4}
    LocalEngine().run(study, evaluator, Budget(trials=6))
    assert study.results.counts == {"done": 6}


def test_the_second_interrupt_aborts_it(study, evaluator, objectives, constraints):
    def interrupted(architecture):
        if study.results.evaluated == 3:
            interrupt()
            interrupt()
            raise AssertionError("not reached")
        return evaluator(architecture)

    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        LocalEngine().run(study, interrupted, Budget(trials=50), stop=stop)
    assert signal.getsignal(signal.SIGINT) is before
    assert [r.status for r in study.results.records] == ["done"] * 3 + ["interrupted"]
    study.close()
    assert read_results(study._backend.path, objectives, constraints).counts == {"done": 3, "interrupted": 1}


def test_a_shield_holds_an_abort_back():
    heard = []
    with StopSignal(on_request=lambda: heard.append(1)) as stop:
        with pytest.raises(KeyboardInterrupt), stop.shield():
            interrupt()
            interrupt()
            heard.append(2)
        assert stop.requested and stop() and heard == [1, 2]
