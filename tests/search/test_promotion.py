"""The rule of asynchronous halving, against the algorithm written down naively, over random streams of results."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixnas.search.halving import best_first
from mixnas.search.promotion import Asynchronous, Rungs
from mixnas.search_space.errors import ConfigError

VALUES = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(-2, 1))  # two objectives, and a miss above 0


def naive(history, gone, rungs, factor):
    """Algorithm 2 of Li et al. 2020, `get_job`, with the order of several objectives in the place of the loss's."""
    for rung in reversed(range(rungs - 1)):
        there = sorted(key for key, at in history if at == rung)
        kept = [key for key in there if history[key, rung][2] <= 0]
        missing = sorted((key for key in there if history[key, rung][2] > 0), key=lambda key: history[key, rung][2])
        order = [kept[i] for i in best_first(np.array([history[key, rung][:2] for key in kept]).reshape(-1, 2))]
        top = (order + missing)[: int(len(there) / factor)]
        promotable = [key for key in top if (key, rung) not in gone]
        if promotable:
            return promotable[0], rung
    return None


@given(st.data(), st.integers(2, 4), st.sampled_from([2, 3, 4]), st.integers(1, 4))
def test_whoever_goes_on_is_who_the_algorithm_says(data, rungs, factor, workers):
    """With several in flight, whose results come in any order."""
    rule, history, gone, flying, begun = Rungs(rungs, factor), {}, set(), [], 0
    for _ in range(data.draw(st.integers(1, 25))):
        while len(flying) < workers:
            expected = naive(history, gone, rungs, factor)
            assert rule.promotable() == expected
            if expected is None:
                flying.append((begun, 0))
                begun += 1
            else:
                rule.promote(*expected)
                gone.add(expected)
                flying.append((expected[0], expected[1] + 1))
        key, rung = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
        found = data.draw(VALUES)
        history[key, rung] = found
        rule.add(key, rung, np.array(found[:2]), float(max(found[2], 0)))
    for rung in range(1, rungs):  # nobody came anywhere but from below
        assert {key for key, at in history if at == rung} <= {key for key, at in history if at == rung - 1}


@given(st.lists(VALUES, min_size=1, max_size=20), st.randoms())
def test_the_order_in_which_results_came_decides_nothing(found, random):
    one, other = Rungs(2, 2), Rungs(2, 2)
    shuffled = list(enumerate(found))
    random.shuffle(shuffled)
    for rule, rows in ((one, enumerate(found)), (other, shuffled)):
        for key, (x, y, missed) in rows:
            rule.add(key, 0, np.array([x, y]), float(max(missed, 0)))
    taken = []
    while (both := (one.promotable(), other.promotable())) != (None, None):
        assert both[0] == both[1]
        one.promote(*both[0])
        other.promote(*both[0])
        taken.append(both[0][0])
    assert len(taken) == len(found) // 2


def test_who_breaks_a_constraint_goes_on_only_where_nobody_else_does():
    rule = Rungs(2, 2)
    for key, (x, y, missed) in enumerate([(0, 0, 2.0), (0, 0, 1.0), (5, 5, 0.0), (9, 9, 0.0)]):
        rule.add(key, 0, np.array([x, y], dtype=float), missed)
    taken = []
    while (found := rule.promotable()) is not None:
        rule.promote(*found)
        taken.append(found[0])
    assert taken == [2, 3]
    rule.add(4, 0, np.array([7.0, 7.0]), 3.0)
    rule.add(5, 0, np.array([7.0, 7.0]), 3.0)
    assert rule.promotable() == (1, 0)  # the one that misses by least


def test_at_the_end_each_rung_sends_one_on_and_a_failure_gives_its_place_away():
    rule = Rungs(3, 3)
    rule.add(0, 0, np.array([1.0, 1.0]))
    rule.add(1, 0, np.array([2.0, 2.0]))
    assert rule.promotable() is None and rule.promotable(last=True) == (0, 0)
    rule.promote(0, 0)
    assert rule.promotable(last=True) is None  # it is on its way
    rule.drop(0, 0)
    assert rule.promotable(last=True) == (1, 0)
    rule.promote(1, 0)
    rule.add(1, 1, np.array([2.0, 2.0]))
    assert rule.promotable(last=True) == (1, 1)


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=30), st.data())
def test_the_best_of_each_objective_goes_on_as_long_as_there_is_room(points, data):
    array = np.array(points, dtype=float)
    order = best_first(array)
    for objective in range(3):
        first = next(at for at, i in enumerate(order) if array[i, objective] == array[:, objective].min())
        assert first <= objective
    count = data.draw(st.integers(0, len(points)))
    assert best_first(array, count) == order[:count]


def test_where_rungs_end():
    assert Asynchronous(rungs=3).shares(270, 27) == pytest.approx((1 / 9, 1 / 3, 1))
    assert Asynchronous(epochs=1, factor=3).shares(270, 10) == pytest.approx((10 / 270, 30 / 270, 90 / 270, 1))
    assert Asynchronous(steps=30, factor=2).shares(100, 10) == pytest.approx((0.3, 0.6, 1))
    for halving in (Asynchronous(rungs=3), Asynchronous(epochs=2), Asynchronous(steps=7, factor=1.5)):
        for share, other in itertools.pairwise((0.0, *halving.shares(100, 7))):
            assert round(share * 100) == pytest.approx(share * 100) and share < other
    assert not Asynchronous().on and Asynchronous(steps=5).on


@pytest.mark.parametrize("halving", [Asynchronous(rungs=8), Asynchronous(steps=20), Asynchronous(epochs=9)])
def test_a_rung_without_a_step_of_its_own_is_refused(halving):
    with pytest.raises(ConfigError, match=r"^search\.halving: a training has 20 steps, and the rungs would end after "):
        halving.shares(20, 5)


def test_one_of_rungs_epochs_and_steps_is_given():
    with pytest.raises(ConfigError, match="epochs and rungs say where the first rung is"):
        Asynchronous(rungs=3, epochs=2)


def test_what_a_trial_costs():
    halving = Asynchronous(rungs=3, factor=3)
    assert halving.effort((1 / 9, 1 / 3, 1)) == pytest.approx(1 / 9 + (2 / 9) / 3 + (2 / 3) / 9)
    assert Asynchronous().effort((1.0,)) == 1
