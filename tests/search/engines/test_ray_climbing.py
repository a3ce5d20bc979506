"""Trials in rungs on Ray: states go through the object store, to whichever worker is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixnas.evaluators.protocol import Request
from mixnas.evaluators.standalone import StandaloneEvaluator, StandaloneSpec
from mixnas.evaluators.training import TrainConfig
from mixnas.predictors.measuring.measure import fixed_threads
from mixnas.search.engines.climbing import Climbing
from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.on_ray import cluster
from mixnas.search.engines.on_ray.cluster import Head
from mixnas.search.engines.ray import RayEngine
from mixnas.search.engines.session import Budget, Session
from mixnas.search.strategies.random import Random
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.space import SearchSpace
from tests.search.engines.test_climbing import SHARES, climb, promotions, replayed
from tests.search.engines.troubles import InRungs, end

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc"),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


@pytest.fixture(scope="module")
def head():
    with cluster.settings(own=True), Head(workers=2, store_mb=80) as head:
        yield head


@pytest.mark.parametrize("through", ["loop", "tune"])
def test_one_worker_sends_on_whom_this_machine_s_engine_sends_on(head, tmp_path, through):
    """Though the worker ends in the middle of a rung, twice: another one gets the state that was kept."""
    (tmp_path / "local").mkdir()
    here = climb(LocalEngine(), tmp_path / "local", InRungs(tmp_path / "here"), 9)
    engine = RayEngine(address=head.address, workers=1, through=through)
    evaluator = InRungs(tmp_path / "begun", {2: end, 7: end}, seconds=0.3)
    results = climb(engine, tmp_path, evaluator, 9)
    assert promotions(results) == promotions(here) == replayed(results)
    assert {r.id: (r.share, r.metrics) for r in results.records} == {r.id: (r.share, r.metrics) for r in here.records}
    retries = [*(x for r in results.records for x in r.retries)]
    retries += [x for r in results.records for s in r.stretches for x in s.retries]
    assert len(retries) >= 2 and set(retries) == {"the process that did it ended"}
    assert len(evaluator.pids) >= 3


SPACE = {
    "stem": {"name": "conv", "stride": 2},
    "norm": "batch",
    "stages": [{"width": [4, 6, 8], "block": {"mixer": ["pooling", "identity"], "channel_mixer": "mlp"}}],
}


def test_what_several_workers_trained_in_turn_is_bit_for_bit_what_one_trains_at_once(head, tmp_path):
    config = TrainConfig(steps=27, ema=0.8)
    spec = StandaloneSpec(task="digits", space=SPACE, train=config)
    objectives = parse_objectives({"accuracy": "max", "params": "min"})
    space, kept = SearchSpace.from_dict(SPACE), {}
    engine = RayEngine(address=head.address, workers=2, through="loop")
    with SearchStudy(tmp_path / "j", space, objectives, strategy=Random()) as study:
        climbing = Climbing(study, SHARES, 2, tmp_path / "rungs")

        def keep(proposal, outcome):
            kept[proposal.architecture.id] = proposal.architecture, outcome.network, outcome.metrics

        with Session(study, Budget(trials=6), climbing=climbing, keep=keep) as session:
            engine.run(session, StandaloneEvaluator(spec))
        whole = [r for r in study.results.records if r.whole]
    assert whole and {r.id for r in whole} == set(kept) and all(len(r.stretches) == 3 for r in whole)
    evaluator = StandaloneEvaluator(spec)
    for architecture, network, metrics in kept.values():
        with fixed_threads(1):
            (once,) = evaluator.evaluate([Request(architecture)])
        assert metrics["accuracy"] == once.metrics["accuracy"]
        for name, value in once.network.state_dict().items():
            assert torch.equal(value, network.state_dict()[name]), name
