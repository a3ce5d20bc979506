from __future__ import annotations

import os

import pytest

from mixnas.evaluators.workers import Workers
from mixnas.search.config import read_config
from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search_space.errors import NasError
from tests.contracts.engine import EngineContract, carry_out, study_at
from tests.search.engines.troubles import Measured, Troubled, end, hang, kind_of
from tests.search.problems import FromFunction, analytic


class TestOneByOne(EngineContract):
    @pytest.fixture
    def engine(self):
        return LocalEngine()


class TestInBatches(EngineContract):
    @pytest.fixture
    def engine(self):
        return LocalEngine(batch=4)


class TestInWorkers(EngineContract):
    @pytest.fixture
    def engine(self):
        return LocalEngine(workers=2)


def test_what_befalls_a_worker_is_its_trials_alone(tmp_path):
    """One is killed, one hangs, some end every process that they are in, some need too much memory."""
    evaluator = Troubled(tmp_path / "begun", {3: end, 20: hang}, deadly=True, large=True, odd=True)
    engine = LocalEngine(workers=2, limit=3.0)
    with study_at(tmp_path / "j") as study:
        carry_out(engine, study, evaluator, Budget(trials=20))
        records = study.results.records
    assert len(records) == 20 == len({r.id for r in records}) and study.results.counts["running"] == 0
    late = [r for r in records if r.failure == "took longer than the limit of 3 s"]
    assert len(late) == 1 and late[0].seconds >= 3
    ended = "the process that did it ended by signal 9"
    for record in (r for r in records if r not in late):
        match kind_of(record):
            case 0:
                assert record.failure == f"{ended}, 2 times"
            case 1:
                assert record.status == "done" and any("half a batch" in why for why in record.retries)
            case 2:
                assert record.failure.startswith("out of memory") and any("half" in why for why in record.retries)
            case 3:
                assert record.failure == "metric accuracy is nan"
            case 4:
                assert record.status == "done"
    assert any(ended in r.retries for r in records)
    assert os.getpid() not in evaluator.pids


def test_what_is_measured_here_is_measured_while_the_workers_stand_still(tmp_path):
    (tmp_path / "running").touch()
    with study_at(tmp_path / "j") as study:
        carry_out(LocalEngine(workers=2), study, Measured(tmp_path / "running"), Budget(trials=8))
        records = study.results.records
    assert [r.metrics["still"] for r in records] == [1.0] * 8
    assert all(r.metrics["latency_ms"] == analytic(r.architecture)["latency_ms"] for r in records)


def test_what_only_this_process_knows_cannot_be_evaluated_elsewhere(tmp_path):
    here = FromFunction(lambda architecture: analytic(architecture))
    with study_at(tmp_path / "j") as study, pytest.raises(NasError, match="set workers: 1, no limit"):
        carry_out(LocalEngine(workers=2), study, here, Budget(trials=8))


def test_workers_that_are_killed_while_they_start_are_not_said_to_know_too_little(tmp_path, monkeypatch):
    start = Workers._start

    def start_and_kill(self):
        worker = start(self)
        worker.process.kill()
        return worker

    monkeypatch.setattr(Workers, "_start", start_and_kill)
    reason = r"^search\.engine, workers: 2: 3 workers in a row ended while they were starting, the last by signal 9\. "
    with study_at(tmp_path / "j") as study, pytest.raises(NasError, match=reason) as raised:
        carry_out(LocalEngine(workers=2), study, Troubled(tmp_path / "begun", {}), Budget(trials=8))
    assert "only this process" not in str(raised.value)


def test_an_engine_of_several_workers_is_read_and_written():
    engine = read_config({"search": {"engine": {"name": "local", "workers": 3, "limit": "1m"}}}, "test").search.engine
    assert engine == LocalEngine(workers=3, limit=60.0)
    assert engine.to_plain() == {"name": "local", "batch": 1, "workers": 3, "limit": 60.0}
