"""A training that is left off and gone on with is the training that never was, to the last bit."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mixnas.evaluators.pausing import NotThisTrainingError
from mixnas.evaluators.protocol import Part, Request
from mixnas.evaluators.standalone import StandaloneEvaluator, StandaloneSpec
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.training import TrainConfig, train
from mixnas.predictors.measuring.measure import fixed_threads
from mixnas.search_space.architecture import Architecture

STEM = {"name": "conv", "stride": 2}
BLOCKS = {
    "batch": {"mixer": "dwconv", "channel_mixer": "mlp", "norm": "batch"},
    "cached": {"mixer": {"name": "aggregated_attention", "heads": 2}, "channel_mixer": "swiglu"},
    "static": {"mixer": "pooling", "channel_mixer": "mlp", "quant": "w8a8_static"},
}
SPACE = {"stem": STEM, "stages": [{"width": 8, "block": {"mixer": "pooling", "channel_mixer": "mlp"}}]}


class Dropping(nn.Module):
    """Draws from PyTorch's global generator, as an operator with dropout does."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 10)
        with torch.no_grad():
            self.inner.weight.normal_(generator=generator)
            self.inner.bias.zero_()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.inner(self.drop(x.flatten(1)))


@pytest.fixture(scope="module")
def task():
    return by_name("digits")


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("stops", [(7,), (16, 32), (1, 20, 41)])
def test_wherever_it_is_left_off_the_weights_are_those_of_one_that_was_not(task, ema, stops):
    """Sixteen steps are an epoch: in the middle of one, and at its end."""
    config = TrainConfig(steps=42, ema=ema)

    def trained(until=None, begin=None):
        generator = torch.Generator().manual_seed(3)
        network = Dropping(generator)
        return network, train(network, task, config, generator=generator, until=until, begin=begin)

    network, whole = trained()
    state = None
    for stop in stops:
        part, result = trained(stop, state)
        state = result.state
        assert result.steps == stop and state is not None and not same(weights(part), weights(network))
    last, result = trained(begin=state)
    assert same(weights(last), weights(network)) and result.state is None
    assert result.loss == whole.loss and result.steps == 42


@pytest.mark.parametrize("name", list(BLOCKS))
def test_so_are_those_of_operators_that_keep_something(name):
    block = BLOCKS[name]
    norm = block.get("norm", "layer")
    plain = {
        "stem": STEM,
        "norm": norm,
        "stages": [{"width": 8, "blocks": [{k: v for k, v in block.items() if k != "norm"}]}],
    }
    architecture = Architecture.from_dict(plain)
    config = TrainConfig(steps=24, ema=0.8)
    evaluator = StandaloneEvaluator(StandaloneSpec(task="digits", space=SPACE, train=config))
    (first,) = evaluator.evaluate([Request(architecture, part=Part(0.0, 1 / 3))])
    assert not first.failure and first.state and first.network is None and first.metrics["train_steps"] == 8
    (second,) = evaluator.evaluate([Request(architecture, part=Part(1 / 3, 1.0, state=first.state))])
    (whole,) = evaluator.evaluate([Request(architecture)])
    assert second.state is None and second.network is not None
    assert same(weights(second.network), weights(whole.network))
    assert {n: v for n, v in second.metrics.items() if n != "train_seconds"} == {
        n: v for n, v in whole.metrics.items() if n != "train_seconds"
    }


def test_another_process_goes_on_as_well(tmp_path):
    """By one that knows nothing but the spec, the request and the state."""
    code = (
        "import pickle, sys, torch; torch.set_num_threads(1)\n"
        "spec, request = pickle.load(open(sys.argv[1], 'rb'))\n"
        "pickle.dump(spec.open().evaluate([request])[0], open(sys.argv[1] + '.out', 'wb'))\n"
    )
    config = TrainConfig(steps=20, ema=0.8)
    spec = StandaloneSpec(task="digits", space=SPACE, train=config)
    architecture = Architecture.from_dict({"stem": STEM, "stages": [{"width": 8, "blocks": [BLOCKS["cached"]]}]})
    with fixed_threads(1):
        (first,) = spec.open().evaluate([Request(architecture, part=Part(0.0, 0.4))])
        (whole,) = spec.open().evaluate([Request(architecture)])
    assert first.state and first.network is None
    path = tmp_path / "request"
    path.write_bytes(pickle.dumps((spec, Request(architecture, part=Part(0.4, 1.0, state=first.state)))))
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=Path(__file__).parents[2])
    last = pickle.loads((tmp_path / "request.out").read_bytes())
    assert same(weights(last.network), weights(whole.network))


def test_a_state_of_no_use_costs_time_and_nothing_else(task):
    architecture = Architecture.from_dict({"stem": STEM, "stages": [{"width": 8, "blocks": [BLOCKS["cached"]]}]})
    evaluator = StandaloneEvaluator(StandaloneSpec(task="digits", space=SPACE, train=TrainConfig(steps=12)))
    other = StandaloneEvaluator(StandaloneSpec(task="digits", space=SPACE, train=TrainConfig(steps=12), seed=1))
    (whole,) = evaluator.evaluate([Request(architecture)])
    (later,) = evaluator.evaluate([Request(architecture, part=Part(0.0, 0.75))])
    (foreign,) = other.evaluate([Request(architecture, part=Part(0.0, 0.5))])
    assert later.state is not None
    for state in (b"", b"nothing", later.state[:-100], foreign.state):
        (found,) = evaluator.evaluate([Request(architecture, part=Part(0.5, 1.0, state=state))])
        assert same(weights(found.network), weights(whole.network))
    (again,) = evaluator.evaluate([Request(architecture, part=Part(0.0, 0.5, state=later.state))])
    assert again.metrics["train_steps"] == 6
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(NotThisTrainingError):
        train(Dropping(generator), task, TrainConfig(steps=9), generator=generator, begin=later.state)
