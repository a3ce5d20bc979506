"""A configuration checked before any work is started."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixnas.evaluators.protocol import Request
from mixnas.evaluators.tasks import Split, Task
from mixnas.predictors.latency.predictor import SHIPPED as SHIPPED_TABLES
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.measuring.value import Latency
from mixnas.search.config import Config, read_config
from mixnas.search.problem import Problem
from mixnas.search.strategies.predictor import Predictor
from mixnas.search.study.feasibility import check_latency, quickest
from mixnas.search.study.objectives import parse_constraints
from mixnas.search_space.enumeration import Corner
from mixnas.search_space.errors import ConfigError, InfeasibleError
from mixnas.search_space.reporting import SILENT
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec
from tests.search.problems import SPACE as CONDITIONAL

SPACE = {
    "stem": "conv",
    "stages": [{"width": [4, 8], "block": {"mixer": ["identity", "pooling"], "channel_mixer": "mlp"}}],
}


SHIPPED = "cpu-intel-xeon-6-167-1t"


def problem(**changes) -> Problem:
    return Problem(read_config({"space": SPACE, **changes}, "c.yaml"), "c.yaml")


def test_metrics_come_from_the_evaluator():
    names = {"accuracy", "loss", "params", "macs", "weight_bytes", "latency_ms"}
    larger = {**SPACE, "norm": ["layer", "rms"], "stem": {"name": "conv", "kernel_size": [3, 5]}}  # of so few, measured
    supernet, standalone = problem(space=larger), problem(search={"evaluator": "standalone"})
    assert set(supernet.metrics) == set(standalone.metrics) == names
    assert supernet.metrics["latency_ms"].cheap and not standalone.metrics["latency_ms"].cheap
    assert set(problem(task={"name": "mqar", "length": 16, "pairs": 2, "train_size": 8, "validation_size": 8,
                             "test_size": 8}, objectives={"recall": "max"}, space={**SPACE, "stem": "embedding"}
                       ).metrics) == names - {"accuracy"} | {"recall"}  # fmt: skip


def test_the_default_is_the_super_network():
    """The class said stand-alone and the embedded configuration super-network."""
    assert Config().search.evaluator == "supernet"
    assert type(problem().evaluator(problem().latency())).__name__ == "SupernetEvaluator"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"objectives": {"acuracy": "max"}}, ConfigError, "unknown metric 'acuracy'. Did you mean 'accuracy'?"),
        ({"constraints": ["train_steps <= 3"]}, ConfigError, "unknown metric 'train_steps'"),
        ({"constraints": ["params <= 10"]}, InfeasibleError, "params goes from"),
        ({"constraints": ["accuracy >= 97"]}, InfeasibleError, "For 97% write accuracy >= 0.97"),
        ({"search": {"evaluator": "supernt"}}, ConfigError, "search.evaluator: no evaluator is called 'supernt'. Did"),
        ({"device": "nvidia-h1000"}, ConfigError, "no measurements of device 'nvidia-h1000'"),
        ({"device": "nvidia-h1000", "search": {"evaluator": "standalone"}}, ConfigError, "is not this machine"),
        ({"latency": {"runtime": "graph"}, "device": "cpu"}, ConfigError, "'graph' is not available here"),
        (
            {"objectives": {"latency_ms@cpu-intel-xeon-6-168-1t": "min"}},
            ConfigError,
            "latency_ms@cpu-intel-xeon-6-168-1t: no measurements of device 'cpu-intel-xeon-6-168-1t'",
        ),
        ({"latency": {"runtime": "onnx"}}, ConfigError, "runtime: 'onnx' is not allowed. Did you mean 'onnxruntime'?"),
    ],
)
def test_what_is_wrong_is_refused(changes, error, match):
    with pytest.raises(error) as raised:
        problem(**changes)
    assert match in str(raised.value)


class OnePosition(Task):
    """Images of one pixel, so many for training."""

    name = "one_position"

    def __init__(self, count: int = 8) -> None:
        self.io = IOSpec("image", (1, 1), 1, 2)
        self.train, self.validation, self.test = (
            Split(torch.arange(n).float().reshape(n, 1, 1, 1), torch.arange(n) % 2) for n in (count, 4, 4)
        )


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"final": {"train": {"batch_size": 1}}}, "final.train.batch_size"),
        ({"supernet": {"batch_size": 2, "processes": 2}}, "supernet.batch_size"),
        ({"search": {"evaluator": "standalone"}, "train": {"batch_size": 1}}, "train.batch_size"),
        ({"task": {"name": f"{__name__}:OnePosition", "count": 1}}, "task: train has one example"),
    ],
)
def test_a_batch_norm_that_would_see_one_value_is_refused(changes, where):
    given = {"task": f"{__name__}:OnePosition", "space": {**SPACE, "norm": ["layer", "batch"]}, **changes}
    with pytest.raises(ConfigError) as raised:
        problem(**given)
    assert str(raised.value).startswith(f"{where}: norm batch on a grid of 1x1 cannot be trained on one example")
    problem(**{**given, "space": SPACE})
    problem(**{**given, "task": f"{__name__}:OnePosition", "final": {}, "supernet": {}, "search": {}, "train": {}})


def test_a_latency_is_what_the_configuration_says():
    asked = problem(device="cpu", latency={"batch_size": 8, "threads": 2, "profile": "9s", "passes": 5})
    spec = asked.latency().spec
    assert (spec.device, spec.runtime, spec.threads, spec.batch_size) == ("cpu", "eager", 2, 8)
    assert (spec.profile_s, spec.passes, spec.directory, spec.reference_ms) == (9.0, 5, None, None)
    assert asked.device.endswith("-2t") and asked.latency_tag == "eager-b8"


def test_the_quickest_architecture_is_found_by_descent():
    space = SearchSpace.from_dict(CONDITIONAL)
    weights = np.random.default_rng(0).random(len(space.variables))

    def predict(rows):
        return 1 + (np.maximum(rows, 0) * weights).sum(axis=1) + (rows < 0).sum(axis=1)

    found = quickest(space, predict)
    everything = space.sample_many(20_000, np.random.default_rng(1))
    assert predict(found[None])[0] <= predict(everything).min()


@pytest.mark.parametrize(
    ("bound", "latency", "refused"),
    [
        ("latency_ms <= 0.0002", Latency(0.21, 0.19, 0.23, "predicted"), True),
        ("latency_ms <= 0.2", Latency(0.21, 0.19, 0.23, "predicted"), True),  # proposals go by the prediction
        ("latency_ms <= 0.21", Latency(0.21, 0.19, 0.23, "predicted"), False),
        ("latency_ms < 0.2", Latency(0.5, 0.45, 0.55, "measured"), True),
        ("latency_ms < 0.4", Latency(0.5, 0.45, 0.55, "measured"), False),  # another may be a little quicker
        ("latency_ms >= 9", Latency(0.5, 0.45, 0.55, "predicted"), False),
        ("params <= 1", Latency(0.5, 0.45, 0.55, "predicted"), False),
    ],
)
def test_a_bound_on_latency_that_nothing_keeps_is_refused(bound, latency, refused):
    architecture = SearchSpace.from_dict(CONDITIONAL).sample(np.random.default_rng(0))
    constraints = parse_constraints([bound])
    if not refused:
        check_latency(constraints, Corner(architecture, latency.ms), latency)
        return
    with pytest.raises(InfeasibleError, match=rf"meets {bound}: the quickest takes {latency.ms:.3g} ms"):
        check_latency(constraints, Corner(architecture, latency.ms), latency)


def test_auto_goes_by_the_evaluator():
    assert problem().strategy == Predictor(share=0.5)
    assert problem(search={"evaluator": "standalone"}).strategy == Predictor()
    assert problem(search={"strategy": "predictor"}).strategy == Predictor()


def test_latency_on_a_device_that_ships_is_an_objective_as_cheap_as_a_count():
    """Beside latency here; the predictor itself is the oracle."""
    name = f"latency_ms@{SHIPPED}"
    asked = problem(
        objectives={"accuracy": "max", "latency_ms": "min", name: "min"},
        constraints=[f"{name} <= 5"],
        search={"evaluator": "standalone"},
        train={"steps": 1},
    )
    assert [o.name for o in asked.objectives] == ["accuracy", "latency_ms", name] and asked.metrics[name].cheap
    evaluator = asked.evaluator(asked.latency())
    assert evaluator.spec.other_devices == (SHIPPED,)
    rows = asked.space.sample_many(5, np.random.default_rng(0))
    shipped = LatencyPredictor.load(SHIPPED, "eager", SHIPPED_TABLES)
    expected = shipped.predict_many(rows, asked.space, asked.io)
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(evaluator.spec.open().cheap(rows)[name], expected)
    assert not len(evaluator.cheap(rows[:0])[name])
    (outcome,) = evaluator.evaluate([Request(asked.space.decode(rows[0]))])
    assert outcome.metrics[name] == pytest.approx(expected[0], rel=1e-4) and outcome.metrics["latency_ms"] > 0


def test_a_bound_on_another_device_that_nothing_can_keep_is_refused():
    asked = problem(constraints=[f"latency_ms@{SHIPPED} <= 2e-4"], search={"evaluator": "standalone"})
    with pytest.raises(InfeasibleError, match=f"latency_ms@{SHIPPED} <= 0.0002: the quickest takes"):
        asked.check_latency(asked.latency(), SILENT, lambda: False)
