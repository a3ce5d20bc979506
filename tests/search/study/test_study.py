from __future__ import annotations

import csv
import io
import json

import numpy as np
import optuna
import pytest

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.strategies.evolution import NSGA2, NSGA3
from mixnas.search.strategies.random import Random
from mixnas.search.strategies.tpe import TPE
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.reading import read_results, summary_of, summary_path
from mixnas.search.study.study import SearchStudy, SpaceExhausted
from mixnas.search_space.errors import ConfigError, InfeasibleError
from tests.contracts.engine import carry_out
from tests.search.problems import FromFunction, analytic, cheap_of


def searched(study, function, trials):
    return carry_out(LocalEngine(), study, FromFunction(function), Budget(trials=trials))


def test_a_trial_holds_everything(tmp_path, space, objectives, constraints):
    path = tmp_path / "j"
    with SearchStudy(path, space, objectives, constraints) as study:
        proposal = study.ask()
        record = study.tell(proposal, {**analytic(proposal.architecture), "macs": 12}, 1.5)
        trial = study.optuna_study.trials[0]
    assert trial.user_attrs["id"] == proposal.architecture.id
    assert trial.user_attrs["architecture"] == proposal.architecture.to_json()
    assert trial.user_attrs["metrics"]["macs"] == 12 and trial.user_attrs["seconds"] == 1.5
    assert trial.params == space.params_of(proposal.architecture)
    results = read_results(path, objectives, constraints)
    assert results.records == [record] and results.records[0].architecture == proposal.architecture


def test_a_space_is_evaluated_to_the_last_architecture(tmp_path, tiny, objectives):
    """Where every result is the same, too, so that survivors are chosen among equals."""
    equal = {"accuracy": 0.5, "latency_ms": 1.0, "params": 1.0}
    with SearchStudy(tmp_path / "j", tiny, objectives, strategy=NSGA3(population_size=4)) as study:
        finish = searched(study, lambda a: equal, 1000)
        assert finish.reason == "exhausted" and str(tiny.size()) in finish.message
        evaluated = [r.id for r in study.results.records if r.evaluated]
        assert len(evaluated) == len(set(evaluated)) == tiny.size()
        with pytest.raises(SpaceExhausted):
            study.ask()


def _metrics(architecture):
    width, depth = architecture.stages[0].width, len(architecture.stages[0].blocks)
    return {"accuracy": 1 - 1 / (width + depth), "latency_ms": float(depth), "params": float(width * depth)}


def test_duplicates_are_pruned_and_do_not_count(tmp_path, tiny, objectives):
    class Stubborn(optuna.samplers.RandomSampler):
        """Proposes one and the same architecture for ever."""

        def sample_independent(self, study, trial, param_name, param_distribution):
            return param_distribution.choices[0]

    with SearchStudy(tmp_path / "j", tiny, objectives) as study:
        study.optuna_study.sampler = Stubborn()
        searched(study, _metrics, 3)
        records = study.results.records
        assert study.results.evaluated == 3
        assert [r.status for r in records] == ["done", *["duplicate"] * 20, "done", *["duplicate"] * 20, "done"]
        trials = study.optuna_study.trials
        assert trials[1].state == optuna.trial.TrialState.PRUNED and trials[1].user_attrs["duplicate_of"] == 0


def test_what_is_known_to_be_infeasible_is_not_evaluated(tmp_path, tiny, objectives):
    evaluated = []

    def evaluator(architecture):
        evaluated.append(architecture)
        return _metrics(architecture)

    limit = parse_constraints(["params <= 20"])
    cheap = cheap_of(tiny, _metrics, "params")
    with SearchStudy(tmp_path / "j", tiny, objectives, limit, cheap=cheap) as study:
        finish = searched(study, evaluator, 50)
        assert finish.reason == "exhausted" and len(evaluated) == 2
        assert all(_metrics(a)["params"] <= 20 for a in evaluated)
    nothing = parse_constraints(["params <= 20", "params > 20"])
    with (
        SearchStudy(tmp_path / "k", tiny, objectives, nothing, cheap=cheap) as study,
        pytest.raises(InfeasibleError, match=r"none meets params <= 20, params > 20 together: the nearest has params"),
    ):
        study.ask()


