"""The unit model and the composition, on made-up devices whose truth is known."""

import numpy as np
import pytest

from mixnas.predictors.latency.model import (
    LEAST_SHARE,
    Columns,
    Composition,
    FitConfig,
    UnitModel,
    blend,
    conformal_quantile,
)
from mixnas.predictors.latency.trees import Trees
from mixnas.search_space.errors import ConfigError


def test_trees_are_scikit_learns():
    from sklearn.ensemble import GradientBoostingRegressor

    rng = np.random.default_rng(0)
    x, unseen = rng.normal(size=(200, 6)), rng.normal(size=(600, 6))
    y = x[:, 0] * x[:, 1] + np.abs(x[:, 2])
    trees = Trees.fit(x, y, num_trees=50, depth=3, rate=0.1, subsample=0.7, seed=3)
    theirs = GradientBoostingRegressor(
        n_estimators=50, max_depth=3, learning_rate=0.1, subsample=0.7, min_samples_leaf=2, random_state=3
    ).fit(x, y)
    np.testing.assert_allclose(trees.predict(unseen), theirs.predict(unseen), rtol=1e-9, atol=1e-12)
    back = Trees.from_arrays(trees.to_arrays("t"), "t")
    np.testing.assert_array_equal(back.predict(unseen), trees.predict(unseen))


def made_up(count, rng):
    works, settings, truth = [], [], []
    for _ in range(count):
        calls, macs, wide = rng.integers(2, 20), rng.uniform(1e4, 1e6), rng.integers(0, 2)
        works.append({"matmul.calls": float(calls), "matmul.macs": macs, "matmul.bytes": macs / 10})
        settings.append({"mixer=dwconv" if wide else "mixer=attention": 1.0, "width": float(rng.choice([16, 32]))})
        truth.append((calls * 0.005 + macs * 2e-7) * (1.2 if wide else 0.9))
    return Columns.of(works), Columns.of(settings), np.array(truth)


def test_physics_and_trees_recover_a_device():
    rng = np.random.default_rng(0)
    works, settings, truth = made_up(300, rng)
    model = UnitModel.fit(works, settings, truth * np.exp(rng.normal(0, 0.01, 300)), FitConfig())
    unseen, unseen_settings, unseen_truth = made_up(200, rng)
    assert (model.coefficients >= 0).all()
    assert np.abs(model.predict(unseen, unseen_settings) / unseen_truth - 1).mean() < 0.03
    assert 0.005 < model.spread < 0.06
    # The physical model carries on where trees cannot: a tenth of the work of anything measured, and ten times it.
    for factor in (0.1, 10):
        scaled, same = (
            Columns(unseen.names, unseen.values[:1] * factor),
            Columns(unseen_settings.names, unseen_settings.values[:1]),
        )
        ratio = model.predict(scaled, same)[0] / unseen_truth[0]
        assert ratio == pytest.approx(factor, rel=0.4)


def test_what_nobody_measured_is_not_free():
    works, settings, truth = made_up(100, np.random.default_rng(0))
    model = UnitModel.fit(works, settings, truth, FitConfig(num_trees=5))
    renamed = Columns(tuple(name.replace("matmul", "new_kernel") for name in works.names), works.values)
    ratio = model.physical(renamed) / model.physical(works)
    assert np.abs(np.log(ratio)).max() < 0.5
    assert model.physical(Columns.of([{"view.calls": 9.0}]))[0] < truth.min() / 100


def test_what_lies_outside_is_said():
    works, settings, truth = made_up(50, np.random.default_rng(0))
    model = UnitModel.fit(works, settings, truth, FitConfig())
    assert model.outside({"mixer=dwconv": 1.0, "width": 24.0}) == []
    assert model.outside({"mixer=dwconv": 1.0, "width": 64.0}) == ["width 64 is outside 16 to 32"]
    assert model.outside({"mixer=new": 1.0, "width": 16.0}) == ["mixer new was not measured"]


def test_too_few_units():
    with pytest.raises(ConfigError, match=r"5 measured units are too few to fit, which takes 8.*`latency\.profile`"):
        UnitModel.fit(*made_up(5, np.random.default_rng(0)), FitConfig())


