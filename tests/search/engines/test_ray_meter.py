"""Latency that is measured on a node of the cluster, which does nothing else meanwhile."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import mixnas
from mixnas.evaluators.answering import code_version
from mixnas.predictors.latency import source
from mixnas.predictors.latency.source import LatencySpec
from mixnas.predictors.measuring.device import device_name
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search.engines.on_ray import cluster as on_ray
from mixnas.search.engines.on_ray.meter import Meter, MeteredLatency, Wanted, give_back
from mixnas.search.engines.ray import RayEngine
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.files import dump_yaml
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec
from tests.search.problems import TINY

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
    pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc"),
    pytest.mark.filterwarnings("default"),  # Ray's own
]
SPACE = {
    "stem": "conv",
    "stages": [{"width": [4, 8], "block": {"mixer": ["identity", "pooling"], "channel_mixer": "mlp"}}],
}
IO = IOSpec("image", (8, 8), 1, 10)
HERE = device_name("cpu", 1)


def spec(device=HERE, **more):
    plain = dict(runtime="eager", threads=1, batch_size=1, directory=None, profile_s=1.0, passes=1, seed=0)
    return LatencySpec(device=device, **{**plain, **more})


@pytest.fixture(scope="module")
def address():
    """A head, a node of one core that is measured, and one of one core that is not.

    A device that a test holds is held by the next one too: taking it starts two processes. Who needs it free says so.
    """
    folder = Path("/tmp") / f"meter{time.monotonic_ns() % 10**8}"  # short: sockets lie in it
    (folder / "ray").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch, on_ray.settings(own=True):
        patch.setenv("RAY_TMPDIR", str(folder))
        from ray.cluster_utils import Cluster

        options = {"object_store_memory": 80 << 20}
        head = {**options, "include_dashboard": False, "temp_dir": str(folder / "ray"), "num_cpus": 0}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(num_cpus=1, resources={"latency_device": 1}, **options)
            cluster.add_node(num_cpus=1, **options)
            yield cluster.address
        finally:
            give_back()
            cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def network():
    architecture = SearchSpace.from_dict(SPACE).sample(np.random.default_rng(0))
    return Network(architecture, IO, generator=torch.Generator().manual_seed(0)).eval()


def test_a_network_is_measured_on_the_node_which_is_held_for_that_alone(address, monkeypatch):
    def nothing(*args, **options):
        raise AssertionError("measured here")

    monkeypatch.setattr(source, "measure_networks", nothing)
    latency = MeteredLatency(spec(), address)
    latency.check(SearchSpace.from_dict(SPACE))
    reference = latency.reference_ms
    first, second = latency.measure([network(), network()])
    assert reference > 0 and latency.spec.reference_ms == reference
    assert first.kind == second.kind == "measured" and 0 < first.low_ms <= first.ms <= first.high_ms
    where, name, itself = latency._meter.call("which", spec())
    assert itself and name == HERE and where.pid != os.getpid()
    with on_ray.Cluster(address):
        import ray

        free = ray.available_resources()
    assert free.get("CPU") == 1 and not free.get("latency_device")  # that of the other node


def test_a_search_goes_by_what_is_measured_there(address, tmp_path, monkeypatch):
    def nothing(*args, **options):
        raise AssertionError("measured here")

    monkeypatch.setattr(source, "measure_networks", nothing)
    config = {
        "task": "digits",
        "device": HERE,
        "search": {
            "trials": 3,
            "evaluator": "standalone",
            "engine": {"name": "ray", "address": address, "workers": 1, "measure": True},
        },
        "train": {"steps": 3},
        "latency": {"passes": 1, "final_passes": 1},
        "space": SPACE,
    }
    run = mixnas.search(config, name="there", runs=tmp_path, progress="quiet")
    front = run.front()
    assert front.latency == "measured" and front.device == HERE and front.trials["done"] == 3
    assert all(member.metrics["latency_ms"] > 0 for member in front.members)
    assert run.manifest["reference_ms"] > 0


def test_one_measurement_at_a_time_whoever_asks(address):
    MeteredLatency(spec(), address).check(SearchSpace.from_dict(SPACE))  # holds it, if a test before does not
    wanted, got = Wanted(address=address, spec=spec(), extensions=(), code=code_version()), threading.Event()

    def another():
        Meter(wanted).end()
        got.set()

    waits = threading.Thread(target=another)
    waits.start()
    assert not got.wait(5.0)
    give_back()
    waits.join(120)
    assert got.is_set()


@pytest.mark.slow
def test_a_node_is_profiled_and_then_asked_about_here(address, tmp_path):
    space = SearchSpace.from_dict(TINY)
    latency = MeteredLatency(spec(directory=tmp_path, profile_s=3.0), address)
    latency.prepare(space, IO)
    architecture = space.sample(np.random.default_rng(0))
    predicted = latency.predict(architecture, IO)
    assert predicted.kind == "predicted" and predicted.ms > 0
    assert latency.reference_ms == MeasurementTable.load(tmp_path, HERE, "eager").reference_ms
    give_back()
    again = spec(directory=tmp_path).open()
    again.adopt()  # by the files alone
    assert again.predict(architecture, IO) == predicted


def test_devices_are_named_and_others_refused(address):
    give_back()
    with pytest.raises(ConfigError, match=f"no node .* that has latency_device is it. There are: {HERE}"):
        MeteredLatency(spec("nvidia-h200"), address).check(SearchSpace.from_dict(SPACE))
    with pytest.raises(ConfigError, match="Give its name"):
        MeteredLatency(spec("auto"), address)
    with pytest.raises(ConfigError, match="for a cluster that runs already"):
        RayEngine(measure=True)


@pytest.mark.slow
def test_the_command_profiles_a_node_and_keeps_what_it_found_here(address, tmp_path, capsys):
    """`nas latency profile --address`, to its end, and then what its own file answers."""
    from mixnas.cli.main import main

    give_back()
    config, tables = tmp_path / "c.yaml", tmp_path / "tables"
    config.write_text(dump_yaml({"task": "digits", "space": TINY}))
    command = ["latency", "profile", "-c", str(config), "--device", HERE, "--address", address, "--quiet", "--json"]
    assert main([*command, "--budget", "4s", "--tables", str(tables)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device"] == HERE and told["runtime"] == "eager" and told["accuracy"]
    table = MeasurementTable.load(tables, HERE, "eager")
    assert table.reference_ms > 0
    asked = [
        "latency",
        "query",
        "-c",
        str(config),
        "--device",
        HERE,
        "--sample",
        "2",
        "--tables",
        str(tables),
        "--json",
    ]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 2 and all(one["latency_ms"] > 0 for one in found)
    assert main([*command[:5], "nvidia-h200", *command[6:], "--budget", "4s", "--tables", str(tables)]) == 2
    assert "no node" in capsys.readouterr().err
