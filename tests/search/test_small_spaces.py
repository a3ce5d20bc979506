"""Spaces too small for a latency predictor: each network is measured, and what a few networks give is shown."""

from __future__ import annotations

from typing import Any

import pytest

from mixnas.evaluators.protocol import Request
from mixnas.predictors.latency.enough import too_small
from mixnas.search.config import read_config
from mixnas.search.job import resume, search
from mixnas.search.problem import Problem
from mixnas.search.report.page import write_report
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

PLAIN: dict[str, Any] = {
    "task": "digits",
    "objectives": {"accuracy": "max", "latency_ms": "min"},
    "search": {"trials": 9},
    "supernet": {"steps": 3, "batch_size": 32},
    "final": {"candidates": 4, "train": {"steps": 3}},
    "latency": {"profile": 5, "passes": 1, "final_passes": 1},
}


def stages(width: Any, mixer: Any = "identity", expansion: Any = 2, depth: Any = 1, kernel: Any = 3) -> dict[str, Any]:
    block = {"mixer": mixer, "channel_mixer": {"name": "mlp", "expansion": expansion}}
    stem = {"name": "conv", "kernel_size": kernel}
    return {"stem": stem, "stages": [{"width": width, "depth": depth, "block": block}]}


# 40 architectures, but each of few units: what differs are their combinations
FEW_UNITS = stages(8, ["identity", "pooling"], [1, 2], [1, 2], [3, 5])


@pytest.mark.parametrize("strategy", ["random", "nsga2", "predictor", "linas"])
@pytest.mark.parametrize("width", [8, [8, 16]])
def test_each_architecture_is_measured_and_shown(tmp_path, width, strategy):
    plain = {**PLAIN, "space": stages(width), "search": {"trials": 9, "strategy": strategy}}
    run = search(plain, name="small", runs=tmp_path, progress="quiet")
    front, count = run.front(), 1 if width == 8 else 2
    assert front.trials["done"] == count and front.latency == "measured" and front.members
    assert all(member.latency.kind == "measured" and member.searched["latency_ms"] > 0 for member in front.members)
    assert [phase["name"] for phase in run.manifest["phases"]] == ["train supernet", "search", "fine-tune", "measure"]


def test_the_report_of_one_network_and_what_goes_on_with_it(tmp_path):
    plain = {**PLAIN, "space": stages(8), "constraints": ["latency_ms <= 1000"]}
    run = search(plain, name="one", runs=tmp_path, progress="quiet")
    (member,) = run.front().members
    assert member.id in write_report(run).read_text()
    again = resume("one", runs=tmp_path, settings=["search.trials=20"], progress="quiet").front()
    assert again.trials["done"] == 1 and [each.id for each in again.members] == [member.id]


@pytest.mark.parametrize(
    ("space", "why"),
    [
        (stages(8), "the space has 1 architecture, and a fit needs 12 that are measured"),
        (stages([8, 16], ["identity", "pooling"]), "the space has 4 architectures, and a fit needs 12"),
        (FEW_UNITS, "the space's networks have 7 units that differ, and a fit needs 8"),
        (stages([8, 12, 16], ["identity", "pooling"], [1, 2]), ""),
    ],
)
def test_whether_a_space_is_too_small_is_known_before_anything_is_measured(space, why):
    assert too_small(SearchSpace.from_dict(space), IOSpec("image", (8, 8), 1, 10)).startswith(why)
    problem = Problem(read_config({**PLAIN, "space": space}, "c.yaml"))
    assert problem.metrics["latency_ms"].cheap == (not why) and "latency_ms" not in problem.provisional
    told = [line for line in problem.told({}) if line.startswith("profile: none, each network is measured")]
    assert bool(told) == bool(why)
    assert problem.evaluator(problem.latency()).quiet == bool(why)  # type: ignore[attr-defined]


def test_of_another_device_nothing_can_be_measured():
    """A table that ships knows its units, whatever space they stand in."""
    plain = {**PLAIN, "space": stages(8), "device": "cpu-intel-xeon-6-167-1t"}
    problem = Problem(read_config(plain, "c.yaml"))
    assert problem.latency().here or problem.metrics["latency_ms"].cheap


def test_a_judgement_made_elsewhere_gets_its_latency_here():
    """As engines with workers do; the sub-network's metrics stay as they are."""
    problem = Problem(read_config({**PLAIN, "space": stages([8, 16])}, "c.yaml"))
    evaluator: Any = problem.evaluator(problem.latency())
    evaluator.prepare()
    there = evaluator.elsewhere().open()
    request = Request(problem.space.decode(problem.space.every()[1]))
    (judged,) = there.evaluate([request])
    assert "latency_ms" not in judged.metrics
    whole = evaluator.complete(request, judged)
    assert whole.metrics["latency_ms"] > 0 and whole.metrics["accuracy"] == judged.metrics["accuracy"]
    assert "latency_ms" not in evaluator.cheap(problem.space.every())