def test_composition_recovers_what_a_network_adds():
    rng = np.random.default_rng(0)
    unit_ms = rng.uniform(0.1, 0.5, 40)
    settings = rng.integers(0, 2, (40, 3)).astype(float)
    truth = unit_ms * (1.1 + settings @ [0.05, -0.05, 0.1]) + 0.01
    counts = rng.multinomial(6, np.full(40, 1 / 40), size=300).astype(float)
    has = settings.astype(bool) & (rng.random((40, 3)) < 0.3)
    exact = counts @ truth + ((counts @ has) > 0) @ np.array([0.2, 0.0, 0.1])
    latency = exact * np.exp(rng.normal(0, 0.01, 300))
    composition = Composition.fit(counts[:200], unit_ms, settings, has, latency[:200])
    predicted = composition.network_ms(counts[200:], composition.apply(unit_ms, settings), has)
    assert np.abs(predicted / exact[200:] - 1).mean() < 0.01
    np.testing.assert_allclose(composition.presence_ms, np.diag([0.2, 0.0, 0.1]), atol=0.03)


@pytest.mark.parametrize("seed", range(20))
def test_few_networks_on_a_restless_machine_give_no_unit_a_negative_time(seed):
    rng = np.random.default_rng(seed)
    unit_ms = rng.uniform(0.01, 0.5, 40)
    settings = rng.integers(0, 2, (40, 6)).astype(float)
    counts = rng.multinomial(5, np.full(40, 1 / 40), size=12).astype(float)
    latency = counts @ unit_ms * np.exp(rng.normal(0, 0.8, 12))
    composition = Composition.fit(counts, unit_ms, settings, settings > 0, latency)
    assert (composition.apply(unit_ms, settings) > 0).all()


def test_composition_recovers_what_two_operators_share():
    rng = np.random.default_rng(0)
    unit_ms = rng.uniform(0.1, 0.5, 40)
    has = rng.random((40, 3)) < 0.15
    counts = rng.multinomial(6, np.full(40, 1 / 40), size=300).astype(float)
    present = (counts @ has) > 0
    exact = counts @ unit_ms + present @ [0.3, 0.3, 0.1] - 0.25 * (present[:, 0] & present[:, 1])
    latency = exact * np.exp(rng.normal(0, 0.01, 300))
    composition = Composition.fit(counts[:200], unit_ms, np.zeros((40, 0)), has, latency[:200])
    expected = [[0.3, -0.125, 0.0], [-0.125, 0.3, 0.0], [0.0, 0.0, 0.1]]
    np.testing.assert_allclose(composition.presence_ms, expected, atol=0.03)
    predicted = composition.network_ms(counts[200:], composition.apply(unit_ms, np.zeros((40, 0))), has)
    assert np.abs(predicted / exact[200:] - 1).mean() < 0.01


def test_blend_trusts_the_surer():
    predicted, measured = np.array([1.0, 1.0, 1.0]), np.array([2.0, 2.0, np.nan])
    blended = blend(predicted, measured, 0.1, np.array([0.001, 10.0, np.inf]))
    assert blended == pytest.approx([2.0, 1.0, 1.0], rel=1e-3)


def test_conformal_coverage():
    rng = np.random.default_rng(0)
    covered = [
        np.mean(rng.exponential(size=50) <= conformal_quantile(rng.exponential(size=99), 0.9)) for _ in range(400)
    ]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.01)
    assert conformal_quantile(np.ones(5), 0.9) == np.inf


def test_columns_keep_only_what_is_named():
    assert Columns.of([{"a": 1.0, "c": 3.0}, {}]).select(["a", "b"]).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_columns_add_up():
    parts = [[{"a": 1.0}, {"a": 2.0, "b": 1.0}], [{}, {"b": 10.0, "c": 5.0}]]
    found = Columns.summed(parts, np.array([[0, 1], [1, 1], [1, 0]]))
    assert found.names == ("a", "b", "c")
    assert found.values.tolist() == [[1, 10, 5], [2, 11, 5], [2, 1, 0]]


def test_no_network_takes_no_time_or_less():
    """From few networks on a restless machine, a regression may say so; a network takes a share of its units then."""
    less = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        unit_ms, settings = rng.uniform(0.1, 1.0, 8), np.eye(8)
        has = settings > 0
        counts = rng.integers(0, 3, (30, 8)) + np.eye(8)[rng.integers(0, 8, 30)]
        latency = counts @ unit_ms * np.exp(rng.normal(0, 1.5, 30))
        free = Composition.fit(counts[:10], unit_ms, settings, has, latency[:10])
        in_network_ms = free.apply(unit_ms, settings)
        found = free.network_ms(counts, in_network_ms, has)
        assert (found >= LEAST_SHARE * (counts @ in_network_ms)).all() and (found > 0).all()
        less += bool((found == LEAST_SHARE * (counts @ in_network_ms)).any())
        kept = Composition.fit(counts[:10], unit_ms, settings, has, latency[:10], unseen=counts[10:])
        in_network_ms = kept.apply(unit_ms, settings)
        assert (kept.network_ms(counts, in_network_ms, has) > LEAST_SHARE * (counts @ in_network_ms)).all()
    assert less, "nothing was asked of it"
