"""Three nodes with networks of their own: one is cut off in the middle of a search and comes back."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixnas.search.engines.on_ray import _head
from mixnas.search.engines.on_ray import cluster as on_ray
from mixnas.search.engines.ray import RayEngine
from mixnas.search.engines.session import Budget
from mixnas.search.run.stopping import StopSignal
from mixnas.search_space.errors import NasError, StoppedEarly
from tests.contracts.engine import carry_out, study_at
from tests.search.engines.test_ray_nodes import HEALTH
from tests.search.engines.troubles import Troubled


def ip(*words: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=check).returncode == 0


def may_make_networks() -> bool:
    if not shutil.which("ip") or os.geteuid():
        return False
    name = f"nas-{os.getpid()}"
    made = ip("netns", "add", name, check=False) and ip("link", "add", f"b{os.getpid()}", "type", "bridge", check=False)
    ip("link", "del", f"b{os.getpid()}", check=False)
    ip("netns", "del", name, check=False)
    return made


pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
    pytest.mark.skipif(not may_make_networks(), reason="needs the right to make network namespaces"),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


class Nodes:
    """A head on a bridge, and nodes that hang on it, each in a network namespace and a session of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tag, self.sessions = folder, f"{os.getpid() % 100_000}", []
        self.net = f"10.213.{os.getpid() % 250}"
        self.environment = {**os.environ, **HEALTH, **on_ray.environment(own=True)}
        del self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # which would put all on the loopback
        self.environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.address = f"{self.net}.1:6379"

    def __enter__(self) -> Nodes:
        ip("link", "add", f"nasb{self.tag}", "type", "bridge")
        ip("addr", "add", f"{self.net}.1/24", "dev", f"nasb{self.tag}")
        ip("link", "set", f"nasb{self.tag}", "up")
        self._ray([], 1, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
        self.wait_for(lambda: answers(self.address))
        return self

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < until, [(self.folder / f"log{i}").read_text() for i in range(len(self.sessions))]
            time.sleep(0.5)

    def joined(self) -> bool:
        """Whether two nodes that work are there, as another process sees it, which looks for a while."""
        code = "import sys, time, ray; ray.init(sys.argv[1]); until = time.monotonic() + 30\n"
        code += "def cpus(): return ray.cluster_resources().get('CPU', 0)\n"
        code += "while cpus() < 2 and time.monotonic() < until: time.sleep(0.2)\n"
        code += "print('CPUs', cpus())"
        command = [sys.executable, "-P", "-c", code, self.address]
        said = subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout
        return "CPUs 2" in said

    def plug(self, number: int) -> None:
        """A namespace on the bridge."""
        name, here, there = f"nas{self.tag}-{number}", self.cable(number), f"nasw{self.tag}"
        ip("netns", "add", name)
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        ip("link", "set", here, "master", f"nasb{self.tag}", "up")
        ip("-n", name, "addr", "add", f"{self.net}.{number}/24", "dev", there)
        for device in ("lo", there):
            ip("-n", name, "link", "set", device, "up")

    def cable(self, number: int) -> str:
        return f"nv{self.tag}-{number}"

    def start(self, number: int) -> None:
        """A node there that does one trial at a time."""
        within = ["ip", "netns", "exec", f"nas{self.tag}-{number}"]
        self._ray(within, number, f"--address={self.address}", "--num-cpus=1")

    def _ray(self, within: list[str], number: int, *words: str) -> None:
        temporary = self.folder / f"{number}-{len(self.sessions)}"
        code = [sys.executable, "-P", "-c", "from ray.scripts.scripts import main; main()", "start", "--block"]
        options = [f"--node-ip-address={self.net}.{number}", f"--temp-dir={temporary}"]
        options += [f"--object-store-memory={80 << 20}", "--disable-usage-stats"]
        with open(self.folder / f"log{len(self.sessions)}", "w") as log:
            process = subprocess.Popen(
                [*within, *code, *options, *words],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.sessions.append(process)

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """May be done twice: entering may fail half-way."""
        for process in reversed(self.sessions):
            _head.end_session(process.pid)
            process.wait()
        for number in (2, 3):
            ip("netns", "del", f"nas{self.tag}-{number}", check=False)
        ip("link", "del", f"nasb{self.tag}", check=False)


@pytest.fixture
def nodes(monkeypatch):
    folder = Path("/tmp") / f"ns{time.monotonic_ns() % 10**8}"  # short: sockets lie in it
    folder.mkdir()
    nodes = Nodes(folder)
    try:
        with nodes:
            for name in set(on_ray.environment(own=True)) | set(HEALTH):
                if name in nodes.environment:
                    monkeypatch.setenv(name, nodes.environment[name])
            for number in (2, 3):
                nodes.plug(number)
                nodes.start(number)
            yield nodes
    finally:
        nodes.end()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_node_is_cut_off_and_comes_back(nodes, tmp_path):
    evaluator = Troubled(tmp_path / "begun", seconds=0.4)
    engine = RayEngine(address=nodes.address, workers=2, through="loop")
    told: list[str] = []
    cut_at = before = None
    stop = StopSignal()

    def on_trial(record):
        nonlocal cut_at, before
        told.append(record.id)
        if cut_at is None and len(evaluator.pids) == 2:  # both nodes work
            ip("link", "set", nodes.cable(3), "down")
            cut_at = len(told)
        elif cut_at is not None and before is None and len(told) == cut_at + 20:
            before = evaluator.pids
            _head.end_session(nodes.sessions[-1].pid)
            ip("link", "set", nodes.cable(3), "up")
            nodes.start(3)
        elif before is not None and evaluator.pids - before:  # only the node that came back has room for another
            stop.request()

    nodes.wait_for(nodes.joined)
    with study_at(tmp_path / "j") as study:
        with pytest.raises(StoppedEarly, match="stopped after"):
            carry_out(engine, study, evaluator, Budget(trials=1000), on_trial=on_trial, stop=stop)
        records = study.results.records
    assert set(study.results.counts) == {"done"} and len({r.id for r in records}) == len(records)
    lost = {why for record in records for why in record.retries}
    assert lost == {"its machine was lost, or cannot be reached"}, lost


def answers(address: str) -> bool:
    with contextlib.suppress(NasError):
        on_ray.knock(address)
        return True
    return False
