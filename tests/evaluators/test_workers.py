"""Workers: what they finish is what this process would, and no fault of one is another's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mixnas.evaluators import workers as module
from mixnas.evaluators.protocol import Request
from mixnas.evaluators.workers import EVALUATE, Workers, WorkersEndedError, WorkersUnavailableError, finish_all
from mixnas.search_space.errors import MachineError, StoppedEarly
from mixnas.search_space.space import SearchSpace
from tests.evaluators.stubborn import StubbornSpec

SPACE = SearchSpace.from_dict(
    {
        "stem": {"name": "conv", "stride": 2},
        "stages": [{"width": [4, 8], "depth": [1, 2, 3], "block": {"mixer": "identity", "channel_mixer": "mlp"}}],
    }
)
FOUR = [Request(SPACE.decode([i % 2, i % 3])) for i in range(4)]


def spec(folder, faults=(), **more):
    return StubbornSpec(folder, {FOUR[i].architecture.id: fault for i, fault in dict(faults).items()}, **more)


def begun(folder, i):
    path = folder / FOUR[i].architecture.id
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2] if Path("/proc").exists() else False


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def at_once(monkeypatch, two_threads):
    """Workers from the second candidate on, however quick they are."""
    monkeypatch.setattr(module, "_WORTH_SECONDS", -1.0)


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_candidates_end_the_same_wherever_they_are_finished(tmp_path, at_once, monkeypatch):
    evaluator = spec(tmp_path).open()
    said = []
    elsewhere = dict(finish_all(evaluator, FOUR, 4, lambda done, total: said.append((done, total))))
    assert sorted(elsewhere) == [0, 1, 2, 3]
    shares = [done for done, _ in said]
    assert said[-1] == (4, 4) and shares == sorted(shares)
    pids = [begun(tmp_path, i)[0] for i in range(4)]
    assert pids[0] == os.getpid() and os.getpid() not in pids[1:] and all(map(gone, pids[1:]))
    monkeypatch.setattr(module, "_WORTH_SECONDS", float("inf"))
    here = dict(finish_all(evaluator, FOUR, 4))
    for i in range(4):
        assert begun(tmp_path, i)[1] == os.getpid()
        first, second = weights(here[i].network), weights(elsewhere[i].network)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_one_that_diverges_or_kills_its_process_is_its_own_failure(tmp_path, at_once):
    evaluator = spec(tmp_path, {1: "diverge", 2: "die", 3: "die once"}).open()
    found = dict(finish_all(evaluator, FOUR, 4))
    assert found[0].network is not None and found[3].network is not None
    assert found[1].failure == "DivergedError: the loss is nan" and found[1].network is None
    assert found[2].failure == "the process that did it ended by signal 6, 3 times"
    assert [len(begun(tmp_path, i)) for i in range(4)] == [1, 1, 3, 2]


def test_a_full_disk_is_no_failure_of_a_candidate(tmp_path, at_once):
    evaluator = spec(tmp_path, {2: "full"}).open()
    with pytest.raises(MachineError, match="No space left on device"):
        list(finish_all(evaluator, FOUR, 4))
    assert len(begun(tmp_path, 2)) == 1


def test_what_the_system_kills_for_want_of_memory_is_no_failure_of_a_candidate(tmp_path, at_once):
    evaluator = spec(tmp_path, {2: "killed"}).open()
    with pytest.raises(MachineError, match=r"was killed from outside \(signal 9\) 3 times.* Free some"):
        list(finish_all(evaluator, FOUR, 4))
    assert len(begun(tmp_path, 2)) == 3


def test_what_only_this_process_knows_is_finished_here(tmp_path, at_once):
    evaluator = spec(tmp_path, home=os.getpid()).open()
    found = dict(finish_all(evaluator, FOUR, 4))
    assert all(outcome.network is not None for outcome in found.values())
    assert {pid for i in range(4) for pid in begun(tmp_path, i)} == {os.getpid()}
    with (
        Workers(evaluator.spec, 2) as workers,
        pytest.raises(WorkersUnavailableError, match="LookupError: only at home"),
    ):
        workers.open()


def test_a_spec_that_cannot_be_sent_is_finished_here(tmp_path, at_once):
    evaluator = spec(tmp_path).open()
    evaluator.spec = lambda: None  # of this function: pickle finds no name for it
    assert all(outcome.network is not None for _, outcome in finish_all(evaluator, FOUR, 4))


def test_a_stop_leaves_no_process(tmp_path, at_once):
    evaluator = spec(tmp_path, {2: "hang"}).open()
    with pytest.raises(StoppedEarly, match=r"stopped after \d of 4"):
        list(finish_all(evaluator, FOUR, 4, should_stop=lambda: bool(begun(tmp_path, 2))))
    assert all(gone(pid) for pid in begun(tmp_path, 2))


def test_the_threads_are_those_of_all_candidates_not_of_those_left(tmp_path, two_threads):
    assert module.share_of_threads(1) == (1, 2)
    assert module.share_of_threads(2) == (2, 1) == module.share_of_threads(24)
    seen = []
    evaluator = spec(tmp_path).open()
    evaluator._suffer = lambda architecture: seen.append(torch.get_num_threads())
    list(finish_all(evaluator, FOUR[3:], 4))
    list(finish_all(evaluator, FOUR[:1], 1))
    assert seen == [1, 2] and torch.get_num_threads() == 2


def test_evaluating_in_workers(tmp_path):
    with Workers(spec(tmp_path).open().spec, 2) as workers:
        workers.open()
        assert workers.free == 2
        for i, request in enumerate(FOUR):
            workers.submit(i, EVALUATE, request)
        assert workers.free == 0 and workers.busy == 4
        found = {}
        while workers.busy:
            found |= dict(workers.answers())
    assert sorted(found) == [0, 1, 2, 3]
    assert {outcome.metrics["threads"] for outcome in found.values()} == {1.0}
    assert all(gone(int(outcome.metrics["pid"])) for outcome in found.values())


def test_a_worker_that_is_told_nothing_more_ends_without_a_word(tmp_path, capfd):
    with Workers(spec(tmp_path).open().spec, 1) as workers:
        workers.open()
        workers._workers[0].connection.close()
        assert workers._workers[0].process.wait(60) == 0
    assert capfd.readouterr().err == ""


def killed_at_start(monkeypatch, times):
    """Have so many workers killed while they start; returns all that were started."""
    started, start = [], Workers._start

    def start_and_kill(self):
        worker = start(self)
        started.append(worker)
        if len(started) <= times:
            worker.process.kill()
        return worker

    monkeypatch.setattr(Workers, "_start", start_and_kill)
    return started


def test_a_worker_that_is_killed_while_it_starts_is_replaced(tmp_path, monkeypatch):
    started = killed_at_start(monkeypatch, times=2)
    with Workers(spec(tmp_path).open().spec, 1) as workers:
        workers.open()
        assert workers.free == 1 and len(started) == 3
        workers.submit(0, EVALUATE, FOUR[0])
        while not (found := dict(workers.answers())):
            pass
        assert not found[0].failure


def test_workers_that_are_all_killed_while_they_start_are_not_replaced_for_ever(tmp_path, monkeypatch):
    started = killed_at_start(monkeypatch, times=99)
    reason = r"3 workers in a row ended while they were starting, the last by signal 9\. .* when memory ends: free some"
    with Workers(spec(tmp_path).open().spec, 1) as workers, pytest.raises(WorkersEndedError, match=reason):
        workers.open()
    assert len(started) == 3 and all(gone(worker.process.pid) for worker in started)


def test_a_worker_that_ends_by_itself_while_it_starts_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BEGIN", "raise SystemExit(7)")
    with Workers(spec(tmp_path).open().spec, 1) as workers, pytest.raises(WorkersEndedError, match="with status 7"):
        workers.open()


_CALLER = """
import sys
from pathlib import Path
from mixnas.evaluators.workers import FINISH, Workers
from tests.evaluators.test_workers import FOUR, spec
# No `if __name__ == "__main__"`: a worker that imported this script would start workers of its own.
with Workers(spec(Path(sys.argv[1]), {0: "hang"}), 1) as workers:
    workers.open()
    workers.submit(0, FINISH, FOUR[0])
    while True:
        list(workers.answers(1.0))
