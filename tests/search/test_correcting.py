"""A predictor that flatters some networks is found out while the search still goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mixnas.evaluators.costs import SpaceCosts
from mixnas.evaluators.protocol import Outcome
from mixnas.predictors.latency.source import LatencySource
from mixnas.predictors.measuring.value import Latency
from mixnas.search.config import read_config
from mixnas.search.correcting import Correcting
from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.ray import RayEngine
from mixnas.search.engines.session import Budget, Session
from mixnas.search.finish import choose_finalists
from mixnas.search.problem import Problem
from mixnas.search.strategies.evolution import NSGA2
from mixnas.search.strategies.predictor import Predictor
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.errors import IntegrityError, StoppedEarly

PLAIN: dict[str, Any] = {
    "task": "digits",
    "objectives": {"accuracy": "max", "latency_ms": "min"},
    "search": {"trials": 40, "strategy": "predictor"},
    "space": {
        "stem": {"name": "conv", "stride": 1},
        "stages": [
            {
                "width": [8, 16, 24],
                "depth": [1, 2, 3],
                "block": {
                    "mixer": ["identity", "pooling", {"name": "dwconv", "kernel_size": [3, 5]}],
                    "channel_mixer": {"name": "mlp", "expansion": [1, 2, 4]},
                },
            }
        ],
    },
}


class Flattering(LatencySource):
    """A device whose truth is known: 1.6 times what is predicted of what has `pooling`, 1.1 times of the rest."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.latency().spec)
        self._counted, self.measured = SpaceCosts(problem.space, problem.io), []
        self._predictor = SimpleNamespace(  # type: ignore[assignment]
            predict_many=lambda rows, space, io: 0.1 + self._counted.of(rows)["macs"] / 1e6
        )

    def truth(self, rows: np.ndarray, space: Any, io: Any) -> np.ndarray:
        pooled = ["pooling" in str(a) for a in space.decode_many(rows)]
        return self._predictor.predict_many(rows, space, io) * np.where(pooled, 1.6, 1.1)

    def measure_each(self, networks: Any, passes: int | None = None) -> list[Latency | str]:
        self.measured += [network.architecture.id for network in networks]
        return [
            Latency(float(ms), 0.99 * float(ms), 1.01 * float(ms), "measured")
            for network in networks
            for ms in self.truth(SPACE.space.encode_many([network.architecture]), SPACE.space, SPACE.io)
        ]


SPACE = Problem(read_config(PLAIN, "test"))


def new_run(path: Path, manifest: dict[str, Any]) -> Any:
    return SimpleNamespace(path=path, manifest=manifest, update=lambda **facts: manifest.update(facts))


def carried_out(path: Path, strategy: Any, manifest: dict[str, Any], *, correct: bool = True):
    """A search as `Job` carries it out, with the looks in between or without."""
    latency = Flattering(SPACE)
    correcting = Correcting(new_run(path, manifest), SPACE, latency, lambda: False)
    space, io, counted = SPACE.space, SPACE.io, SpaceCosts(SPACE.space, SPACE.io)

    def cheap(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"latency_ms": latency.predict_many(rows, space, io)}

    def evaluated(architecture: Any) -> Outcome:
        row = space.encode_many([architecture])
        size = float(counted.of(row)["macs"][0])
        accuracy = 1 - 1 / (1 + size / 5e4) + 0.05 * ("pooling" in str(architecture))
        return Outcome({"accuracy": accuracy, "latency_ms": float(cheap(row)["latency_ms"][0])})

    with SearchStudy(path / "j", space, SPACE.objectives, strategy=strategy, cheap=cheap) as study:
        legs = correcting.legs(study.results.evaluated, 40, LocalEngine()) if correct else [40]
        for until in legs:
            with Session(study, Budget(trials=until)) as session:
                while proposals := session.next(1):
                    session.done(proposals[0], evaluated(proposals[0].architecture))
            if until < 40 and correcting.measure(study.results, until):
                study.cheap_changed()
        return study.results, correcting, latency


