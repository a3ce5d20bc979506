"""Stand-alone evaluation of architectures on the digits."""

import math

import pytest
import torch

from mixnas.evaluators.standalone import StandaloneEvaluator
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import TrainConfig, evaluate
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, StoppedEarly
from mixnas.search_space.network import Network, cost

SHORT = TrainConfig(steps=24)
QUICK = MeasureConfig(passes=2, window_ms=1.0)


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


def architecture(width: int = 8, mixer: object = "pooling", quant: str = "fp32") -> Architecture:
    block = {"mixer": mixer, "channel_mixer": "mlp", "quant": quant}
    return Architecture.from_dict(
        {"stem": {"name": "conv", "stride": 2}, "stages": [{"width": width, "blocks": [block]}]}
    )


def test_metrics(digits: Task) -> None:
    kept: list[tuple[Architecture, Network, dict[str, float]]] = []
    evaluator = StandaloneEvaluator(digits, SHORT, measure=QUICK, keep=lambda *args: kept.append(args))
    metrics = evaluator(architecture())
    assert set(metrics) == set(evaluator.metrics)
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    expected = cost(architecture(), digits.io)
    assert (metrics["params"], metrics["macs"]) == (expected.params, expected.macs)
    assert metrics["weight_bytes"] == expected.weight_bytes
    assert metrics["train_steps"] == 24
    assert 0 < metrics["latency_low_ms"] <= metrics["latency_ms"] <= metrics["latency_high_ms"]
    ((_, network, recorded),) = kept
    assert recorded == metrics
    judged = evaluate(network, digits, "validation")
    assert (judged.score, judged.loss) == (metrics["accuracy"], metrics["loss"])


def test_without_measuring_nothing_but_time_differs(digits: Task) -> None:
    first, second = (StandaloneEvaluator(digits, SHORT, measure=None, seed=5)(architecture()) for _ in range(2))
    assert "latency_ms" not in first
    for metrics in (first, second):
        del metrics["train_seconds"]
    assert first == second
    other = StandaloneEvaluator(digits, SHORT, measure=None, seed=6)(architecture())
    assert other["loss"] != first["loss"]


def test_test_split_is_read_on_request_alone(digits: Task) -> None:
    class Guarded(Task):
        name, io = "guarded", digits.io
        train, validation = digits.train, digits.validation
        open = False

        @property
        def test(self):
            assert self.open, "the test split was read during the search"
            return digits.test

    task = Guarded()
    evaluator = StandaloneEvaluator(task, SHORT, measure=QUICK)
    evaluator(architecture())
    network, _ = evaluator.train(architecture())
    task.open = True
    judged = evaluator.test(network)
    assert set(judged) == {"test_accuracy", "test_loss"}
    assert 0 <= judged["test_accuracy"] <= 1


def test_larger_networks_take_longer_and_share_one_reference(digits: Task) -> None:
    evaluator = StandaloneEvaluator(digits, SHORT, measure=QUICK)
    reference = evaluator.reference_ms
    generator = torch.Generator().manual_seed(0)
    networks = [
        Network(architecture(width, {"name": "attention", "heads": 2}), digits.io, generator=generator)
        for width in (8, 256)
    ]
    before = {name: value.clone() for name, value in networks[0].state_dict().items()}
    small, large = evaluator.latencies(networks)
    assert large.latency_ms > small.latency_ms
    assert evaluator.reference_ms == reference
    assert small.latency_ms == pytest.approx(small.ratio * reference)
    assert StandaloneEvaluator(digits, SHORT, reference_ms=0.25).reference_ms == 0.25
    assert networks[0].training  # measured as a copy
    assert all(torch.equal(before[name], value) for name, value in networks[0].state_dict().items())


def test_quantized_networks_are_measured_as_deployed(digits: Task) -> None:
    evaluator = StandaloneEvaluator(digits, SHORT, measure=QUICK)
    network = Network(architecture(quant="bf16"), digits.io, generator=torch.Generator().manual_seed(0))
    (latency,) = evaluator.latencies([network])
    assert latency.latency_ms > 0
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_a_stop_is_passed_on(digits: Task) -> None:
    with pytest.raises(StoppedEarly):
        StandaloneEvaluator(digits, SHORT, measure=None, should_stop=lambda: True)(architecture())


def test_an_architecture_for_another_kind_of_task_is_refused() -> None:
    mqar = by_name("mqar", vocab_size=32, length=16, pairs=2, train_size=8, validation_size=8, test_size=8)
    with pytest.raises(ConfigError, match="conv"):
        StandaloneEvaluator(mqar, SHORT, measure=None)(architecture())
