"""Stand-alone evaluation of architectures on the digits."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixnas.evaluators.protocol import Request
from mixnas.evaluators.standalone import StandaloneEvaluator, StandaloneSpec
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import TrainConfig, evaluate
from mixnas.predictors.latency.source import LatencySpec
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.errors import ConfigError, StoppedEarly
from mixnas.search_space.space import SearchSpace
from tests.contracts.evaluator import EvaluatorContract

SPACE = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [{"width": [4, 8], "block": {"mixer": ["pooling", "identity"], "channel_mixer": "mlp"}}],
}
SHORT = TrainConfig(steps=24)
LATENCY = LatencySpec(
    device="cpu", runtime="eager", threads=1, batch_size=1, directory=None, profile_s=1.0, passes=2, seed=0
)


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


def made(
    latency: LatencySpec | None = None, seed: int = 0, task: Task | None = None, train: TrainConfig = SHORT
) -> StandaloneEvaluator:
    spec = StandaloneSpec(task="digits", space=SPACE, train=train, seed=seed, latency=latency)
    return StandaloneEvaluator(spec, task=task)


def architecture() -> Architecture:
    block = {"mixer": "pooling", "channel_mixer": "mlp"}
    return Architecture.from_dict({"stem": SPACE["stem"], "stages": [{"width": 8, "blocks": [block]}]})


@pytest.fixture(scope="module")
def evaluator() -> StandaloneEvaluator:
    evaluator = made(replace(LATENCY, passes=1), train=TrainConfig(steps=6))
    evaluator.prepare()
    return evaluator


@pytest.fixture(scope="module")
def space(evaluator: StandaloneEvaluator) -> SearchSpace:
    return evaluator.space


class TestContract(EvaluatorContract):
    steady = frozenset({"accuracy", "loss", "params", "macs", "weight_bytes"})


def test_metrics(digits: Task) -> None:
    evaluator = made(LATENCY)
    (outcome,) = evaluator.evaluate([Request(architecture())])
    metrics = outcome.metrics
    more = {"accuracy_se", "train_steps", "train_seconds", "latency_low_ms", "latency_high_ms"}
    assert set(metrics) == {*evaluator.metrics, *more}
    assert all(isinstance(value, float) for value in metrics.values())
    expected = cost(architecture(), digits.io)
    assert (metrics["params"], metrics["macs"]) == (expected.params, expected.macs)
    assert metrics["weight_bytes"] == expected.weight_bytes
    assert metrics["train_steps"] == 24
    assert 0 < metrics["latency_low_ms"] <= metrics["latency_ms"] <= metrics["latency_high_ms"]
    assert outcome.network is not None
    judged = evaluate(outcome.network, digits, "validation")
    assert (judged.score, judged.loss) == (metrics["accuracy"], metrics["loss"])
    assert {name: (m.direction, m.cheap) for name, m in evaluator.metrics.items()} == {
        "accuracy": ("max", False), "loss": ("min", False), "params": ("min", True), "macs": ("min", True),
        "weight_bytes": ("min", True), "latency_ms": ("min", False),
    }  # fmt: skip


def test_without_measuring_nothing_but_time_differs() -> None:
    first, second = (dict(made(seed=5).evaluate([Request(architecture())])[0].metrics) for _ in range(2))
    assert "latency_ms" not in first and "latency_ms" not in made().metrics
    for metrics in (first, second):
        del metrics["train_seconds"]
    assert first == second
    (other,) = made(seed=6).evaluate([Request(architecture())])
    assert other.metrics["loss"] != first["loss"]


def test_the_final_network_is_the_one_that_was_judged() -> None:
    evaluator = made()
    (outcome,) = evaluator.evaluate([Request(architecture())])
    again = evaluator.finish(architecture())
    assert outcome.network is not None and not again.training
    for name, tensor in outcome.network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_a_lower_fidelity_trains_less_and_keeps_nothing() -> None:
    (outcome,) = made().evaluate([Request(architecture(), fidelity=0.25)])
    assert outcome.metrics["train_steps"] == 6 and outcome.network is None
    epochs = StandaloneSpec(task="digits", space=SPACE, train=TrainConfig(epochs=2, batch_size=100), seed=0)
    (half,) = epochs.open().evaluate([Request(architecture(), fidelity=0.5)])
    assert half.metrics["train_steps"] == 10  # 1,078 examples


def test_the_test_split_is_not_read(digits: Task) -> None:
    class Guarded(Task):
        name, io = "guarded", digits.io
        train, validation = digits.train, digits.validation

        @property
        def test(self):
            raise AssertionError("the test split was read during the search")

    evaluator = made(LATENCY, task=Guarded())
    evaluator.prepare()
    (outcome,) = evaluator.evaluate([Request(architecture())])
    assert outcome.failure == "" and 0 <= outcome.metrics["accuracy"] <= 1
    evaluator.finish(architecture())


def test_a_stop_is_passed_on() -> None:
    with pytest.raises(StoppedEarly):
        made().finish(architecture(), should_stop=lambda: True)


def test_what_cannot_be_evaluated_fails_alone() -> None:
    images = made()
    spec = StandaloneSpec(
        task={"name": "mqar", "vocab_size": 32, "length": 16, "pairs": 2, "train_size": 8, "validation_size": 8,
              "test_size": 8}, space=SPACE, train=SHORT)  # fmt: skip
    (failed,) = spec.open().evaluate([Request(architecture())])
    assert failed.failure.startswith("ConfigError: ") and "conv" in failed.failure and failed.metrics == {}
    assert images.evaluate([Request(architecture())])[0].failure == ""


def test_another_device_cannot_be_measured() -> None:
    elsewhere = replace(LATENCY, device="nvidia-h100")
    with pytest.raises(ConfigError, match=r"'nvidia-h100' is not this machine.*search\.evaluator: supernet"):
        made(elsewhere)


def test_the_reference_time_is_fixed_once_and_handed_on() -> None:
    evaluator = made(LATENCY)
    assert evaluator.spec.latency == LATENCY
    evaluator.prepare()
    again = pickle.loads(pickle.dumps(evaluator.spec)).open()
    assert again.latency.reference_ms == evaluator.latency.reference_ms == evaluator.spec.latency.reference_ms
    assert np.isfinite(again.latency.reference_ms)