@pytest.mark.parametrize("strategy", [Predictor(candidates=200), NSGA2(population_size=8)], ids=["predictor", "nsga2"])
def test_what_looked_best_is_measured_and_the_rest_of_the_budget_knows(tmp_path, strategy):
    manifest: dict[str, Any] = {}
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    results, correcting, latency = carried_out(tmp_path / "with", strategy, manifest)
    assert results.evaluated == 40 and 0 < len(latency.measured) == len(set(latency.measured)) <= 16
    assert manifest["measured"]["after"] == 30 and len(manifest["measured"]["networks"]) == len(latency.measured)
    space, io = SPACE.space, SPACE.io
    rows = space.sample_many(300, np.random.default_rng(1))
    plain = Flattering(SPACE)

    def off(predicted: np.ndarray) -> float:
        return float(np.abs(np.log(predicted / plain.truth(rows, space, io))).mean())

    assert off(latency.predict_many(rows, space, io)) < 0.7 * off(plain.predict_many(rows, space, io))
    # the trials as they are believed now are nearer to the truth than as they were told
    done = [record for record in results.records if record.status == "done"]
    truth = plain.truth(space.encode_many([r.architecture for r in done]), space, io)
    now = {record.id: record for record in correcting.current(results).records}
    told = np.array([record.metrics["latency_ms"] for record in done])
    believed = np.array([now[record.id].metrics["latency_ms"] for record in done])
    assert np.abs(np.log(believed / truth)).mean() < np.abs(np.log(told / truth)).mean()
    for record in done:
        if record.id in latency.measured:
            assert now[record.id].metrics["latency_ms"] == correcting.measured[record.id].ms
    finalists = choose_finalists(correcting.current(results), 8)
    assert finalists and all(record.id in now for record in finalists)


def test_a_search_that_goes_on_predicts_as_before_and_looks_again_where_it_could_not(tmp_path):
    manifest: dict[str, Any] = {}
    _, _, latency = carried_out(tmp_path, Predictor(candidates=200), manifest)
    again = Flattering(SPACE)
    correcting = Correcting(new_run(tmp_path, manifest), SPACE, again, lambda: False)
    rows = SPACE.space.sample_many(50, np.random.default_rng(0))
    expected = latency.predict_many(rows, SPACE.space, SPACE.io)
    np.testing.assert_allclose(again.predict_many(rows, SPACE.space, SPACE.io), expected, rtol=1e-6)
    engine = LocalEngine()
    assert correcting.legs(30, 40, engine) == [40] and correcting.legs(31, 100, engine) == [50, 75, 100]
    fresh = Correcting(new_run(tmp_path, {}), SPACE, Flattering(SPACE), lambda: True)
    assert fresh.legs(0, 40, engine) == [20, 30, 40]
    assert fresh.legs(20, 40, engine) == [20, 30, 40]  # the look was due, and not taken
    assert fresh.legs(33, 40, engine) == [33, 40]
    assert fresh.legs(0, 40, RayEngine()) == [40]
    manifest["measured"] = {"after": 3, "networks": [{"architecture": {}}]}
    with pytest.raises(IntegrityError, match="what was measured cannot be read"):
        Correcting(new_run(tmp_path, manifest), SPACE, Flattering(SPACE), lambda: False)


def test_it_stops_before_it_measures(tmp_path):
    results, _, _ = carried_out(tmp_path, Predictor(candidates=200), {}, correct=False)
    stopped = Correcting(new_run(tmp_path, {}), SPACE, latency := Flattering(SPACE), lambda: True)
    with pytest.raises(StoppedEarly):
        stopped.measure(results, 40)
    assert latency.measured == []


def test_where_latency_is_measured_in_the_search_or_not_here_nothing_is_done(tmp_path):
    plain = PLAIN | {"objectives": {"accuracy": "max", "params": "min"}}
    problem = Problem(read_config(plain, "test"))
    correcting = Correcting(new_run(tmp_path, {}), problem, problem.latency(), lambda: False)
    assert not correcting.wanted and correcting.legs(0, 40, LocalEngine()) == [40] and correcting.measured == {}
