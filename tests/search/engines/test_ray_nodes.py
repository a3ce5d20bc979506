"""A cluster of several nodes, of which one is lost in the middle of a search and another joins."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path

import pytest

from mixnas.search.engines.on_ray import cluster as on_ray
from mixnas.search.engines.ray import RayEngine
from mixnas.search.engines.session import Budget
from tests.contracts.engine import carry_out, study_at
from tests.search.engines.troubles import Troubled

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
    pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc"),
    pytest.mark.filterwarnings("default"),  # Ray's own
]
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


@pytest.fixture
def nodes(monkeypatch, tmp_path_factory):
    """Ray's own utilities for several nodes on one machine: a head that evaluates nothing, and two that do."""
    folder = Path("/tmp") / f"nodes{time.monotonic_ns() % 10**8}"  # short: sockets lie in it
    (folder / "ray").mkdir(parents=True)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    for name, value in HEALTH.items():
        monkeypatch.setenv(name, value)
    with on_ray.settings(own=True):
        from ray.cluster_utils import Cluster

        options = {"object_store_memory": 80 << 20, "include_dashboard": False, "temp_dir": str(folder / "ray")}
        cluster = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 0})
        del options["temp_dir"], options["include_dashboard"]
        try:
            yield cluster, [cluster.add_node(num_cpus=1, **options) for _ in range(2)], options
        finally:
            cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_node_is_lost_and_another_joins(nodes, tmp_path):
    cluster, (first, _), options = nodes
    evaluator = Troubled(tmp_path / "begun", seconds=0.4)
    engine = RayEngine(address=cluster.address, workers=2, through="loop")
    reported = []

    def on_trial(record):
        reported.append(record)
        if len(reported) == 4:
            cluster.remove_node(first, allow_graceful=False)
        if len(reported) == 8:
            cluster.add_node(num_cpus=1, **options)

    with study_at(tmp_path / "j") as study:
        carry_out(engine, study, evaluator, Budget(trials=60), on_trial=on_trial)
        records = study.results.records
    assert study.results.counts["done"] == 60 == len({r.id for r in records})
    assert len(evaluator.pids) >= 3  # one of them on the node that joined; a busy machine may lose more
    lost = [why for record in records for why in record.retries]
    assert set(lost) == {"its machine was lost, or cannot be reached"}, lost
