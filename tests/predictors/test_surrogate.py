"""Surrogates: the masked encoding, made-up metrics, and the published tables where they are."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixnas.predictors.encoding import ChoiceEncoding, MaskedEncoding
from mixnas.predictors.surrogate import (
    Surrogate,
    SurrogateConfig,
    _least_squares,
    _stacked,
    _surely_better,
    _weights,
    rank_correlation,
)
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.files import load_yaml
from mixnas.search_space.space import SearchSpace

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
VALUES = [("a", "b", "c"), (1, 2, 4), (True, False), (16, 32)]


@given(st.lists(st.tuples(*[st.integers(-1, len(v) - 1) for v in VALUES]), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_inactive_choices_carry_nothing(rows):
    encoded = np.array(rows)
    encoding = MaskedEncoding(VALUES)
    x = encoding(encoded)
    groups = np.array(encoding.group)
    for v in range(len(VALUES)):
        assert (x[encoded[:, v] < 0][:, groups == v] == 0).all()
    active = [row for row in rows if -1 not in row]
    assert len({tuple(r) for r in encoding(np.array(active, dtype=int).reshape(-1, 4)).tolist()}) == len(set(active))


def test_distances_of_the_encoding():
    x = MaskedEncoding(VALUES)(np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0]]))
    assert ((x - x[0]) ** 2).sum(1) == pytest.approx([0, 1, 1, 0.25])


@pytest.mark.parametrize("encoded", [np.zeros((2, 3), int), np.full((2, 4), 3), np.full((2, 4), -2)])
def test_vectors_of_another_space_are_refused(encoded):
    with pytest.raises(ConfigError):
        MaskedEncoding(VALUES)(encoded)


def test_what_is_there_and_what_is_counted():
    encoding = ChoiceEncoding([("a", "b"), ("a", "b"), (1, 2, 4)], [False, True, False])
    rows = np.array([[0, 0, 0], [0, 1, 0], [0, -1, 0], [1, 0, 0], [0, 0, 2]])
    x = encoding.choices(rows)
    assert ((x - x[0]) ** 2).sum(1) == pytest.approx([0, 1, 1, 1, 1])  # another value, none, another variable
    counts = encoding.counts(rows)
    np.testing.assert_allclose(counts[1], counts[3])  # the same operators in another order
    random = encoding.counts(np.random.default_rng(0).integers(0, 2, (4000, 3)))
    assert ((random[::2] - random[1::2]) ** 2).sum(1).mean() == pytest.approx(1, abs=0.1)


def test_of_many_numbers_the_mean_is_counted():
    encoding = ChoiceEncoding([tuple(range(10))] * 3)
    rows = np.random.default_rng(0).integers(0, 10, (4000, 3))
    counts = encoding.counts(rows)
    assert counts.shape == (4000, 1)
    assert np.corrcoef(counts[:, 0], rows.mean(axis=1))[0, 1] == pytest.approx(1)
    assert ((counts[::2] - counts[1::2]) ** 2).mean() == pytest.approx(1, abs=0.1)


@pytest.fixture(scope="module")
def conditional():
    plain = {
        "stem": "conv",
        "stages": [
            {
                "width": [8, 16, 32],
                "depth": [1, 2],
                "block": {
                    "mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5, 7]}],
                    "channel_mixer": [{"name": "mlp", "expansion": [1, 2]}, "swiglu"],
                },
            }
        ],
    }
    space = SearchSpace.from_dict(plain)
    encoded = np.unique(space.sample_many(700, np.random.default_rng(0)), axis=0)
    rng = np.random.default_rng(1)
    encoded = rng.permutation(encoded)
    weights = rng.normal(size=len(space.variables))
    truth = np.tanh((np.maximum(encoded, 0) * weights).sum(1) / 2) * 5 + 90
    return [v.values for v in space.variables], encoded, truth


@pytest.mark.parametrize("model", ["gp", "svr", "ridge"])
def test_a_made_up_metric_is_learned(conditional, model):
    values, encoded, truth = conditional
    surrogate = Surrogate.fit(values, encoded[:150], truth[:150], SurrogateConfig(models=(model,)))
    mean, deviation = surrogate.predict(encoded[150:])
    assert surrogate.chosen.startswith(model) and set(surrogate.scores) == {model, f"{model}-ranks"}
    assert rank_correlation(mean, truth[150:]) > 0.9
    assert (deviation > 0).all() and (np.abs(mean - truth[150:]) < 1.645 * deviation).mean() > 0.75


def test_where_one_model_is_right_it_has_the_weight(conditional):
    """Of a metric that is linear in its choices, and noisy, nothing but the linear model knows more than noise."""
    values, encoded, _ = conditional
    rng = np.random.default_rng(2)
    linear = MaskedEncoding(values)(encoded) @ rng.normal(size=len(MaskedEncoding(values).group))
    noisy = linear + 0.2 * linear.std() * rng.normal(size=len(linear))
    surrogate = Surrogate.fit(values, encoded[:100], noisy[:100])
    assert surrogate.weights["ridge"] >= 0.7 and sum(surrogate.weights.values()) == pytest.approx(1)
    assert set(surrogate.weights) <= {"gp", "svr", "ridge"}
    assert rank_correlation(surrogate.predict(encoded[100:])[0], linear[100:]) > 0.97


def test_the_average_has_to_beat_the_linear_model_by_a_standard_error():
    rng = np.random.default_rng(0)
    y, own, common = rng.normal(size=(3, 60))
    near = {"gp": y + 0.99 * own + 0.1 * common, "ridge": y + own}  # a little better, by less than errors scatter
    found = _stacked(np.stack([*near.values()], axis=1), y, 0)
    assert found[0] > 0.7
    np.testing.assert_allclose(_weights(near, y, 0), 0.3 * found + [0, 0.7])
    better = {"gp": y + 0.3 * common, "ridge": y + own}
    weights = _weights(better, y, 0)
    np.testing.assert_allclose(weights, _stacked(np.stack([*better.values()], axis=1), y, 0))
    assert weights[0] > 0.8 and weights.sum() == pytest.approx(1)
    np.testing.assert_array_equal(_weights({"gp": better["gp"], "svr": better["ridge"]}, y, 0), weights)
    near_in_value, right_in_order = y + 0.2 * common, y**3
    assert _surely_better(near_in_value, y + own, y) and _surely_better(right_in_order, y + 9 * own, y)
    assert not _surely_better(near_in_value, right_in_order, y)
    assert not _surely_better(right_in_order, near_in_value, y)


def test_weights_are_those_of_the_least_squared_error():
    rng = np.random.default_rng(0)
    y = rng.normal(size=300)
    error = rng.normal(size=300)
    held_out = np.stack([y + error, y + 2 * rng.normal(size=300), y + 3 * error], axis=1)
    found = _least_squares(held_out, y)
    assert found.sum() == pytest.approx(1) and found[2] == 0
    assert found[:2] == pytest.approx([0.8, 0.2], abs=0.08)  # as the inverse of the variance of the errors
    share = np.linspace(0, 1, 1001)[:, None]
    errors = ((share * held_out[:, 0] + (1 - share) * held_out[:, 1] - y) ** 2).mean(axis=1)
    assert found[0] == pytest.approx(share[errors.argmin(), 0], abs=1e-3)
    np.testing.assert_allclose(_stacked(held_out, y, 0), found, atol=0.03)  # of many rows resamples say the same
    assert _stacked(np.zeros((5, 2)), np.zeros(5), 0).sum() == pytest.approx(1)


def test_a_linear_change_of_units_changes_the_units_only(conditional):
    values, encoded, truth = conditional
    config = SurrogateConfig(models=("svr",))
    first = Surrogate.fit(values, encoded[:60], truth[:60], config).predict(encoded)
    second = Surrogate.fit(values, encoded[:60], 1000 * truth[:60] - 7, config).predict(encoded)
    np.testing.assert_allclose(second[0], 1000 * first[0] - 7, rtol=1e-6)
    np.testing.assert_allclose(second[1], 1000 * first[1], rtol=1e-4)


def test_a_constant_metric(conditional):
    values, encoded, _ = conditional
    mean, deviation = Surrogate.fit(values, encoded[:20], np.full(20, 0.5)).predict(encoded)
    assert mean == pytest.approx(0.5) and np.isfinite(deviation).all()


def test_what_cannot_be_fitted(conditional):
    values, encoded, truth = conditional
    with pytest.raises(ConfigError, match="4 or more"):
        Surrogate.fit(values, encoded[:3], truth[:3])
    with pytest.raises(ConfigError, match="finite"):
        Surrogate.fit(values, encoded[:5], np.array([1, 2, np.nan, 3, 4]))
    with pytest.raises(ConfigError, match="allowed are"):
        Surrogate.fit(values, encoded[:5], truth[:5], SurrogateConfig(models=("forest",)))


def read_table(name, metric):
    described = load_yaml(DATA / f"{name}.yaml")
    with open(DATA / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    values, columns = [], []
    for knob, options in described["knobs"].items():
        cells = [row[knob] for row in rows]
        numeric = options == ["numeric"]
        levels = sorted({float(c) for c in cells if c}) if numeric else [str(option) for option in options]
        values.append(levels)
        columns.append([-1 if not c else levels.index(float(c) if numeric else c) for c in cells])
    return values, np.array(columns).T, np.array([float(row[metric]) for row in rows])


@pytest.mark.skipif(not DATA.is_dir(), reason="the published tables are not beside this checkout (../shared/data)")
@pytest.mark.parametrize(
    ("name", "metric", "least"),
    [
        ("nb201-12ep", "cifar100_val", 0.7),
        ("nas-bench-macro", "cifar10_test", 0.95),
        ("hat-wmt14ende_cpu_xeon", "latency_ms", 0.95),
    ],
)
def test_published_tables(name, metric, least):
    values, encoded, truth = read_table(name, metric)
    order = np.random.default_rng(0).permutation(len(truth))
    seen, unseen = order[:200], order[200:1200]
    surrogate = Surrogate.fit(values, encoded[seen], truth[seen])
    mean, deviation = surrogate.predict(encoded[unseen])
    assert rank_correlation(mean, truth[unseen]) > least
    assert 0.75 < (np.abs(mean - truth[unseen]) < 1.645 * deviation).mean() <= 1
