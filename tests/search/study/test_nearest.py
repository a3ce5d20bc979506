"""What a check of the constraints says is possible, every strategy finds; what is not is refused before any work."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixnas.evaluators.costs import SpaceCosts
from mixnas.search.config import read_config
from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.problem import Problem
from mixnas.search.strategies import STRATEGIES, Strategy
from mixnas.search.study.feasibility import quickest
from mixnas.search.study.meeting import nearest
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.errors import InfeasibleError
from mixnas.search_space.files import parse_yaml
from mixnas.search_space.reporting import SILENT
from mixnas.search_space.space import SearchSpace
from tests.contracts.engine import carry_out
from tests.search.problems import TINY, FromFunction, cheap_of

DIGITS = parse_yaml((Path(__file__).parents[3] / "configs" / "digits.yaml").read_text())
LATENCY = "latency_ms@cpu-intel-xeon-6-167-1t"  # a predictor that ships: nothing is measured
SMALL = {"linas": {"name": "linas", "population_size": 10, "generations": 5}}
MISSING = {"qnehvi"} if importlib.util.find_spec("botorch") is None else set()
STRATEGY_NAMES = sorted({*STRATEGIES} - {"auto"} - MISSING)


def digits(*constraints: str) -> tuple[Problem, Any]:
    """The embedded digits under constraints, checked as a job does before anything is trained; and what is cheap."""
    plain = {
        "task": "digits",
        "space": DIGITS["space"],
        "objectives": {"accuracy": "max", "params": "min", LATENCY: "min"},
        "constraints": list(constraints),
        "search": {"evaluator": "standalone"},
    }
    problem = Problem(read_config(plain, "test"))
    latency = problem.latency()
    cheap = problem.evaluator(latency).cheap
    problem.check_latency(latency, SILENT, lambda: False, cheap)
    return problem, cheap


@cache
def least(metric: str) -> float:
    """Of the whole space: exact for a count, by descent for a latency."""
    problem, cheap = digits()
    if metric != LATENCY:
        return problem.corners[metric]["smallest"].value
    found = quickest(problem.space, lambda rows: cheap(rows)[LATENCY])
    return float(cheap(found[None])[LATENCY][0])


@cache
def checked(metric: str) -> tuple[Problem, Any]:
    """Under a bound that is met so rarely that no draw comes upon it."""
    problem, cheap = digits(f"{metric} <= {least(metric) * 1.015:.15g}")
    drawn = cheap(problem.space.sample_many(2000, np.random.default_rng(0)))
    assert not problem.constraints[0].hold(drawn[metric]).any()
    return problem, cheap


@pytest.mark.parametrize("metric", ["params", "macs", LATENCY])
@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_a_bound_just_above_the_least_possible_is_met_by_every_strategy(tmp_path, strategy, metric):
    """`params <= 570` was called impossible after the training; the smallest network has 562."""
    problem, cheap = checked(metric)

    def evaluated(architecture: Any) -> dict[str, float]:
        metrics = {name: float(v[0]) for name, v in cheap(problem.space.encode_many([architecture])).items()}
        return {**metrics, "accuracy": 0.5}

    options = {
        "strategy": Strategy.from_plain(SMALL.get(strategy, strategy), "test"),
        "cheap": cheap,
        "extremes": problem.extremes,
    }
    with SearchStudy(tmp_path / "j", problem.space, problem.objectives, problem.constraints, **options) as study:
        carry_out(LocalEngine(), study, FromFunction(evaluated), Budget(trials=1))
        done = [record for record in study.results.records if record.evaluated]
    assert done and all(problem.constraints[0].holds(record.metrics) for record in done)


@pytest.mark.parametrize("metric", ["params", "macs", LATENCY])
def test_a_bound_just_below_the_least_possible_is_refused_before_any_work(metric):
    bound = f"{metric} < {least(metric):.17g}"
    with pytest.raises(InfeasibleError, match=metric) as raised:
        digits(bound)
    assert "widen the space" in str(raised.value)
    problem, _ = digits(f"{metric} <= {least(metric):.17g}")
    assert problem.extremes


def test_bounds_that_each_can_be_kept_and_not_both_are_refused_with_the_nearest():
    """The quickest is not the dearest: what no check of one bound tells."""
    dearest = digits()[0].corners["params"]["largest"].value
    bounds = f"params >= {dearest * 0.9:.0f}", f"{LATENCY} <= {least(LATENCY) * 1.1:.15g}"
    for bound in bounds:
        digits(bound)
    with pytest.raises(InfeasibleError) as raised:
        digits(*bounds)
    message = str(raised.value)
    assert "that were looked at none meets params >= " in message and " together: the nearest has params " in message


def test_a_study_by_itself_finds_the_smallest_and_ends_after_it(tmp_path):
    """Without anybody's check: from random architectures down to the one that there is, and then it says so."""
    problem, _ = digits()
    costs = SpaceCosts(problem.space, problem.io)
    limit = parse_constraints([f"params <= {least('params'):.0f}"])
    objectives = parse_objectives({"params": "min"})
    with SearchStudy(tmp_path / "j", problem.space, objectives, limit, cheap=costs.of) as study:
        proposals = [study.ask()]
    assert costs.of(problem.space.encode_many([proposals[0].architecture]))["params"][0] == least("params")


def test_what_is_taken_is_passed_over_until_none_is_left():
    problem, _ = digits()
    costs = SpaceCosts(problem.space, problem.io)
    limit = parse_constraints(["params <= 600"])
    seen: set[bytes] = set()
    first = problem.space.encode_many([problem.corners["params"]["smallest"].architecture])
    for _ in range(5):
        found = nearest(problem.space, costs.of, limit, first, lambda row: row.tobytes() in seen)
        assert found.kept and found.values["params"] <= 600 and found.vector.tobytes() not in seen
        seen.add(found.vector.tobytes())


def test_a_message_names_the_nearest_and_what_to_do(tmp_path):
    """It never comes from draws alone: a small space was looked at to its last architecture."""
    tiny = SearchSpace.from_dict(TINY)

    def size(architecture: Any) -> dict[str, float]:
        return {"params": float(architecture.stages[0].width * len(architecture.stages[0].blocks))}

    sizes = [size(architecture)["params"] for architecture in tiny.decode_many(tiny.every())]
    limit, cheap = parse_constraints([f"params < {min(sizes):.0f}"]), cheap_of(tiny, size, "params")
    with (
        SearchStudy(tmp_path / "j", tiny, parse_objectives({"params": "min"}), limit, cheap=cheap) as study,
        pytest.raises(InfeasibleError) as raised,
    ):
        study.ask()
    message = str(raised.value)
    assert message.startswith(f"of all {tiny.size()} architectures of the space none meets {limit[0]}: the nearest has")
    assert f"params {min(sizes):.0f}: " in message and message.endswith("or widen the space.")
