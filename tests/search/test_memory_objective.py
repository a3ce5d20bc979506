"""`peak_memory_bytes` in a configuration: an objective and a constraint like the other costs."""

from __future__ import annotations

from typing import Any

import pytest

from mixnas.search.config import read_config
from mixnas.search.job import search
from mixnas.search.problem import Problem
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, InfeasibleError
from mixnas.search_space.memory import peak_memory_bytes

BLOCK = {"mixer": ["identity", "pooling"], "channel_mixer": {"name": "mlp", "expansion": [1, 2, 4]}}
PLAIN: dict[str, Any] = {
    "task": "digits",
    "objectives": {"accuracy": "max", "peak_memory_bytes": "min"},
    "search": {"trials": 6, "evaluator": "standalone", "strategy": "predictor"},
    "train": {"steps": 3},
    "latency": {"passes": 1, "final_passes": 1},
    "space": {"stem": "conv", "stages": [{"width": [4, 8, 16], "depth": [1, 2], "block": BLOCK}]},
}


def test_a_search_goes_by_it(tmp_path):
    bound = 9000
    run = search({**PLAIN, "constraints": [f"peak_memory_bytes <= {bound}"]}, runs=tmp_path, progress="quiet")
    front = run.front()
    io = Problem(run_config := read_config(run.config(), "run")).io
    assert run_config.objectives["peak_memory_bytes"] == "min" and front.members
    for member in front.members:
        expected = peak_memory_bytes(Architecture.from_canonical(member.architecture), io)
        assert member.metrics["peak_memory_bytes"] == expected <= bound


def test_it_is_counted_where_it_is_asked_for_only_and_known_by_name_everywhere():
    problem = Problem(read_config(PLAIN, "c.yaml"))
    assert problem.metrics["peak_memory_bytes"].cheap
    other = {**PLAIN, "objectives": {"accuracy": "max", "params": "min"}}
    assert "peak_memory_bytes" not in Problem(read_config(other, "c.yaml")).metrics
    with pytest.raises(ConfigError, match="Did you mean 'peak_memory_bytes'"):
        Problem(read_config({**PLAIN, "objectives": {"accuracy": "max", "peak_memory": "min"}}, "c.yaml"))


def test_a_bound_that_nothing_keeps_is_refused_with_the_least():
    with pytest.raises(InfeasibleError, match=r"bytes <= 100: of all 126 the nearest has peak_memory_bytes [\d,]+"):
        Problem(read_config({**PLAIN, "constraints": ["peak_memory_bytes <= 100"]}, "c.yaml"))
