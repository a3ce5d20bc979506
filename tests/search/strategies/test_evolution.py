from __future__ import annotations

import itertools

import numpy as np
import pytest

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.strategies.evolution import NSGA2, NSGA3
from mixnas.search.strategies.random import Random
from mixnas.search.study.objectives import parse_constraints
from mixnas.search.study.study import SearchStudy
from tests.contracts.engine import carry_out
from tests.contracts.strategy import StrategyContract


class TestNSGA2(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return NSGA2(population_size=6)


class TestNSGA3(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return NSGA3(population_size=6)


def search(path, space, objectives, constraints, evaluator, trials, **options):
    with SearchStudy(path, space, objectives, constraints, **options) as study:
        carry_out(LocalEngine(), study, evaluator, Budget(trials=trials))
        return study.results


@pytest.mark.parametrize("strategy", [NSGA2(population_size=10), NSGA3(population_size=10)], ids=["nsga2", "nsga3"])
def test_conditional_choices_are_inherited(tmp_path, strategy, space, objectives, evaluator):
    """A child's choices come from its parents, those that exist only for some values of others included."""
    with SearchStudy(tmp_path / "j", space, objectives, strategy=strategy) as study:
        carry_out(LocalEngine(), study, evaluator, Budget(trials=10))
        parents = space.encode_many([r.architecture for r in study.results.records])
        optuna_study, sampler = study.optuna_study, study.optuna_study.sampler
        trial = optuna_study.ask()
        frozen = trial._cached_frozen_trial
        population = sampler.get_parent_population(optuna_study, sampler.get_trial_generation(optuna_study, frozen))
        assert len(population) == 10
        rng = np.random.default_rng(0)
        decoded = [space.from_params(parent.params) for parent in population]
        made = [sampler._child(population, decoded, optuna_study.directions, rng) for _ in range(200)]
        children = space.encode_many(made)
    changed = [min(int(((c != p) & (c >= 0) & (p >= 0)).sum()) for p in parents) for c in children]
    assert np.mean(changed) < 4
    deepest = [i for i, v in enumerate(space.variables) if v.name.startswith("stages.0.blocks.2.mixer.")]
    assert any((parents[:, i] >= 0).any() for i in deepest)
    for i in deepest:
        seen, inherited = set(parents[:, i]) - {-1}, children[:, i][children[:, i] >= 0]
        if seen and len(inherited) > 20:
            assert np.isin(inherited, list(seen)).mean() > 0.6


def test_evolution_beats_random(tmp_path, space, objectives, evaluator):
    """Mean over seeds of the hypervolume, all in one box; a fixed outcome, since every draw is seeded."""
    strategies = {"nsga2": NSGA2(population_size=10), "random": Random()}
    volumes = {"nsga2": [], "random": []}
    box = None
    for name, seed in itertools.product(volumes, range(4)):
        path = tmp_path / f"{name}-{seed}"
        results = search(path, space, objectives, (), evaluator, 120, strategy=strategies[name], seed=seed)
        box = box or results.reference
        front = np.array([results.values(record) for record in results.front()])
        volumes[name].append(box.hypervolume(front, objectives))
    assert np.mean(volumes["nsga2"]) > 1.02 * np.mean(volumes["random"])


def test_constraints_steer_the_search(tmp_path, space, objectives, evaluator):
    tight = parse_constraints(["params <= 2e3"])
    strategy = NSGA2(population_size=10)
    results = search(tmp_path / "j", space, objectives, tight, evaluator, 90, strategy=strategy)
    feasible = [results.feasible(r) for r in results.records]
    assert np.mean(feasible[-40:]) > np.mean(feasible[:20])
    assert all(results.feasible(r) for r in results.front())
