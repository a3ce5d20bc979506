"""The engine on Ray, with real workers and real kills."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mixnas.evaluators import answering
from mixnas.evaluators.protocol import Request
from mixnas.evaluators.supernet.evaluator import SupernetEvaluator, SupernetSpec
from mixnas.evaluators.supernet.training import SupernetConfig
from mixnas.evaluators.training import TrainConfig
from mixnas.predictors.measuring.measure import fixed_threads
from mixnas.search.engines.on_ray import _head, cluster
from mixnas.search.engines.on_ray.cluster import LOOPBACK, Cluster, Head, Share, listening
from mixnas.search.engines.ray import RayEngine
from mixnas.search.engines.session import Budget
from mixnas.search.study.reading import read_results
from mixnas.search_space.errors import ConfigError, MachineError, NasError
from mixnas.search_space.space import SearchSpace
from tests.contracts.engine import CONSTRAINTS, OBJECTIVES, EngineContract, carry_out, study_at
from tests.search.engines.troubles import Measured, Troubled, end, hang, kind_of, stand_still

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc"),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


@pytest.fixture(scope="module")
def head():
    """One Ray for all tests that may share it; it is reached as a cluster that runs already."""
    with cluster.settings(own=True), Head(workers=2, store_mb=80) as head:
        yield head


@pytest.fixture
def engine(head):
    return RayEngine(address=head.address, workers=2, through="loop")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition, seconds=300.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


class TestOwnLoop(EngineContract):
    pass


# -- faults, through the loop ------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_replaced_and_its_trial_tried_again(engine, tmp_path):
    evaluator = Troubled(tmp_path / "begun", {3: end, 11: end}, seconds=0.3)
    with study_at(tmp_path / "j") as study:
        carry_out(engine, study, evaluator, Budget(trials=14))
        records = study.results.records
    assert study.results.counts["done"] == 14 and len({r.id for r in records}) == 14
    retries = [reason for r in records for reason in r.retries]  # a busy machine may lose a worker more
    assert len(retries) >= 2 and set(retries) == {"the process that did it ended"}
    assert len(evaluator.begun) >= 16 and len(evaluator.pids) >= 3
    kept = read_results(tmp_path / "j", OBJECTIVES, CONSTRAINTS).records
    assert {r.number: r.retries for r in kept} == {r.number: r.retries for r in records}


def test_an_architecture_that_ends_its_workers_has_failed_and_takes_nobody_along(engine, tmp_path):
    """Quick ones, so that they go in batches."""
    evaluator = Troubled(tmp_path / "begun", deadly=True, odd=True)
    with study_at(tmp_path / "j") as study:
        carry_out(engine, study, evaluator, Budget(trials=40))
        records = [r for r in study.results.records if r.evaluated]
    assert len(records) == 40 and len({r.id for r in records}) == 40
    deadly = [r for r in records if kind_of(r) == 0]
    assert deadly and {r.failure for r in deadly} == {"the process that did it ended, 2 times"}
    assert {r.failure for r in records if kind_of(r) == 3} == {"metric accuracy is nan"}
    assert all(r.status == "done" for r in records if kind_of(r) not in (0, 3))
    assert max(len(r.retries) for r in records) <= 3


@pytest.mark.parametrize("trouble", [hang, stand_still])
def test_a_hung_trial_ends_at_its_limit(head, tmp_path, trouble):
    engine = RayEngine(address=head.address, workers=2, through="loop", limit=2.0)
    evaluator = Troubled(tmp_path / "begun", {5: trouble}, seconds=0.3)
    with study_at(tmp_path / "j") as study:
        carry_out(engine, study, evaluator, Budget(trials=10))
        (failed,) = [r for r in study.results.records if r.status == "failed"]
    assert failed.failure == "took longer than the limit of 2 s" and failed.seconds >= 2 and not failed.retries
    assert study.results.counts["done"] == 9
    wait_for(lambda: all(map(gone, evaluator.pids)))


def test_out_of_memory_is_tried_again_with_half_a_batch(engine, tmp_path):
    evaluator = Troubled(tmp_path / "begun", large=True)
    with study_at(tmp_path / "j") as study:
        carry_out(engine, study, evaluator, Budget(trials=20))
        records = study.results.records
    said = "out of memory: tried to allocate 20 GiB"
    by_kind = {kind: [r for r in records if kind_of(r) == kind] for kind in range(5)}
    assert by_kind[1] and {(r.status, len(r.retries)) for r in by_kind[1]} == {("done", 1)}
    assert by_kind[2] and {(r.failure, len(r.retries)) for r in by_kind[2]} == {(said, 1)}
    assert {r.retries[0] for kind in (1, 2) for r in by_kind[kind]} == {f"{said}; now with half a batch at a time"}
    assert all(r.status == "done" and not r.retries for kind in (0, 3, 4) for r in by_kind[kind])


def test_a_worker_with_other_code_is_refused(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "code_version", lambda: "mixnas 9.9 (code of tomorrow)")
    with study_at(tmp_path / "j") as study, pytest.raises(NasError) as refused:
        carry_out(engine, study, Troubled(tmp_path / "begun"), Budget(trials=3))
    monkeypatch.undo()
    assert answering.code_version() in str(refused.value) and "9.9 (code of tomorrow)" in str(refused.value)
    assert not (tmp_path / "begun").read_text() and not study.results.records


def test_what_cannot_be_is_said(head, tmp_path):
    with pytest.raises(ConfigError, match="a worker has to take something"):
        RayEngine(cpus=0)
    wants = RayEngine(address=head.address, resources={"accelerator": 1.0})
    nobody = RayEngine(address="127.0.0.1:1", workers=1)
    for engine, says in ((wants, "no worker fits into the cluster"), (nobody, "no Ray cluster answers at 127.0.0.1:1")):
        with study_at(tmp_path / "j") as study, pytest.raises(NasError, match=says):
            carry_out(engine, study, Troubled(tmp_path / "begun"), Budget(trials=3))


# -- Ray Tune ----------------------------------------------------------------------------------------------------------


def test_tune_carries_out_each_trial_once_whatever_befalls_it(head, tmp_path):
    engine = RayEngine(address=head.address, workers=2, through="tune", limit=6.0)
    evaluator = Troubled(tmp_path / "begun", {4: end, 9: hang}, deadly=True, large=True, odd=True)
    with study_at(tmp_path / "j") as study:
        carry_out(engine, study, evaluator, Budget(trials=16))
        records = [r for r in study.results.records if r.evaluated]
    assert len(records) == 16 == len({r.id for r in records})
    late = [r for r in records if r.failure == "took longer than the limit of 6 s"]
    assert len(late) == 1
    killed = [r for r in records if "the process that did it ended" in r.retries]
    assert killed and all(r.failure.endswith("2 times") == (kind_of(r) == 0) for r in killed)
    for record in (r for r in records if r not in late):
        kind = kind_of(record)
        assert (record.status == "failed") == (kind in (0, 2, 3)), record
    assert study.results.counts["running"] == 0


@pytest.mark.parametrize(("seconds", "chosen"), [(None, "auto"), (0.1, "loop"), (2.9, "loop"), (3.1, "tune")])
def test_what_carries_trials_out_is_chosen_by_how_long_they_take(tmp_path, seconds, chosen):
    here, anywhere = Measured(tmp_path / "running"), Troubled(tmp_path / "begun")

    def choice(evaluator, **options):
        work = RayEngine(**options)._work(evaluator, b"", None)
        return work.chosen(seconds)

    assert choice(anywhere) == chosen == choice(here) == choice(anywhere, address="a:1")
    if seconds is not None:
        assert choice(here, address="a:1") == "loop"  # it could not be halted
    assert choice(anywhere, through="loop") == "loop"
    tune = RayEngine(address="a:1", through="tune")
    with study_at(tmp_path / "k") as study, pytest.raises(ConfigError, match="Use through: loop"):
        carry_out(tune, study, here, Budget(trials=3))


# -- what workers share ------------------------------------------------------------------------------------------------

BLOCK = {
    "mixer": ["identity", "pooling", {"name": "dwconv", "kernel_size": [3, 5]}],
    "channel_mixer": "mlp",
    "quant": ["fp32", "w8a8", "w8a8_static"],
}
SHARED = {"stem": "conv", "norm": ["batch", "layer"], "stages": [{"width": [8, 16], "depth": [1, 2], "block": BLOCK}]}


def test_weights_are_shared_judged_with_and_never_written_to(head):
    supernet = SupernetConfig(steps=3, probe=64)
    spec = SupernetSpec(task="digits", space=SHARED, supernet=supernet, final=TrainConfig(steps=1))
    evaluator = SupernetEvaluator(spec)
    evaluator.prepare()
    space, rng = SearchSpace.from_dict(SHARED), np.random.default_rng(0)
    requests = [Request(space.sample(rng)) for _ in range(8)]

    def digest(spec):
        found = hashlib.sha256()
        for name in sorted(spec.weights):
            found.update(spec.weights[name].tobytes())
        return found.hexdigest()

    with Cluster(head.address, Share(), 2):
        import ray

        ref = ray.put(evaluator.elsewhere())
        before = digest(ray.get(ref))
        workers = [ray.remote(answering.Answerer).remote() for _ in range(2)]
        assert ray.get([worker.open.remote(ref) for worker in workers]) == ["", ""]
        for found in ray.get([worker.answer.remote(requests) for worker in workers]):
            for elsewhere, here in zip(found, evaluator.evaluate(requests), strict=True):
                assert elsewhere.metrics == here.metrics and not elsewhere.failure
        shared = ray.get(ref)
        assert not any(array.flags.owndata or array.flags.writeable for array in shared.weights.values() if array.ndim)
        assert digest(shared) == before
        del shared


# -- a search that starts Ray itself -----------------------------------------------------------------------------------


class Search:
    """One in a process of its own, with the session of the Ray that it starts."""

    def __init__(self, folder: Path, trials: int, seconds: float, temporary: Path) -> None:
        self.journal, self.begun, self.temporary = folder / "j", folder / "begun", temporary
        options = [str(self.journal), str(self.begun), str(trials), str(seconds)]
        command = [sys.executable, "-m", "tests.search.engines.ray_process", *options]
        environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        for name in cluster.environment(own=True):
            environment.pop(name, None)
        root = Path(__file__).parents[3]
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=root,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run_until(self, count: int) -> None:
        """Until so many evaluations were begun."""
        wait_for(lambda: self.process.poll() is not None or self._count() >= count)
        assert self.process.poll() is None, self.process.stderr.read()
        self.head = self._child(self.process.pid, "_head.py")

    def _count(self) -> int:
        return len(self.begun.read_text().splitlines()) if self.begun.exists() else 0

    def _child(self, parent: int, of: str) -> int:
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                mother = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if mother == parent and of in (entry / "cmdline").read_text():
                    return int(entry.name)
        raise AssertionError(f"no child of {parent} is {of}")

    def everybody(self) -> list[int]:
        return [self.head, *_head.processes_of(self.head)]

    def wait(self) -> int:
        """Its status; nothing of it is left."""
        status = self.process.wait(300)
        wait_for(lambda: not _head.processes_of(self.head) and gone(self.head))
        wait_for(lambda: not _head.processes_of(self.process.pid))
        assert not list(self.temporary.iterdir()), "temporary files are left"
        assert not list(self.journal.parent.glob(".ray-spill*")), "what Ray spills is left"
        self.process.stderr.close()
        return status

    def counts(self):
        return read_results(self.journal, OBJECTIVES, CONSTRAINTS).counts


@pytest.fixture
def short():
    """A short temporary folder: sockets lie in it."""
    folder = Path("/tmp") / f"nas{os.getpid()}-{time.monotonic_ns() % 10**6}"
    folder.mkdir()
    yield folder
    folder.rmdir()


def test_only_the_loopback_is_listened_on_and_a_killed_driver_leaves_nothing(tmp_path, short):
    search = Search(tmp_path, 1000, 0.3, short)
    search.run_until(8)
    everybody = [search.process.pid, *_head.processes_of(search.process.pid), *search.everybody()]
    assert len(everybody) > 8  # Ray's own, and the workers
    found = listening(everybody)
    assert found and found <= LOOPBACK, found
    assert len(list(short.iterdir())) == 1
    search.process.kill()
    assert search.wait() == -signal.SIGKILL
    before = search.counts()
    assert before["done"] >= 3

    # a resume is a new engine on the same journal: here another one
    from mixnas.search.engines.local import LocalEngine

    evaluator = Troubled(tmp_path / "again")
    with study_at(search.journal) as study:
        carry_out(LocalEngine(), study, evaluator, Budget(trials=before["done"] + 20))
        done = [r.id for r in study.results.records if r.status == "done"]
    assert len(done) == len(set(done)) == before["done"] + 20 and len(evaluator.begun) == 20
    assert study.results.counts["running"] == 0 and study.results.counts["interrupted"] <= 4


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_and_twice(tmp_path, short, times):
    search = Search(tmp_path, 1000, 0.3 if times == 1 else 60.0, short)
    search.run_until(2)
    os.kill(search.process.pid, signal.SIGINT)
    if times == 2:
        time.sleep(1)
        os.kill(search.process.pid, signal.SIGINT)
    assert search.wait() == (4 if times == 1 else 130)
    counts = search.counts()
    assert set(counts) <= ({"done"} if times == 1 else {"interrupted"}) and counts.total() >= 2


def test_when_the_head_is_killed_the_run_can_be_resumed(tmp_path, short):
    search = Search(tmp_path, 1000, 0.2, short)
    search.run_until(4)
    (gcs,) = [pid for pid in search.everybody() if program(pid) == "gcs_server"]
    os.kill(gcs, signal.SIGKILL)
    assert search.wait() == 4
    counts = search.counts()
    assert counts["running"] == 0 and counts["done"] >= 1


def test_when_its_raylet_is_killed_the_search_says_so_and_the_run_can_be_resumed(tmp_path, short):
    """Ray ends whoever is connected to it then, without a word."""
    search = Search(tmp_path, 1000, 0.2, short)
    search.run_until(4)
    (raylet,) = [pid for pid in search.everybody() if program(pid) == "raylet"]
    os.kill(raylet, signal.SIGKILL)
    assert search.process.wait(300) == 4
    said = search.process.stderr.read()
    assert search.wait() == 4
    assert said.startswith("Ray on this machine ended: raylet ended. ") and "Resume the run" in said
    counts = search.counts()
    assert counts["running"] == 0 and counts["done"] >= 1


def program(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode().rpartition("/")[2]


def test_when_ray_ends_the_process_that_is_connected_to_it_nothing_is_lost(head, tmp_path):
    """Of a cluster that was there: the search is told, marks what was in flight, and can go on."""
    evaluator = Troubled(tmp_path / "begun", seconds=0.1)
    engine = RayEngine(address=head.address, workers=2, through="loop")
    told = []

    def kill(record):
        told.append(record.number)
        if len(told) == 3:
            (child,) = [pid for pid in children() if b"on_ray.driver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            os.kill(child, signal.SIGKILL)

    with study_at(tmp_path / "j") as study:
        with pytest.raises(MachineError, match=r"ended \(signal 9\).*then resume the run"):
            carry_out(engine, study, evaluator, Budget(trials=1000), on_trial=kill)
        done = study.results.counts["done"]
        assert done >= len(told) >= 3 and study.results.counts["running"] == 0
        carry_out(engine, study, evaluator, Budget(trials=done + 4))
        assert study.results.counts["done"] == done + 4


def children():
    for task in Path("/proc/self/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


FILLS = """
import sys, time, numpy as np, ray
from mixnas.search.engines.on_ray.cluster import Cluster
with Cluster(sys.argv[1]):
    kept = []
    for count in (4, 100):  # of 30 MiB each, of which two fit into the memory
        while len(kept) < count:
            kept.append(ray.put(np.ones(30 << 20, np.uint8)))
        print(count, flush=True)
        sys.stdin.readline()
