"""Evaluation with one super-network, apart from its training and judging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixnas.evaluators.protocol import InParts, Part, Request, finished
from mixnas.evaluators.supernet.evaluator import SupernetEvaluator, SupernetSpec
from mixnas.evaluators.supernet.training import SupernetConfig
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.training import TrainConfig
from mixnas.evaluators.workers import FINISH, Workers
from mixnas.predictors.latency.source import LatencySpec
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import StoppedEarly
from mixnas.search_space.reporting import SilentReport
from mixnas.search_space.space import SearchSpace
from tests.contracts.evaluator import EvaluatorContract, Phases
from tests.elsewhere import DEVICE, elsewhere

SPACE = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [
        {
            "width": [4, 8],
            "depth": [1, 2],
            "block": {"mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}], "channel_mixer": "mlp"},
        }
    ],
}
STEPS = SupernetConfig(steps=8, checkpoint_every=0, probe=64)


LATENCY = LatencySpec(
    device=DEVICE, runtime="eager", threads=1, batch_size=1, directory=None, profile_s=1.0, passes=1, seed=0
)


@pytest.fixture(scope="module", autouse=True)
def other_device(tmp_path_factory):
    """Latency is that of another device, so that nothing is profiled."""
    with elsewhere(tmp_path_factory.mktemp("tables"), SearchSpace.from_dict(SPACE), by_name("digits").io):
        yield


def first(evaluator: SupernetEvaluator) -> Architecture:
    return evaluator.space.decode([0] * len(evaluator.space.variables))


def spec(folder: Path, **changes) -> SupernetSpec:
    fields = {"latency": LATENCY, "checkpoint": folder / "supernet.safetensors", "supernet": STEPS, **changes}
    return SupernetSpec(task="digits", space=SPACE, final=TrainConfig(steps=4), device="cpu", **fields)


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory, other_device) -> SupernetEvaluator:
    evaluator = spec(tmp_path_factory.mktemp("run")).open()
    evaluator.prepare()
    return evaluator


@pytest.fixture(scope="module")
def space(evaluator):
    return evaluator.space


class TestContract(EvaluatorContract):
    steady = frozenset({"accuracy", "loss", "params", "macs", "weight_bytes", "latency_ms"})


def test_making_one_does_no_work_and_preparing_is_resumed(tmp_path):
    phases, asked = Phases(), spec(tmp_path)
    evaluator = asked.open()
    assert not list(tmp_path.iterdir()) and evaluator.metrics["latency_ms"].cheap
    steps = iter(range(4))
    with pytest.raises(StoppedEarly):
        evaluator.prepare(phases, should_stop=lambda: next(steps, None) is None)
    evaluator.prepare(phases)
    asked.open().prepare(phases)
    assert phases.begun == ["train supernet", "train supernet"]  # begun, gone on with, and found finished

    whole = spec(tmp_path / "whole").open()
    whole.prepare()
    requests = [Request(first(evaluator))]
    assert evaluator.evaluate(requests)[0].metrics == whole.evaluate(requests)[0].metrics


def test_without_latency_and_in_memory_alone(tmp_path):
    evaluator = spec(tmp_path, latency=None, checkpoint=None).open()
    evaluator.prepare()
    (outcome,) = evaluator.evaluate([Request(first(evaluator))])
    assert "latency_ms" not in evaluator.metrics and "latency_ms" not in outcome.metrics
    assert outcome.network is None and not list(tmp_path.iterdir())


def test_final_weights_begin_with_the_inherited_ones_or_anew(tmp_path):
    networks = {}
    for inherit in (True, False):
        evaluator = spec(tmp_path, inherit=inherit).open()
        evaluator.prepare()
        architecture = first(evaluator)
        networks[evaluator.finishing] = evaluator.finish(architecture)
        with pytest.raises(StoppedEarly):
            evaluator.finish(architecture, should_stop=lambda: True)
    assert list(networks) == ["fine-tune", "train from scratch"]
    tuned, fresh = networks.values()
    assert not tuned.training
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), fresh.parameters(), strict=True))


class Told(SilentReport):
    """Notes how many steps each training is to have."""

    def __init__(self):
        self.steps = set()

    def __call__(self, done, total=None, **info):
        self.steps.add(total)


def test_final_weights_come_in_parts_wherever_each_is_done(evaluator):
    assert isinstance(evaluator, InParts)
    architecture, told = first(evaluator), Told()
    one = evaluator.finish_part(architecture, Part(0.0, 0.25), told)
    assert told.steps == {1} and not one.training  # of four in all
    before = [p.clone() for p in one.parameters()]
    request = Request(architecture, part=Part(0.25, 1.0, one))
    two = finished(evaluator, request, told).network
    assert told.steps == {1, 3}
    assert all(torch.equal(a, b) for a, b in zip(before, one.parameters(), strict=True))  # it may be asked for again
    assert not all(torch.equal(a, b) for a, b in zip(before, two.parameters(), strict=True))
    whole = evaluator.finish_part(architecture, Part(0.0, 1.0))
    at_once = evaluator.finish(architecture)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), at_once.parameters(), strict=True))
    threads = torch.get_num_threads()
    with Workers(evaluator.spec, 1, threads) as workers:
        workers.open()
        workers.submit(7, FINISH, request)
        answers = []
        while not answers:
            answers = list(workers.answers())
    ((key, outcome),) = answers
    assert key == 7 and outcome.failure == ""
    for a, b in zip(two.parameters(), outcome.network.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_peak_memory_is_there_where_it_is_asked_for(tmp_path):
    asked = spec(tmp_path, latency=None, checkpoint=None, memory=True).open()
    asked.prepare()
    (outcome,) = asked.evaluate([Request(first(asked))])
    found = asked.cheap(asked.space.encode_many([first(asked)]))
    assert found["peak_memory_bytes"][0] == outcome.metrics["peak_memory_bytes"] > outcome.metrics["weight_bytes"]