def test_the_one_architecture_that_keeps_the_constraints_is_found(tmp_path, space, objectives):
    """One of some 100,000: it is hardly ever drawn, and a search was refused for it."""
    limit = parse_constraints(["macs <= 0"])

    def far(architecture):
        return {"macs": float((space.encode(architecture) != space.encode(wanted)).sum())}

    wanted = space.sample(np.random.default_rng(77))
    with SearchStudy(tmp_path / "j", space, objectives, limit, cheap=cheap_of(space, far, "macs")) as study:
        assert study.ask().architecture == wanted


def test_what_a_killed_process_left_running_is_marked_and_may_be_evaluated_again(tmp_path, tiny, objectives):
    path = tmp_path / "j"
    with SearchStudy(path, tiny, objectives) as study:
        left = study.ask()
    with SearchStudy(path, tiny, objectives) as study:
        assert [(r.status, r.failure, r.id) for r in study.results.records] == [
            ("interrupted", "interrupted", left.architecture.id)
        ]
        searched(study, _metrics, 1000)
        assert study.results.counts["done"] == tiny.size()


def test_other_objectives_are_refused(tmp_path, space, objectives):
    SearchStudy(tmp_path / "j", space, objectives).close()
    for other in ({"accuracy": "max", "params": "min"}, {"latency_ms": "min", "accuracy": "max", "params": "min"}):
        with pytest.raises(ConfigError, match="has the objectives"):
            SearchStudy(tmp_path / "j", space, parse_objectives(other))
        with pytest.raises(ConfigError, match="has the objectives"):
            read_results(tmp_path / "j", parse_objectives(other))


def test_one_objective(tmp_path, space):
    objectives = parse_objectives({"accuracy": "max"})
    for strategy in (NSGA2(), TPE(), Random()):
        with SearchStudy(tmp_path / type(strategy).__name__, space, objectives, strategy=strategy) as study:
            searched(study, analytic, 15)
            best = max(r.metrics["accuracy"] for r in study.results.records if r.status == "done")
            assert [r.metrics["accuracy"] for r in study.results.front()] == [best]


def test_the_hypervolume_box_survives_a_resume(tmp_path, space, objectives, constraints):
    path = tmp_path / "j"
    with SearchStudy(path, space, objectives, constraints) as study:
        searched(study, analytic, 25)
        box, volume = study.results.reference, study.results.hypervolume()
    with SearchStudy(path, space, objectives, constraints) as study:
        assert (study.results.reference, study.results.hypervolume()) == (box, volume)
    assert read_results(path, objectives, constraints).reference == box


def test_tables(tmp_path, space, objectives, constraints):
    with SearchStudy(tmp_path / "j", space, objectives, constraints) as study:
        searched(study, analytic, 20)
        results = study.results
    rows = list(csv.DictReader(io.StringIO(results.to_csv())))
    assert [row["id"] for row in rows] == [r.id for r in results.records]
    front = results.front()
    assert {row["id"] for row in rows if row["pareto"] == "True"} == {record.id for record in front}
    assert [json.loads(row["architecture"]) for row in rows] == [r.architecture.to_dict() for r in results.records]
    assert results.knee() in front
    accuracies = [record.metrics["accuracy"] for record in front]
    assert accuracies == sorted(accuracies, reverse=True)


def test_what_is_queued_is_marked_and_left_out_of_the_summary(tmp_path, tiny, objectives):
    path = tmp_path / "j"
    with SearchStudy(path, tiny, objectives) as study:
        searched(study, _metrics, 3)
        first = [record.architecture for record in study.results.records if record.evaluated]
        wanted = [a for a in study.space.neighbours(first[0]) if a not in first][:2]
        assert study.queue([first[0], *wanted]) == len(wanted) > 0
        searched(study, _metrics, 3 + len(wanted))
        assert study.results.queued == len(wanted) and study.results.evaluated == 3 + len(wanted)
    results = read_results(path, objectives)
    assert {r.id for r in results.records if r.queued} == {a.id for a in wanted} and results.queued == len(wanted)
    assert summary_of(path, objectives).counts["done"] == 3
    summary_path(path).unlink()
    assert summary_of(path).counts["done"] == summary_of(path, objectives).counts["done"] == 3
    with SearchStudy(path, tiny, objectives) as study:
        assert study.results.queued == len(wanted)
