from __future__ import annotations

import itertools

import numpy as np
import pytest

from mixnas.search.engines.engine import Budget, LocalEngine
from mixnas.search.strategies.samplers import STRATEGIES, ConditionalNSGAII, make_sampler
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.errors import ConfigError

QUICK = [name for name in STRATEGIES if name != "gp"]
EVOLUTIONARY = ["nsga2", "nsga3"]


def search(path, space, objectives, constraints, evaluator, trials, **options):
    with SearchStudy(path, space, objectives, constraints, **options) as study:
        LocalEngine().run(study, evaluator, Budget(trials=trials))
        return study.results


def ids(results):
    return [r.id for r in results.records if r.evaluated]


@pytest.mark.parametrize("strategy", QUICK)
def test_every_strategy_searches_resumes_and_never_repeats(
    tmp_path, strategy, space, objectives, constraints, evaluator
):
    path, arguments = tmp_path / "j", (space, objectives, constraints, evaluator)
    options = {"strategy": strategy, "seed": 3, "population_size": 8}
    first = search(path, *arguments, 13, **options)
    assert first.evaluated == 13
    results = search(path, *arguments, 18, **options)
    assert results.evaluated == 18 and results.counts["done"] == 18
    assert len(set(ids(results))) == 18
    assert ids(results)[:13] == ids(first)
    for record in results.records:
        assert space.contains(record.architecture) and record.architecture.id == record.id
        if record.evaluated:
            assert record.metrics == evaluator(record.architecture)


def test_gp_models_the_conditional_choices(tmp_path, tiny):
    objectives = parse_objectives({"params": "min"})

    def evaluator(architecture):
        return {"params": float(sum(stage.width * len(stage.blocks) for stage in architecture.stages))}

    results = search(tmp_path / "j", tiny, objectives, (), evaluator, 10, strategy="gp", seed=1)
    with SearchStudy(tmp_path / "j", tiny, objectives, strategy="gp", seed=1) as study:
        proposal = study.ask()
        names = set(study.optuna_study.trials[-1].params)
    assert len(set(ids(results))) == 10 and proposal.architecture.id not in ids(results)
    assert names == set(tiny.params_of(proposal.architecture))


@pytest.mark.parametrize("strategy", ["nsga2", "nsga3", "random"])
def test_stopping_and_resuming_changes_nothing(tmp_path, strategy, space, objectives, constraints, evaluator):
    options = {"strategy": strategy, "seed": 5, "population_size": 6}
    arguments = (space, objectives, constraints, evaluator)
    whole = search(tmp_path / "whole", *arguments, 30, **options)
    for trials in (4, 11, 17, 30):
        parts = search(tmp_path / "parts", *arguments, trials, **options)
    assert ids(parts) == ids(whole)
    other = search(tmp_path / "other", *arguments, 30, **{**options, "seed": 6})
    assert ids(other) != ids(whole)


@pytest.mark.parametrize("strategy", EVOLUTIONARY)
def test_conditional_choices_are_inherited(tmp_path, strategy, space, objectives, evaluator):
    """A child's choices come from its parents, those that exist only for some values of others included."""
    with SearchStudy(tmp_path / "j", space, objectives, strategy=strategy, population_size=10) as study:
        LocalEngine().run(study, evaluator, Budget(trials=10))
        parents = space.encode_many([r.architecture for r in study.results.records])
        optuna_study, sampler = study.optuna_study, study.optuna_study.sampler
        trial = optuna_study.ask()
        frozen = trial._cached_frozen_trial
        population = sampler.get_parent_population(optuna_study, sampler.get_trial_generation(optuna_study, frozen))
        assert len(population) == 10
        rng = np.random.default_rng(0)
        children = space.encode_many([sampler._child(population, optuna_study.directions, rng) for _ in range(200)])
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
    volumes = {"nsga2": [], "random": []}
    box = None
    for strategy, seed in itertools.product(volumes, range(4)):
        path = tmp_path / f"{strategy}-{seed}"
        results = search(path, space, objectives, (), evaluator, 120, strategy=strategy, seed=seed, population_size=10)
        box = box or results.reference
        front = np.array([results.values(record) for record in results.front()])
        volumes[strategy].append(box.hypervolume(front, objectives))
    assert np.mean(volumes["nsga2"]) > 1.02 * np.mean(volumes["random"])


def test_constraints_steer_the_search(tmp_path, space, objectives, evaluator):
    tight = parse_constraints(["params <= 2e3"])
    results = search(tmp_path / "j", space, objectives, tight, evaluator, 90, population_size=10)
    feasible = [results.feasible(r) for r in results.records]
    assert np.mean(feasible[-40:]) > np.mean(feasible[:20])
    assert all(results.feasible(r) for r in results.front())


def test_wrong_names(space):
    with pytest.raises(ConfigError, match=r"Did you mean 'nsga2'\? Allowed: nsga2, nsga3, tpe, gp, random"):
        make_sampler("nsga22", space)
    with pytest.raises(ConfigError, match="population_size"):
        make_sampler("nsga2", space, population_size=1)
    assert isinstance(make_sampler("nsga2", space), ConditionalNSGAII)