"""


def test_what_ray_spills_lies_where_it_is_told_and_is_bounded(tmp_path, short):
    spilled = tmp_path / "spilled"
    spilled.mkdir()
    with (
        cluster.settings(own=True),
        Head(workers=1, store_mb=80, folder=str(short), spill=str(spilled), disk_mb=150) as head,
        subprocess.Popen(  # not this process: Ray ends whoever is connected to it
            [sys.executable, "-P", "-c", FILLS, head.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        ) as filling,
    ):
        assert filling.stdout.readline() == "4\n"
        wait_for(lambda: _head._mib_in(str(spilled)) >= 30)
        head.check()
        filling.stdin.write("\n")
        filling.stdin.flush()
        with pytest.raises(MachineError, match=r"its files take \d+ MiB of the disk, and may take 150"):
            head.check(patience=300)
            raise AssertionError("it goes on")
        filling.kill()
    assert not list(spilled.iterdir()) and not list(short.iterdir())


def test_doctor_says_whether_ray_works():
    assert json.dumps(cluster.tried()).endswith('listens on the loopback only"')


# -- a cluster that runs already does more than trials -----------------------------------------------------------------


def test_a_cluster_finishes_what_a_search_ends_with(head):
    """Trained by its workers: the weights that this process would have given."""
    supernet = SupernetConfig(steps=3, probe=64)
    spec = SupernetSpec(task="digits", space=SHARED, supernet=supernet, final=TrainConfig(steps=2))
    evaluator = SupernetEvaluator(spec)
    evaluator.prepare()
    space, rng = SearchSpace.from_dict(SHARED), np.random.default_rng(0)
    requests = [Request(space.sample(rng)) for _ in range(3)]
    told = []
    engine = RayEngine(address=head.address, workers=2)
    found = dict(engine.finish(evaluator, requests, 4, lambda done, total: told.append((done, total))))
    assert sorted(found) == [0, 1, 2] and told == [(2, 4), (3, 4), (4, 4)]
    with fixed_threads(1):
        for i, request in enumerate(requests):
            expected = evaluator.finish(request.architecture).state_dict()
            assert not found[i].failure
            for name, tensor in found[i].network.state_dict().items():
                assert torch.equal(tensor, expected[name]), name


def test_a_cluster_trains_a_super_network_as_processes_of_this_machine_do(head):
    """The same weights to the bit."""
    weights = []
    for together in (None, RayEngine(address=head.address).together()):
        supernet = SupernetConfig(steps=4, probe=64, processes=2)
        spec = SupernetSpec(task="digits", space=SHARED, supernet=supernet, final=TrainConfig(steps=1))
        evaluator = SupernetEvaluator(spec, together=together)
        evaluator.prepare()
        weights.append(evaluator._prepared().supernet.state_dict())
    here, there = weights
    assert all(torch.equal(here[name], there[name]) for name in here)
    too_many = SupernetConfig(steps=4, probe=64, processes=8)
    spec = SupernetSpec(task="digits", space=SHARED, supernet=too_many, final=TrainConfig(steps=1))
    with pytest.raises(NasError, match=r"8, of which the cluster .* has room for 2 beside"):
        SupernetEvaluator(spec, together=RayEngine(address=head.address).together()).prepare()
