from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixnas.search.study.objectives import Objective
from mixnas.search.study.pareto import Reference, as_minimised, boxes_above, knee, non_dominated
from mixnas.search.study.results import Results, TrialRecord


@st.composite
def problems(draw, min_points=0):
    directions = draw(st.lists(st.sampled_from(["max", "min"]), min_size=1, max_size=4))
    objectives = [Objective(f"m{i}", direction) for i, direction in enumerate(directions)]
    # few different values, so that ties and equal points are common
    value = st.sampled_from([-3.0, -1.0, 0.0, 0.1, 0.5, 1.0, 2.0, 1e6])
    rows = draw(st.lists(st.tuples(*[value] * len(objectives)), min_size=min_points, max_size=25))
    return np.array(rows, dtype=float).reshape(-1, len(objectives)), objectives


def dominates(a, b):
    return bool((a <= b).all() and (a < b).any())


@given(problems())
def test_front_is_what_the_definition_says(problem):
    values, objectives = problem
    mask, points = non_dominated(values, objectives), as_minimised(values, objectives)
    for i, member in enumerate(mask):
        if member:
            assert not any(dominates(points[j], points[i]) for j in range(len(points)))
            assert not any((points[j] == points[i]).all() for j in range(i))
        else:
            assert any(dominates(points[j], points[i]) or (points[j] == points[i]).all() for j in np.flatnonzero(mask))


@given(problems())
def test_the_front_kept_trial_by_trial_is_the_front(problem):
    values, objectives = problem
    results = Results(objectives)
    for i, row in enumerate(values):
        metrics = {o.name: v for o, v in zip(objectives, row, strict=True)}
        results.add(TrialRecord(i, "done", id=str(i), metrics=metrics))
    assert sorted(r.number for r in results.front()) == np.flatnonzero(non_dominated(values, objectives)).tolist()
    if len(values):
        assert results.knee() in results.front()


@settings(max_examples=50)
@given(problems(min_points=1), st.integers(0, 2**32))
def test_hypervolume_against_counting_random_points(problem, seed):
    values, objectives = problem
    reference = Reference.of(values, objectives)
    points = as_minimised(values, objectives)
    corner = as_minimised(np.array(reference.point), objectives)[0]
    assert (points < corner).all()
    drawn = corner - np.random.default_rng(seed).random((4000, len(objectives))) * np.array(reference.span)
    share = np.mean([(points <= x).all(axis=1).any() for x in drawn])
    assert reference.hypervolume(values, objectives) == pytest.approx(share, abs=0.05)


@given(problems(min_points=2))
def test_hypervolume_never_falls(problem):
    values, objectives = problem
    reference = Reference.of(values[: len(values) // 2 + 1], objectives)
    volumes = [reference.hypervolume(values[: i + 1], objectives) for i in range(len(values))]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(volumes))
    assert reference.hypervolume(values[:0], objectives) == 0


def test_reference_is_fixed_by_the_first_ten_trials():
    objectives = [Objective("accuracy", "max"), Objective("latency_ms", "min")]
    results = Results(objectives)
    for i in range(30):
        results.add(TrialRecord(i, "done", metrics={"accuracy": i / 10, "latency_ms": 1.0 + i}))
        assert (results.reference is None) == (i < 9)
        assert (results.hypervolume() is None) == (i < 9)
    assert results.reference.point == pytest.approx((0 - 0.09, 10 + 0.9))


def test_knee():
    objectives = [Objective("accuracy", "max"), Objective("latency_ms", "min")]
    front = np.array([[0.99, 10.0], [0.97, 2.0], [0.5, 1.0]])
    assert knee(front, objectives) == 1
    assert knee(front[:1], objectives) == 0


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_the_boxes_above_a_front_are_what_a_point_can_add(dimensions, tied):
    rng = np.random.default_rng(dimensions)
    reference = np.full(dimensions, 0.9)
    for count in (0, 1, 6, 20):
        front = rng.random((count, dimensions))
        front = np.round(front * 4) / 4 if tied else front
        lower, upper = boxes_above(front, reference)
        points = rng.random((500, dimensions))
        inside = ((points[:, None] > lower) & (points[:, None] < upper)).all(axis=2).sum(axis=1)
        dominated = (front[None] <= points[:, None]).all(axis=2).any(axis=1)
        assert (inside == (~dominated & (points < reference).all(axis=1))).all()  # each in one box, or in none


def test_a_point_with_nan_is_never_non_dominated_and_dominates_none():
    objectives = [Objective("accuracy", "max"), Objective("ms", "min")]
    values = np.array([[np.nan, 0.1], [0.9, 2.0], [0.8, np.nan], [0.7, 3.0], [0.5, 1.0]])
    assert non_dominated(values, objectives).tolist() == [False, True, False, False, True]
    assert non_dominated(values[:, :1], objectives[:1]).tolist() == [False, True, False, False, False]
    assert not non_dominated(np.full((2, 2), np.nan), objectives).any()
    records = [
        TrialRecord(i, "done", f"{i:012d}", "{}", {"accuracy": accuracy, "ms": ms})
        for i, (accuracy, ms) in enumerate(values)
    ]
    assert {record.number for record in Results(objectives, (), records).front()} == {1, 4}


def test_a_reference_point_of_0_has_no_sign():
    flat = Reference.of(np.array([[1.0]]), [Objective("accuracy", "max")])
    assert math.copysign(1, flat.point[0]) == 1 and flat.point == (0.0,)