"""


_PAUSER = """
import sys, time
from pathlib import Path
from mixnas.evaluators.workers import Workers
from tests.evaluators.test_workers import spec
with Workers(spec(Path(sys.argv[1])).open().spec, 2) as workers:
    workers.open()
    with workers.paused():
        print(*(worker.process.pid for worker in workers._workers), flush=True)
        time.sleep(600)
"""


def caller(folder, source, **more):
    script = folder / "caller.py"
    script.write_text(source)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])}
    return subprocess.Popen([sys.executable, str(script), str(folder)], env=environment, **more)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent ended")
def test_workers_that_stand_still_end_with_a_caller_that_is_killed(tmp_path):
    process = caller(tmp_path, _PAUSER, stdout=subprocess.PIPE, text=True)
    pids = []
    try:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and not any(map(gone, pids))
        process.send_signal(signal.SIGKILL)
        until = time.monotonic() + 30
        while not all(map(gone, pids)):
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
        for pid in pids:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent ended")
def test_a_worker_whose_caller_ended_before_it_began_ends():
    def status(caller):
        begin, _, _ = module._BEGIN.format(caller=caller, descriptor=0).partition("from mixnas")
        return subprocess.run([sys.executable, "-c", begin], timeout=60).returncode

    assert status(os.getpid()) == 0 and status(os.getpid() + 1) == 1


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_workers_end_with_a_caller_that_is_killed(tmp_path):
    process = caller(tmp_path, _CALLER)
    try:
        until = time.monotonic() + 300
        while not begun(tmp_path, 0):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        (worker,) = begun(tmp_path, 0)
        process.send_signal(signal.SIGKILL)
        while not gone(worker):
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
