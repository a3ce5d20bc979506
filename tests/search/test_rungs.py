"""Finalists that are trained in rungs: who goes on, what is kept, and what a search that was killed does again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixnas.evaluators.protocol import InParts
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.training import DivergedError
from mixnas.predictors.measuring.value import Latency
from mixnas.search.finish import FinalNetworks
from mixnas.search.halving import Halving
from mixnas.search.rungs import NetworksInRungs
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.results import TrialRecord
from mixnas.search_space.errors import StoppedEarly
from mixnas.search_space.formats.safetensors import read_extra
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import SILENT
from mixnas.search_space.space import SearchSpace

SPACE = SearchSpace.from_dict(
    {
        "stem": "conv",
        "stages": [
            {"width": [4, 8], "depth": [1, 2], "block": {"mixer": ["identity", "pooling"], "channel_mixer": "mlp"}}
        ],
    }
)
OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min"})
HALVING = Halving(rungs=3, factor=2, keep=0.5)


class _Evaluator:
    """Trains nothing: each part only looks at what it is given, and notes it."""

    finishing = "fine-tune"
    device = "cpu"

    def __init__(self, task, diverging=""):
        self.task, self.diverging, self.asked = task, diverging, []

    def finish(self, architecture, report, should_stop):
        raise AssertionError("all at once was not asked for")

    def finish_part(self, architecture, part, report=SILENT, should_stop=None):
        assert (part.network is None) == (part.begun == 0)
        self.asked.append((architecture.id, part.begun, part.until))
        if architecture.id == self.diverging and part.begun:
            raise DivergedError("the training loss is nan at step 3. Lower lr or clip.", step=3)
        network = part.network
        if network is None:
            seed = int(architecture.id[:6], 16)
            network = Network(architecture, self.task.io, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.01)
        return network.eval()


@pytest.fixture(scope="module")
def task():
    return by_name("digits")


@pytest.fixture(scope="module")
def records():
    found = list(dict.fromkeys(SPACE.sample(np.random.default_rng(seed)) for seed in range(80)))[:8]
    assert len(found) == 8
    metrics = [{"accuracy": 0.5, "latency_ms": 1.0 + 0.1 * i} for i in range(8)]
    return [TrialRecord(i, "done", a.id, a.to_json(), m) for i, (a, m) in enumerate(zip(found, metrics, strict=True))]


def finish(folder, task, records, evaluator, should_stop=lambda: False, recipe="one"):
    networks = NetworksInRungs(
        folder, task, "digits", recipe, halving=HALVING, networks=4, objectives=OBJECTIVES
    )  # fmt: skip
    return networks, networks.finish(records, evaluator, SILENT, should_stop)


def test_the_best_of_each_rung_go_on(tmp_path, task, records):
    evaluator = _Evaluator(task)
    assert isinstance(evaluator, InParts)
    networks, found = finish(tmp_path, task, records, evaluator)
    ladder = HALVING.ladder(4, 8)
    by_rung = [[i for i, begun, _ in evaluator.asked if begun == rung.begun] for rung in ladder]
    assert [len(each) for each in by_rung] == [rung.candidates for rung in ladder]
    assert set(by_rung[2]) < set(by_rung[1]) < set(by_rung[0])
    assert sum(until - begun for _, begun, until in evaluator.asked) <= 4
    # whoever went to the end has a network, and so has whoever nobody dominates; the rest is said to be left behind
    for record, one in zip(records, found, strict=True):
        extra = read_extra(tmp_path / f"{record.id}.safetensors")
        member = networks.member(record, one if isinstance(one, str) else Latency(1, 1, 1, "measured"), None)
        if isinstance(one, str):
            assert one.startswith("left behind after") and "test" not in extra and member.reason == one
            assert "accuracy" not in member.metrics and member.metrics["params"] > 0
        else:
            assert member.metrics["train_share"] == extra["rungs"][-1]["share"] <= 1
            assert member.metrics["test_accuracy"] == extra["test"]["accuracy"]
            assert extra["validation"] == extra["rungs"][-1]["validation"]
    finished = {r.id for r, one in zip(records, found, strict=True) if isinstance(one, Network)}
    assert set(by_rung[2]) <= finished
    # a second look trains nothing and gives the same
    asked = len(evaluator.asked)
    _, again = finish(tmp_path, task, records, evaluator)
    assert len(evaluator.asked) == asked
    for one, other in zip(found, again, strict=True):
        assert type(one) is type(other) and (one == other or isinstance(one, Network))
    # by another recipe everything is done anew
    finish(tmp_path, task, records, evaluator, recipe="two")
    assert len(evaluator.asked) == 2 * asked


def test_wherever_it_is_stopped_nothing_is_trained_twice(tmp_path, task, records):
    whole = _Evaluator(task)
    _, expected = finish(tmp_path / "whole", task, records, whole)
    stopped = _Evaluator(task)
    for allowed in range(1, len(whole.asked) + 3):
        try:
            _, found = finish(tmp_path / "s", task, records, stopped, lambda: len(stopped.asked) >= allowed)  # noqa: B023
        except StoppedEarly:
            assert len(stopped.asked) == allowed
        else:
            break
    assert stopped.asked == whole.asked
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, str):
            assert one == other
        else:
            assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_one_that_diverges_on_the_way_is_named_and_its_place_is_not_waited_for(tmp_path, task, records):
    probe = _Evaluator(task)
    finish(tmp_path / "probe", task, records, probe)
    diverging = next(i for i, begun, _ in probe.asked if begun)
    evaluator = _Evaluator(task, diverging)
    _, found = finish(tmp_path / "run", task, records, evaluator)
    (reason,) = [one for record, one in zip(records, found, strict=True) if record.id == diverging]
    assert "training loss is nan at step 3" in reason
    asked = len(evaluator.asked)
    _, again = finish(tmp_path / "run", task, records, evaluator)
    assert len(evaluator.asked) == asked and reason in again


def test_a_network_of_a_rung_is_no_final_one_without_rungs(tmp_path, task, records):
    """A run that goes on without halving trains what was only begun."""
    with pytest.raises(StoppedEarly):
        evaluator = _Evaluator(task)
        finish(tmp_path, task, records, evaluator, lambda: len(evaluator.asked) >= 2)

    class Whole(_Evaluator):
        def finish(self, architecture, report, should_stop):
            self.asked.append(architecture.id)
            return Network(architecture, self.task.io, generator=torch.Generator().manual_seed(0)).eval()

    other = Whole(task)
    FinalNetworks(tmp_path, task, "digits", "three").finish(records[:3], other, SILENT, lambda: False)
    assert other.asked == [record.id for record in records[:3]]
