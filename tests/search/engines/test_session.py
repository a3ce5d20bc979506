from __future__ import annotations

import decimal
import errno
import fractions
import math
import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import torch

from mixnas.evaluators.protocol import Outcome
from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget, Session
from mixnas.search.run.stopping import StopSignal
from mixnas.search.strategies import Strategy
from mixnas.search.strategies.drawing import BatchSampler
from mixnas.search.strategies.evolution import NSGA2
from mixnas.search.study.reading import read_results
from mixnas.search.study.study import Proposal, SearchStudy
from mixnas.search_space.errors import MachineError, NasError, StoppedEarly
from tests.contracts.engine import carry_out
from tests.search.problems import FromFunction, analytic


@pytest.fixture
def study(tmp_path, space, objectives, constraints):
    with SearchStudy(tmp_path / "j", space, objectives, constraints, strategy=NSGA2(population_size=6)) as study:
        yield study


def outcome(proposal) -> Outcome:
    return Outcome(analytic(proposal.architecture), seconds=0.5)


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def test_a_trial_that_goes_wrong_is_recorded_and_the_search_goes_on(study):
    cases = {}  # by architecture: one whose memory is used up is tried again

    def fragile(architecture):
        metrics = analytic(architecture)
        match cases.setdefault(architecture.id, len(cases)) % 9:
            case 1:
                return {**metrics, "accuracy": math.nan}
            case 2:
                sys.exit(3)
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

    carry_out(LocalEngine(), study, FromFunction(fragile), Budget(trials=27))
    records = [r for r in study.results.records if r.evaluated]
    assert study.results.counts["done"] == 9 and study.results.counts["failed"] == 18
    assert [r.failure for r in records[:9]] == [
        "", "metric accuracy is nan", "SystemExit: 3", "ValueError: no such thing", "metric loss is inf",
        "out of memory: CUDA out of memory. Tried to allocate 20 GiB.", "metric name is str, not a number", "", "",
    ]  # fmt: skip
    assert len({r.id for r in records}) == 27


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), r"/tmp/x: No space left on device\. Make room\."),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded. Make room"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied. Make it writable"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files. End other programs"),
        (MemoryError(), "this machine's memory is used up"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
            "memory is used up",
        ),
    ],
)
def test_a_fault_of_the_machine_is_no_verdict(study, tmp_path, space, objectives, constraints, error, says):
    """The trial stays open, and its architecture may be tried again when there is room."""
    calls = iter(range(9))

    def fragile(architecture):
        if next(calls) == 2:
            raise error
        return analytic(architecture)

    with pytest.raises(MachineError, match=says) as stopped:
        carry_out(LocalEngine(), study, FromFunction(fragile), Budget(trials=8))
    assert stopped.value.exit_status == 4 and isinstance(stopped.value, StoppedEarly)
    assert study.results.counts == {"done": 2, "interrupted": 1} and study.results.evaluated == 2
    open_again = study.results.records[2].id
    study.close()
    with SearchStudy(tmp_path / "j", space, objectives, constraints) as again:
        assert again.results.evaluated == 2 and open_again not in again._seen


def test_what_a_trial_changes_for_all_is_put_back(study):
    """One that switched gradients off once failed ten of the twelve after it."""
    before = _globals()

    def careless(architecture):
        torch.set_grad_enabled(False)
        torch.set_num_threads(7)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.manual_seed(1)
        torch.use_deterministic_algorithms(True)
        np.random.seed(1)
        random.seed(1)
        warnings.simplefilter("ignore")
        os.environ["CARELESS"] = "1"
        os.chdir("/")
        raise ValueError(str(torch.tensor([1.0]).dtype))

    carry_out(LocalEngine(), study, FromFunction(careless), Budget(trials=3))
    assert study.results.counts == {"failed": 3} and _globals() == before


def _globals() -> list[object]:
    return [
        *(torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()),
        *(torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled(), random.getstate()),
        *(np.random.get_state()[1].tolist(), list(warnings.filters), dict(os.environ), os.getcwd()),
    ]


def test_a_full_disk_under_the_journal_stops_it_with_what_to_do(study, monkeypatch):
    """What was in flight is marked by the next session; nothing of the disk's error is a traceback."""
    real = os.write
    full = []

    def write(handle: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr("mixnas.search.study.journal.os.write", write)

    def fills(architecture):
        if study.results.evaluated == 2:
            full.append(True)
        return analytic(architecture)

    with pytest.raises(MachineError, match=r"cannot be written: No space left on device\. Make room, then resume"):
        carry_out(LocalEngine(), study, FromFunction(fills), Budget(trials=8))
    full.clear()
    study.close()


def kept(tmp_path, space, objectives, outcome: Outcome):
    """The record that a session makes of an outcome."""
    with SearchStudy(tmp_path / "kept", space, objectives) as study, Session(study, Budget(trials=3)) as session:
        (proposal,) = session.next()
        return session.done(proposal, outcome)


HALVES = [
    *(torch.tensor(0.5), torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)),
    *(np.array(0.5), np.array([0.5]), np.float32(0.5), decimal.Decimal("0.5"), fractions.Fraction(1, 2)),
]


