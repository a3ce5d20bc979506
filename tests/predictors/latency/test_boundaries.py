"""What the change of a policy between neighbours adds: counted along a network, found by a fit, kept in a file."""

from __future__ import annotations

import numpy as np
import pytest

from mixnas.predictors.latency.boundaries import Boundaries, boundaries_of, policies_in
from mixnas.predictors.latency.features import Works
from mixnas.predictors.latency.fit import fit
from mixnas.predictors.latency.lookup import SpaceTable, SpaceUnits
from mixnas.predictors.latency.model import Composition
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.measuring.measure import Window
from mixnas.predictors.measuring.table import MeasurementTable, subject
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import plan

from .spaces import IMAGE, SPACES

MIXED = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [
        {
            "width": [8, 16],
            "depth": [1, 2, 3],
            "block": {
                "mixer": ["identity", "attention"],
                "channel_mixer": [{"name": "mlp", "expansion": [1, 2]}],
                "quant": {"mixer": ["fp32", "w8a8", "bf16"], "channel_mixer": ["fp32", "w8a8", "bf16"]},
            },
        }
    ],
}


def network(*quants: tuple[str, str], recursion: int = 1) -> Architecture:
    """Blocks by the policies of their two branches."""
    blocks = [
        {
            "mixer": "attention",
            "channel_mixer": "mlp",
            "quant": {"mixer": token, "channel_mixer": channel},
            "recursion": recursion,
        }
        for token, channel in quants
    ]
    return Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "blocks": blocks}]})


def test_each_change_is_counted_where_it_is_entered():
    boundaries = Boundaries(("bf16", "fp32", "w8a8"), np.array([1.0, 10.0, 100.0]))

    def counted(*quants, recursion=1):
        planned = plan(network(*quants, recursion=recursion), IMAGE)
        assert sum(boundaries.walk(planned)) == boundaries.counts(planned) @ boundaries.ms
        return boundaries.counts(planned).tolist()

    assert counted(("fp32", "fp32")) == [0, 0, 0]
    assert counted(("w8a8", "w8a8"), ("w8a8", "w8a8")) == [0, 1, 1]  # in, and out to the head
    assert counted(("w8a8", "fp32"), ("w8a8", "bf16")) == [1, 2, 2]
    assert counted(("w8a8", "bf16"), recursion=3) == [1, 1, 1]  # a block that recurs once
    planned = plan(network(("w8a8", "fp32")), IMAGE)
    assert list(boundaries.walk(planned)) == [0, 100, 10, 0]  # stem, token, channel, head
    few = Boundaries(("fp32",), np.array([10.0]))
    assert few.counts(planned).tolist() == [1] and list(few.walk(planned)) == [0, 0, 10, 0]


@pytest.mark.parametrize("name", SPACES)
def test_lookups_are_the_sum_over_a_networks_boundaries(name):
    plain, io = SPACES[name]
    space = SearchSpace.from_dict(plain)
    of = SpaceUnits(space, io)
    rng = np.random.default_rng(0)
    policies = policies_in(of.units)
    nothing = np.zeros((len(of.units), 0), dtype=bool)
    unit_ms = rng.uniform(0.1, 1, len(of.units))
    encoded = space.sample_many(300, np.random.default_rng(1))
    for known in (policies, policies[:1]):
        boundaries = Boundaries(tuple(known), rng.uniform(1, 2, len(known)))
        plainly = SpaceTable(of, unit_ms, nothing, np.empty((0, 0))).predict_many(encoded)
        found = SpaceTable(of, unit_ms, nothing, np.empty((0, 0)), boundaries).predict_many(encoded)
        added = [sum(boundaries.walk(plan(space.decode(vector), io))) for vector in encoded]
        np.testing.assert_allclose(found - plainly, added, atol=1e-3)
    if name == "tricky":
        assert max(added) > 0


def test_a_fit_recovers_what_a_boundary_adds():
    rng = np.random.default_rng(0)
    unit_ms, settings = rng.uniform(0.1, 0.5, 40), np.zeros((40, 0))
    has = np.zeros((40, 0), dtype=bool)
    counts = rng.multinomial(6, np.full(40, 1 / 40), size=300).astype(float)
    entered = rng.integers(0, 4, (300, 3)).astype(float)
    exact = counts @ (1.1 * unit_ms) + entered @ [0.1, 0.0, 0.03]
    latency = exact * np.exp(rng.normal(0, 0.01, 300))
    fitted = Composition.fit(counts[:200], unit_ms, settings, has, latency[:200], entered=entered[:200])
    np.testing.assert_allclose(fitted.boundary_ms, [0.1, 0.0, 0.03], atol=0.01)
    found = fitted.network_ms(counts[200:], fitted.apply(unit_ms, settings), has, entered[200:])
    assert np.abs(found / exact[200:] - 1).mean() < 0.01


def test_a_device_on_which_changes_cost_is_predicted_with_that_term(tmp_path):
    """A made-up one: every change takes a tenth of a millisecond, beside a network of some two."""
    space, works = SearchSpace.from_dict(MIXED), Works()
    known = SpaceUnits(space, IMAGE)
    rng = np.random.default_rng(0)
    truth = {unit: 0.004 * sum(v for k, v in works.of(unit).items() if k.endswith(".calls")) for unit in known.units}
    costly = Boundaries(("bf16", "fp32", "w8a8"), np.array([0.1, 0.1, 0.1]))
    table = MeasurementTable.create_or_open(tmp_path, "made-up", "eager", 1, 0.2)
    rows = []

    def add(what, ms):
        rows.extend((what, Window(0, i, np.full(10, ms * rng.lognormal(0, 0.005) * 1e6), 2e5, 2e5)) for i in range(3))

    for unit, ms in truth.items():
        add(subject("unit", unit.to_plain(), works.of(unit), 1), ms)

    def exactly(architecture):
        planned = plan(architecture, IMAGE)
        return sum(truth[unit] for _, unit in planned) + sum(costly.walk(planned))

    encoded = np.unique(space.sample_many(400, rng), axis=0)
    architectures = [space.decode(vector) for vector in rng.permutation(encoded)]
    for architecture in architectures[:200]:
        config = {"architecture": architecture.to_dict(), "io": IMAGE.to_plain()}
        add(subject("network", config, {}, 1), exactly(architecture))
    table.append(rows, table.add_provenance({"device": "made-up"}))
    predictor = fit(table, [known], works)
    assert predictor.meta["policies"] == ["bf16", "fp32", "w8a8"]
    again = LatencyPredictor.open(predictor.save(tmp_path))
    unseen = architectures[200:260]
    for architecture in unseen:
        found = again.predict(architecture, IMAGE)
        assert found.latency.ms == pytest.approx(exactly(architecture), rel=0.05)
        changes = costly.counts(plan(architecture, IMAGE)).sum()
        assert found.boundaries_ms == pytest.approx(0.1 * changes, abs=0.02 + 0.01 * changes)
        assert sum(unit.latency_ms for unit in found.units) == pytest.approx(found.latency.ms)
    together = again.predict_many(space.encode_many(unseen), space, IMAGE)
    np.testing.assert_allclose(together, [again.predict(a, IMAGE).latency.ms for a in unseen], rtol=1e-5)


def test_a_predictor_of_before_has_no_such_term():
    none = boundaries_of((), np.empty(0))
    assert none.counts(plan(network(("w8a8", "fp32")), IMAGE)).shape == (0,)
    assert boundaries_of(("fp32", "bf16"), np.empty(0)).policies == ()
