"""Evaluation with one super-network, apart from its training and judging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixnas.evaluators.protocol import Request
from mixnas.evaluators.supernet.evaluator import SupernetEvaluator, SupernetSpec
from mixnas.evaluators.supernet.training import SupernetConfig
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.training import TrainConfig
from mixnas.predictors.latency.source import LatencySpec
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import StoppedEarly
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