@pytest.mark.parametrize("half", HALVES, ids=repr)
def test_whatever_is_a_number_is_kept_as_one(tmp_path, space, objectives, half):
    known = {"latency_ms": np.int64(3), "params": 7}
    record = kept(tmp_path, space, objectives, Outcome({**known, "accuracy": half}, seconds=half))
    assert (record.status, record.metrics, record.seconds) == ("done", {**known, "accuracy": 0.5}, 0.5)
    assert {type(value) for value in record.metrics.values()} <= {int, float}


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"accuracy": torch.tensor([0.5, 0.5])}, "metric accuracy is Tensor, not a number"),
        ({"accuracy": np.array([])}, "metric accuracy is ndarray, not a number"),
        ({"accuracy": "0.5"}, "metric accuracy is str, not a number"),
        ({"accuracy": None}, "metric accuracy is NoneType, not a number"),
        ({"accuracy": 1 + 0j}, "metric accuracy is complex, not a number"),
        ({"accuracy": 10**400}, "metric accuracy is too large for a number"),
        ({"accuracy": decimal.Decimal("nan")}, "metric accuracy is nan"),
        ({3: 1.0}, "metric 3 has a name that is int, not text"),
    ],
)
def test_what_is_no_number_is_a_failure(tmp_path, space, objectives, metrics, says):
    record = kept(tmp_path, space, objectives, Outcome({"latency_ms": 1.0, **metrics}))
    assert (record.status, record.failure) == ("failed", says)


def test_a_failure_and_a_time_of_any_kind_are_kept(tmp_path, space, objectives):
    record = kept(tmp_path, space, objectives, Outcome({}, ValueError("no such"), seconds=math.nan))
    assert (record.status, record.failure) == ("failed", "ValueError: no such") and 0 <= record.seconds < 3600


def test_an_outcome_is_taken_once_and_of_what_was_proposed(study):
    with Session(study, Budget(trials=9)) as session:
        first, second = session.next(2)
        session.done(first, outcome(first))
        with pytest.raises(NasError, match=f"trial {first.number} is not in flight: its outcome was taken already"):
            session.done(first, outcome(first))
        swapped = Proposal(second.trial, first.request)
        with pytest.raises(NasError, match=f"trial {second.number}: .* {second.architecture.id} was proposed"):
            session.done(swapped, outcome(first))
        assert session.done(second, outcome(second)).id == second.architecture.id
    assert study.results.counts == {"done": 2}


def test_an_evaluator_that_answers_too_little_is_named(study):
    class Short(FromFunction):
        def evaluate(self, requests):
            return super().evaluate(requests)[1:]

    with pytest.raises(NasError, match="the evaluator Short gave 2 outcomes for 3 requests"):
        carry_out(LocalEngine(batch=3), study, Short(analytic), Budget(trials=9))
    assert study.results.counts == {"interrupted": 3}


@pytest.mark.parametrize("given", [[], None, ["conv"]], ids=repr)
@pytest.mark.parametrize("later", [False, True])
def test_a_strategy_that_proposes_nothing_is_named(tmp_path, space, objectives, given, later):
    class Nothing(BatchSampler):
        def propose(self, study, count, rng):
            return [space.decode(np.zeros(len(space.variables), dtype=int))] if later and not study.trials else given

    class Strange(Strategy):
        def make(self, question, cheap, acceptable):
            return Nothing(question, acceptable)

    path = tmp_path / "strange"
    says = r"the strategy Nothing was asked to propose .* It must give a list"
    with SearchStudy(path, space, objectives, strategy=Strange()) as study, pytest.raises(NasError, match=says):
        carry_out(LocalEngine(batch=2), study, FromFunction(analytic), Budget(trials=9))
    assert "running" not in read_results(path, objectives).counts


def test_a_missing_metric_stops_it(study):
    with pytest.raises(NasError, match=r"no metric 'latency_ms'.*It gives: accuracy"):
        carry_out(LocalEngine(), study, FromFunction(lambda a: {"accuracy": 1.0}), Budget(trials=50))
    assert study.results.counts == {"interrupted": 1}


def test_outcomes_come_back_in_any_order(study, objectives, constraints):
    """As Ray Tune calls it: `suggest` for one at a time, `on_trial_complete` when it pleases."""
    with Session(study, Budget(trials=6)) as session:
        in_flight = [*session.next(1), *session.next(1), *session.next(2)]
        assert len(in_flight) == 4 and len({p.architecture.id for p in in_flight}) == 4
        for proposal in reversed(in_flight):
            record = session.done(proposal, outcome(proposal))
            assert record.id == proposal.architecture.id and record.seconds == 0.5
        assert not session.over
        rest = session.next(10)  # as many as the budget still allows
        assert len(rest) == 2 and session.next(10) == [] and not session.over
        session.done(rest[0], Outcome(failure="its worker died"))
        session.done(rest[1], outcome(rest[1]))
        assert session.over and session.next(1) == [] and session.ending().reason == "trials"
    assert [r.status for r in study.results.records] == ["done"] * 4 + ["failed", "done"]
    assert [r.number for r in study.results.records][:4] == [3, 2, 1, 0]  # as they ended
    assert [line.split(",")[0] for line in study.results.to_csv().splitlines()[1:]] == list("012345")


