"""Choosing a strategy by name, and a strategy of one's own that decides whole batches from cheap metrics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from optuna.trial import TrialState

from mixnas.search.config import SearchConfig, read_config
from mixnas.search.strategies import STRATEGIES, Strategy
from mixnas.search.strategies.drawing import BatchSampler
from mixnas.search.strategies.evolution import NSGA2
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.settings import build
from tests.contracts.strategy import StrategyContract, searched


def test_each_is_chosen_by_its_name():
    assert list(STRATEGIES) == ["auto", "gp", "linas", "nsga2", "nsga3", "predictor", "qnehvi", "random", "tpe"]
    for name in STRATEGIES:
        strategy = build(SearchConfig, {"strategy": name}, "x").strategy
        assert STRATEGIES.name_of(strategy) == name and strategy == Strategy.from_plain({"name": name}, "x")
    config = read_config({"search": {"strategy": {"name": "nsga2", "population_size": 50}}}, "test")
    assert config.search.strategy == NSGA2(population_size=50)
    assert read_config(config.to_plain(), "again") == config


def test_what_is_wrong_is_refused():
    def refused(search, match):
        with pytest.raises(ConfigError, match=match):
            read_config({"search": search}, "c.yaml")

    refused({"strategy": "nsga22"}, r"c\.yaml: search\.strategy: .*Did you mean 'nsga2'\? Allowed: auto, gp, linas")
    refused(
        {"strategy": {"name": "nsga2", "population_size": 1}}, r"search\.strategy: population_size: 1 is not allowed"
    )
    refused({"strategy": {"name": "random", "population_size": 9}}, "unknown key 'population_size'")
    refused({"strategy": 3}, "expected a name or {name")
    refused(
        {"population_size": 9},
        r"search\.population_size: .* has moved to its strategy: .*{name: nsga2, population_size",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cheapest(Strategy):
    """Of many random architectures those with the fewest parameters, as many as are asked for at once."""

    draws: int = 40

    def make(self, question, cheap, acceptable):
        return _Cheapest(question, cheap, acceptable, self.draws)


class _Cheapest(BatchSampler):
    def __init__(self, question, cheap, acceptable, draws):
        super().__init__(question, acceptable)
        self.cheap, self.draws, self.asked = cheap, draws, []

    def propose(self, study, count, rng):
        matrix = self._space.sample_many(self.draws, rng)
        order = np.argsort(self.cheap(matrix)["params"], kind="stable")
        found = {a.id: a for a in self._space.decode_many(matrix[order]) if self._acceptable(a)}
        return list(found.values())[:count] or [self._space.sample(rng)]


class TestCheapest(StrategyContract):
    @pytest.fixture
    def strategy(self):
        STRATEGIES.register("cheapest")(Cheapest)
        yield Cheapest()
        STRATEGIES.forget("cheapest")

    def test_a_batch_is_decided_together(self, strategy, tmp_path, monkeypatch):
        counts = []
        propose = _Cheapest.propose

        def watched(self, study, count, rng):
            counts.append((count, len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))))
            return propose(self, study, count, rng)

        monkeypatch.setattr(_Cheapest, "propose", watched)
        results = searched(tmp_path / "j", strategy, 18, batch=8)
        assert counts == [(8, 0), (8, 0), (2, 0)]  # no more than the budget allows
        drawn = searched(tmp_path / "random", STRATEGIES.read("random", "x"), 18)
        mean = [np.mean([r.metrics["params"] for r in each.records if r.evaluated]) for each in (results, drawn)]
        assert mean[0] < 0.5 * mean[1]
