"""What every strategy keeps to. A test class inherits it and gives the fixture `strategy`."""

from __future__ import annotations

import pytest

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.strategies import Strategy
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.results import Results
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.space import SearchSpace
from tests.contracts.engine import carry_out
from tests.search.problems import SPACE, TINY, FromFunction, analytic, cheap_of

OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})


def searched(path, strategy: Strategy, trials: int, *, objectives=OBJECTIVES, constraints=(), plain=SPACE, **options):
    """The results of a search for the made-up metrics; `params` is known beforehand."""
    space = SearchSpace.from_dict(plain)
    batch = options.pop("batch", 1)
    cheap = cheap_of(space, analytic, "params")
    with SearchStudy(path, space, objectives, constraints, strategy=strategy, cheap=cheap, **options) as study:
        carry_out(LocalEngine(batch=batch), study, FromFunction(analytic), Budget(trials=trials))
        return study.results


def ids(results: Results) -> list[str]:
    return [record.id for record in results.records if record.evaluated]


class StrategyContract:
    """See the module."""

    trials = 30
    """Long enough that the strategy is past its random start."""

    plain = SPACE
    """The space that it searches."""

    same_after_a_stop = True
    """Whether a search that was stopped goes on exactly as it would have, rather than with other new trials."""

    def test_it_never_repeats_and_stays_in_the_space(self, strategy, tmp_path):
        results = searched(tmp_path / "j", strategy, self.trials, plain=self.plain, seed=3)
        assert len(set(ids(results))) == results.evaluated == results.counts["done"] == self.trials
        space = SearchSpace.from_dict(self.plain)
        for record in results.records:
            assert space.contains(record.architecture) and record.architecture.id == record.id

    def test_it_stays_within_constraints_that_are_known_beforehand(self, strategy, tmp_path):
        limit = parse_constraints(["params <= 3e3"])
        results = searched(tmp_path / "j", strategy, self.trials, plain=self.plain, constraints=limit)
        evaluated = [record for record in results.records if record.evaluated]
        assert len(evaluated) == self.trials
        assert all(record.metrics["params"] <= 3e3 for record in evaluated)

    def test_stopping_and_resuming_repeats_nothing_and_loses_nothing(self, strategy, tmp_path):
        whole = searched(tmp_path / "whole", strategy, self.trials, plain=self.plain, seed=5)
        for trials in (4, self.trials // 2, self.trials):
            parts = searched(tmp_path / "parts", strategy, trials, plain=self.plain, seed=5)
        assert len(set(ids(parts))) == self.trials
        if self.same_after_a_stop:
            assert ids(parts) == ids(whole)
        other = searched(tmp_path / "other", strategy, self.trials, plain=self.plain, seed=6)
        assert ids(other) != ids(whole)

    def test_the_same_seed_gives_the_same_trials(self, strategy, tmp_path):
        first, second = (searched(tmp_path / name, strategy, self.trials, plain=self.plain, seed=7) for name in "ab")
        assert ids(first) == ids(second)

    @pytest.mark.parametrize("direction", ["max", "min"])
    def test_it_maximises_and_minimises_one_objective(self, strategy, tmp_path, direction):
        results = searched(
            tmp_path / "j",
            strategy,
            self.trials,
            plain=self.plain,
            objectives=parse_objectives({"accuracy": direction}),
        )
        best = (max if direction == "max" else min)(r.metrics["accuracy"] for r in results.records if r.evaluated)
        assert [record.metrics["accuracy"] for record in results.front()] == [best]

    def test_conditional_choices_are_searched(self, strategy, tmp_path):
        """A trial holds the choices that its architecture has, and others have others."""
        space = SearchSpace.from_dict(self.plain)
        cheap = cheap_of(space, analytic, "params")
        with SearchStudy(tmp_path / "j", space, OBJECTIVES, strategy=strategy, seed=2, cheap=cheap) as study:
            carry_out(LocalEngine(), study, FromFunction(analytic), Budget(trials=self.trials))
            held = [(trial.params, study.results.records[trial.number]) for trial in study.optuna_study.trials]
        assert len({frozenset(params) for params, _ in held}) > 3
        for params, record in held:
            assert params == space.params_of(record.architecture)

    def test_a_space_is_searched_to_its_last_architecture(self, strategy, tmp_path):
        results = searched(tmp_path / "j", strategy, 1000, plain=TINY)
        assert len(set(ids(results))) == results.evaluated == SearchSpace.from_dict(TINY).size()

    @pytest.mark.parametrize(("widths", "depths"), [([16], [1]), ([16, 24], [1]), ([16, 24, 32], [1, 2, 3])])
    def test_a_space_of_less_than_any_first_points_is_searched_and_ends(self, strategy, tmp_path, widths, depths):
        """One architecture, without a choice; two, of which no model is made; and nine."""
        block = {"mixer": "dwconv", "channel_mixer": "mlp"}
        plain = {**TINY, "stages": [{"width": widths, "depth": depths, "block": block}]}
        results = searched(tmp_path / "j", strategy, 50, plain=plain)
        assert len(set(ids(results))) == results.evaluated == len(widths) * len(depths)

    def test_several_may_be_in_flight(self, strategy, tmp_path):
        results = searched(tmp_path / "j", strategy, self.trials, plain=self.plain, batch=5)
        assert len(set(ids(results))) == results.evaluated == self.trials

    def test_its_options_are_read_and_written(self, strategy):
        assert Strategy.from_plain(strategy.to_plain(), "test") == strategy
