"""`energy_mj` in a configuration: measured in the search and of the finalists, and refused where it cannot be."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest

from mixnas.predictors.measuring.energy import measure_energy
from mixnas.search.config import read_config
from mixnas.search.job import search
from mixnas.search.problem import Problem
from mixnas.search_space.errors import ConfigError, InfeasibleError

BLOCK = {"mixer": ["identity", "pooling"], "channel_mixer": {"name": "mlp", "expansion": [1, 2, 4]}}
PLAIN: dict[str, Any] = {
    "task": "digits",
    "objectives": {"accuracy": "max", "energy_mj": "min"},
    "search": {"trials": 4, "evaluator": "standalone", "strategy": "predictor"},
    "train": {"steps": 3},
    "latency": {"passes": 2, "final_passes": 2},
    "space": {"stem": "conv", "stages": [{"width": [4, 8, 16], "depth": [1, 2], "block": BLOCK}]},
}
WATTS = 20.0


@pytest.fixture
def counting(monkeypatch):
    """A machine that takes 20 watts whatever it does, by its counter; windows are short."""
    source = "mixnas.predictors.latency.source"
    monkeypatch.setattr(f"{source}.counter_of", lambda device: lambda: time.perf_counter() * WATTS * 1e3)
    monkeypatch.setattr(f"{source}.measure_energy", partial(measure_energy, window_s=0.02))


def test_a_search_goes_by_what_is_measured(counting, tmp_path):
    run = search({**PLAIN, "constraints": ["energy_mj <= 1e6"]}, runs=tmp_path, progress="quiet")
    front = run.front()
    assert front.members and front.objectives["energy_mj"] == "min"
    for member in front.members:
        assert member.metrics["energy_mj"] > 0 and member.metrics["energy_mj_se"] >= 0
        assert member.searched["energy_mj"] > 0
    assert "measure energy" in [phase["name"] for phase in run.manifest["phases"]]


def test_a_super_network_measures_it_while_latency_is_predicted(counting):
    plain = {**PLAIN, "search": {"trials": 4, "evaluator": "supernet"}}
    problem = Problem(read_config(plain, "c.yaml"))
    assert not problem.metrics["energy_mj"].cheap and problem.metrics["latency_ms"].cheap
    assert "energy_mj" not in problem.provisional  # weights do not change it
    assert problem.evaluator(problem.latency()).quiet  # type: ignore[attr-defined]


def test_a_bound_that_nothing_keeps_is_refused_before_anything_is_trained(counting, tmp_path):
    with pytest.raises(InfeasibleError, match=r"energy_mj <= 1e-09: the one with the fewest .* takes .* mJ"):
        search({**PLAIN, "constraints": ["energy_mj <= 1e-9"]}, runs=tmp_path, progress="quiet")
    assert not list(tmp_path.glob("*/networks/*"))


def test_it_is_refused_where_nobody_counts(monkeypatch, tmp_path):
    monkeypatch.setattr("mixnas.predictors.measuring.energy.POWERCAP", tmp_path)
    with pytest.raises(ConfigError, match="energy_mj: this machine shows no energy counters"):
        Problem(read_config({**PLAIN, "device": "cpu"}, "c.yaml"))
    assert "energy_mj" not in Problem(read_config({**PLAIN, "objectives": {"accuracy": "max"}}, "c.yaml")).metrics