def test_what_is_in_flight_at_the_end_is_interrupted_and_may_come_again(
    study, tmp_path, space, objectives, constraints
):
    with pytest.raises(RuntimeError, match="the cluster is gone"), Session(study, Budget(trials=9)) as session:
        _, second, _ = session.next(3)
        session.done(second, outcome(second))
        raise RuntimeError("the cluster is gone")
    assert study.results.counts == {"done": 1, "interrupted": 2}
    study.close()
    with SearchStudy(tmp_path / "j", space, objectives, constraints) as again:
        assert again.results.counts == {"done": 1, "interrupted": 2}
        carry_out(LocalEngine(), again, FromFunction(analytic), Budget(trials=9))
        assert again.results.counts["done"] == 9


def test_a_killed_process_leaves_what_was_in_flight_running_and_a_resume_marks_it(study, tmp_path, space, objectives):
    Session(study, Budget(trials=9)).next(3)
    study.sync()  # and there the process ends
    with SearchStudy(tmp_path / "j", space, objectives) as again:
        assert again.results.counts == {"interrupted": 3}


def test_the_last_architectures_of_a_space_are_waited_for(tmp_path, tiny, objectives):
    with SearchStudy(tmp_path / "tiny", tiny, objectives) as study, Session(study, Budget(trials=1000)) as session:
        proposals = session.next(1000)
        assert len(proposals) == tiny.size()
        assert session.next(1) == [] and not session.over  # one of them may still be interrupted
        for proposal in proposals:
            session.done(proposal, outcome(proposal))
        assert session.next(1) == [] and session.ending().reason == "exhausted"


def test_weights_are_kept_before_the_trial_counts(study):
    kept = []

    def keep(proposal, outcome):
        assert study.results.evaluated == proposal.number
        kept.append((proposal.number, outcome.network))

    with Session(study, Budget(trials=3), keep=keep) as session:
        for number, network in enumerate(["a network", None, "another"]):
            (proposal,) = session.next()
            session.done(proposal, Outcome(analytic(proposal.architecture), network=network))
            assert proposal.number == number
    assert kept == [(0, "a network"), (2, "another")]


def test_progress_is_told(study, evaluator):
    told = []

    def report(done, total, **info):
        told.append((done, info))

    carry_out(LocalEngine(), study, evaluator, Budget(trials=12), report=report)
    assert [done for done, _ in told] == list(range(13))
    assert told[0][1] == {"failed": 0, "hypervolume": None} and told[-1][1]["hypervolume"] > 0


def test_trials_are_reported_in_order(study, evaluator):
    reported = []
    budget = Budget(trials=30)
    carry_out(LocalEngine(), study, evaluator, budget, on_trial=lambda record: reported.append(record.number))
    assert reported == [r.number for r in study.results.records if r.evaluated]


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_interrupt_finishes_the_trial(study, evaluator):
    def interrupted(architecture):
        if study.results.evaluated == 3:
            interrupt()
        return analytic(architecture)

    with StopSignal() as stop, pytest.raises(StoppedEarly, match="stopped after 4 of 50 trials") as error:
        carry_out(LocalEngine(), study, FromFunction(interrupted), Budget(trials=50), stop=stop)
    assert error.value.exit_status == 4
    assert study.results.counts == {"done": 4}
    carry_out(LocalEngine(), study, evaluator, Budget(trials=6))
    assert study.results.counts == {"done": 6}


def test_the_second_interrupt_aborts_it(study, objectives, constraints, tmp_path):
    def interrupted(architecture):
        if study.results.evaluated == 3:
            interrupt()
            interrupt()
            raise AssertionError("not reached")
        return analytic(architecture)

    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        carry_out(LocalEngine(), study, FromFunction(interrupted), Budget(trials=50), stop=stop)
    assert signal.getsignal(signal.SIGINT) is before
    assert [r.status for r in study.results.records] == ["done"] * 3 + ["interrupted"]
    study.close()
    assert read_results(tmp_path / "j", objectives, constraints).counts == {"done": 3, "interrupted": 1}


def test_a_shield_holds_an_abort_back():
    heard = []
    with StopSignal(on_request=lambda: heard.append(1)) as stop:
        with pytest.raises(KeyboardInterrupt), stop.shield():
            interrupt()
            interrupt()
            heard.append(2)
        assert stop.requested and stop() and heard == [1, 2]
