"""Multi-objective successive halving: ranks and contributions worked out by hand, and what a ladder costs."""

from __future__ import annotations

import itertools

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixnas.search.halving import Halving, best_first, promoted


def test_ranks_come_before_contributions():
    first = [(0.0, 3.0), (1.0, 1.0), (3.0, 0.0)]  # none dominates another
    second = [(1.0, 4.0), (2.0, 2.0)]  # each dominated by one or two of these
    third = [(5.0, 5.0)]
    points = np.array([*third, *second, *first])
    order = best_first(points)
    assert set(order[:3]) == {3, 4, 5} and set(order[3:5]) == {1, 2} and order[5] == 0
    assert promoted(points, 3) == [3, 4, 5]


def test_within_a_rank_the_least_contribution_goes_first():
    """In the unit square with the reference at (1.1, 1.1), the areas by hand.

    a and d are the best of an objective, and come first though a adds [0, 0.45] x [1, 1.1] = 0.045 alone. Of the others
    b adds [0.45, 0.5] x [0.5, 1] = 0.025, c [0.5, 0.6] x [0.45, 0.5] = 0.005 and e [0.6, 1] x [0.4, 0.45] = 0.02, so c
    goes. Then b adds 0.025 + 0.1 x 0.5 = 0.055 + ..., and e less.
    """
    a, b, c, e, d = (0.0, 1.0), (0.45, 0.5), (0.5, 0.45), (0.6, 0.4), (1.0, 0.0)
    assert best_first(np.array([a, b, c, e, d])) == [0, 4, 1, 3, 2]


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=7))
def test_the_order_is_that_of_the_definition(points):
    """Against the definition written down naively: peel fronts, then repeatedly drop the least contributor."""
    array = np.array(points, dtype=float)
    left, expected_ranks = set(range(len(points))), []
    while left:
        front = {
            i for i in left
            if not any((array[j] <= array[i]).all() and (array[j] < array[i]).any() for j in left)
        }  # fmt: skip
        expected_ranks.append(front)
        left -= front
    order = best_first(array)
    assert sorted(order) == list(range(len(points)))
    at = 0
    for front in expected_ranks:
        here = order[at : at + len(front)]
        assert set(here) == front
        at += len(front)
        low = array[list(front)].min(axis=0)
        extent = np.where(np.ptp(array[list(front)], axis=0) > 0, np.ptp(array[list(front)], axis=0), 1.0)
        scaled = (array - low) / extent

        def volume(some, scaled=scaled):
            return moocore.hypervolume(scaled[list(some)], ref=[1.1] * 3) if some else 0.0

        ends = []  # the best of each objective, of equally good ones by the other objectives in turn
        for first in range(3):
            others = [j for j in range(3) if j != first]
            ends.append(min(sorted(front), key=lambda i: (array[i, first], *array[i, others])))
        ends = list(dict.fromkeys(ends))
        assert here[: len(ends)] == ends
        for k in range(len(here) - 1, len(ends) - 1, -1):  # each that was dropped added least to those that stayed
            whole = volume(here[: k + 1])
            adds = {i: whole - volume([j for j in here[: k + 1] if j != i]) for i in here[len(ends) : k + 1]}
            assert adds[here[k]] <= min(adds.values()) + 1e-9


def test_what_has_no_number_comes_last_and_one_objective_is_a_sort():
    assert best_first(np.array([[np.nan, 0.0], [1.0, 1.0]])) == [1, 0]
    assert best_first(np.array([[3.0], [1.0], [2.0], [1.0]])) == [1, 3, 2, 0]
    assert best_first(np.zeros((0, 2))) == []


@pytest.mark.parametrize(
    ("rungs", "factor", "networks"), list(itertools.product([1, 2, 3, 4], [2.0, 3.0, 4.0], [1, 4, 10]))
)
def test_a_ladder_takes_no_longer_than_so_many_whole_trainings(rungs, factor, networks):
    ladder = Halving(rungs=rungs, factor=factor).ladder(networks)
    cost = sum(rung.candidates * (rung.until - rung.begun) for rung in ladder)
    counts = [rung.candidates for rung in ladder]
    assert len(ladder) == rungs and ladder[0].begun == 0 and ladder[-1].until == 1
    assert all(a.until == b.begun for a, b in itertools.pairwise(ladder))
    assert counts == sorted(counts, reverse=True) and counts[-1] >= max(1, round(0.6 * networks))
    assert cost <= networks + 1e-9
    if rungs > 1 and networks > 4:
        assert counts[0] > networks and cost > 0.85 * networks  # more are begun, and the time is used


def test_the_numbers_of_a_ladder():
    ladder = Halving(rungs=3, factor=3).ladder(10)
    assert [rung.candidates for rung in ladder] == [28, 13, 6]
    assert [rung.until for rung in ladder] == pytest.approx([1 / 9, 1 / 3, 1])
    # where there are no more candidates, more of them go on
    assert [rung.candidates for rung in Halving(rungs=2).ladder(10, available=5)] == [5, 5]
    few = Halving(rungs=2).ladder(10, available=12)
    assert few[0].candidates == 12 and 6 < few[1].candidates <= 10
    assert [rung.candidates for rung in Halving().ladder(10, available=4)] == [4]
