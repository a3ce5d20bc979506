"""Judging sub-networks with inherited weights, and training chosen ones on."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixnas.evaluators.supernet import judging
from mixnas.evaluators.supernet.judging import SubnetJudge, fine_tune
from mixnas.evaluators.supernet.training import train_supernet
from mixnas.evaluators.tasks.digits import Digits
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import DivergedError, TrainConfig, evaluate
from mixnas.search_space import registry
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.registry import Context
from mixnas.search_space.units import plan
from tests.evaluators.streamed import Signs
from tests.evaluators.supernet.tiny import CONFIG, assert_equal, tiny_supernet, weights


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


@pytest.mark.parametrize("norm", [["layer", "rms"], ["layer", "batch"]])
@pytest.mark.parametrize("examples", [0, 300])
def test_many_judged_together_score_as_each_alone(digits, norm, examples):
    supernet = tiny_supernet(digits, norm)
    train_supernet(supernet, digits, CONFIG, seed=0)
    rng = np.random.default_rng(0)
    architectures = [supernet.space.sample(rng) for _ in range(24)]
    found = SubnetJudge(supernet, digits, probe=examples).judge_many([*architectures, architectures[3]])
    assert found[-1] == found[3]
    for architecture, metrics in zip(architectures, found, strict=False):
        assert list(metrics) == ["accuracy", "loss", "accuracy_se"]
        assert SubnetJudge(supernet, digits, probe=examples)(architecture) == metrics
        extracted = supernet.extract(architecture)
        if architecture.norm.name != "batch" and not examples:
            judged = evaluate(extracted, digits)
            assert (metrics["accuracy"], metrics["loss"]) == pytest.approx((judged.score, judged.loss))


def test_what_is_shared_is_computed_once(digits):
    supernet = tiny_supernet(digits)
    rng = np.random.default_rng(0)
    architectures = list(dict.fromkeys(supernet.space.sample(rng) for _ in range(40)))
    judge = SubnetJudge(supernet, digits)
    calls: Counter[str] = Counter()
    counted = set()
    for architecture in architectures:
        for name, module in supernet.subnet(architecture).units():
            if id(module) not in counted:
                counted.add(id(module))
                module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    judge.judge_many(architectures)
    planned = [plan(architecture, digits.io) for architecture in architectures]
    assert calls["stem"] == len({units[0] for units in planned})
    assert calls["stages.0.blocks.0.token"] == len({units[:2] for units in planned})
    assert calls["stages.0.blocks.0.channel"] == len({units[:3] for units in planned})
    before = calls.total()
    judge.judge_many(architectures)
    assert calls.total() == before
    judge.forget()
    judge(architectures[0])
    assert calls.total() > before


def test_fine_tuning_starts_from_inherited_weights_and_leaves_the_store_alone(digits):
    supernet = tiny_supernet(digits)
    train_supernet(supernet, digits, dataclasses.replace(CONFIG, steps=100, lr=2e-2), seed=0)
    before = weights(supernet)
    architecture = supernet.largest()
    begun_with = evaluate(supernet.subnet(architecture), digits)
    config = TrainConfig(steps=40, lr=1e-3)
    losses = {}
    for inherit in (True, False):
        network, result = fine_tune(
            supernet, architecture, digits, config, generator=torch.Generator().manual_seed(0), inherit=inherit
        )
        assert (result.steps, network.architecture) == (40, architecture)
        losses[inherit] = evaluate(network, digits).loss
    assert losses[True] < begun_with.loss < losses[False]
    assert_equal(before, weights(supernet))


def test_what_is_remembered_is_not_judged_again(digits):
    supernet = tiny_supernet(digits)
    architecture = supernet.space.sample(np.random.default_rng(0))
    judge = SubnetJudge(supernet, digits)
    judge.remember({architecture.id: {"accuracy": 2.0, "loss": -1.0}})
    assert judge(architecture) == {"accuracy": 2.0, "loss": -1.0}
    judge.forget()
    assert judge(architecture) == SubnetJudge(supernet, digits)(architecture)


@pytest.mark.parametrize("examples", [0, 70])
def test_a_streamed_dense_task_with_a_metric_of_its_own(examples):
    task = Signs()
    supernet = tiny_supernet(task)
    train_supernet(supernet, task, CONFIG, seed=0)
    rng = np.random.default_rng(0)
    architectures = [supernet.space.sample(rng) for _ in range(8)]
    found = SubnetJudge(supernet, task, probe=examples).judge_many(architectures)
    for architecture, metrics in zip(architectures, found, strict=True):
        assert list(metrics) == ["overlap", "loss", "overlap_se"]
        if not examples:
            judged = evaluate(supernet.extract(architecture), task)
            assert (metrics["overlap"], metrics["loss"]) == pytest.approx((judged.score, judged.loss))


@pytest.mark.parametrize("kept", [0, 3000, 60_000])
@pytest.mark.parametrize("examples", [0, 70])
def test_what_does_not_fit_in_memory_is_gathered_and_computed_again(kept, examples, monkeypatch):
    """Nothing kept, the inputs and a few activations, and much: always the same answers."""
    task = Signs()
    supernet = tiny_supernet(task)
    rng = np.random.default_rng(0)
    architectures = [supernet.space.sample(rng) for _ in range(8)]
    monkeypatch.setattr(judging, "_BATCH_SIZE", 16)
    expected = SubnetJudge(supernet, task, probe=examples).judge_many(architectures)
    monkeypatch.setattr(judging, "_KEPT_VALUES", kept)
    judge = SubnetJudge(supernet, task, probe=examples)
    task.validation.asked.clear()
    assert judge.judge_many(architectures) == expected
    assert len(task.validation.asked) == (8 * 6 if kept < 90 * 30 else 0)
    largest = 16 * 30 * 8  # one more may be kept than fits
    assert judge._trail._values <= kept + largest
    assert bool(judge._trail._values) == bool(kept)


def test_a_loss_that_is_not_finite_is_the_architectures(digits):
    supernet = tiny_supernet(digits)
    with torch.no_grad():
        supernet.get_parameter("head.output.pool.linear.bias").fill_(float("inf"))
    architecture = supernet.space.sample(np.random.default_rng(0))
    with pytest.raises(DivergedError, match=f"{architecture.id}'s validation loss is nan"):
        SubnetJudge(supernet, digits)(architecture)


# -- heads that do not end in a linear layer ---------------------------------------------------------------------


class Squared(nn.Module):
    """A head whose answers are no linear function of anything."""

    def __init__(self, before: Context, after: Context) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(after.width, before.width))

    @staticmethod
    def out_size(size: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1, -2).mean(1), self.weight).square()


def test_another_head_is_run_whole_and_not_probed(digits, monkeypatch):
    monkeypatch.setattr(registry, "_operators", dict(registry._operators))
    registry.register("head", "squared", paper="none")(Squared)
    task = Digits()
    task.io = dataclasses.replace(digits.io, head="squared", out_size=())
    supernet = tiny_supernet(task)
    architecture = supernet.space.sample(np.random.default_rng(0))
    judged, plain = SubnetJudge(supernet, task)(architecture), evaluate(supernet.extract(architecture), task)
    assert (judged["accuracy"], judged["loss"]) == pytest.approx((plain.score, plain.loss))
    with pytest.raises(ConfigError, match=r"probe is 64, but the head 'squared' has no linear last layer .* Set probe"):
        SubnetJudge(supernet, task, probe=64)
