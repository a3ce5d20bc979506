"""Fitting on a made-up device, whose truth is known."""

import numpy as np
import pytest

from mixnas.predictors.latency.fit import Networks, fit
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import FitConfig
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.space import SearchSpace

from .devices import IO, PLAIN, WORKS, device, unit_ms

SPACE = SearchSpace.from_dict(PLAIN)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return device(tmp_path_factory.mktemp("tables"), "cpu-old-1t", 60, np.random.default_rng(7))


def test_a_made_up_device_is_recovered(table):
    """Units, and what a network adds to them: errors are those of the measurements, one percent."""
    found = fit(table, [SpaceUnits(SPACE, IO)], WORKS, FitConfig(num_trees=40))
    assert found.accuracy["mape_percent"] < 2 and found.accuracy["kendall_tau"] > 0.95
    assert {"role=token", "role=channel", "mixer=pooling", "width"} <= set(found.meta["categories"])
    assert "channel_mixer=mlp" in found.meta["operators"] and "norm=layer" not in found.meta["operators"]
    for unit in found.profiled.units:
        row = found.profiled.units.find(unit)
        assert found.profiled.measured[row]
        assert found.profiled.in_network_ms[row] == pytest.approx(1.1 * unit_ms(unit, 1.0), rel=0.15)


def test_units_that_nobody_measured_are_predicted(tmp_path):
    partly = device(tmp_path, "cpu-old-1t", 60, np.random.default_rng(7), share=0.75)
    found = fit(partly, [SpaceUnits(SPACE, IO)], WORKS, FitConfig(num_trees=40))
    unmeasured = np.flatnonzero(~found.profiled.measured)
    alone = found.profiled.alone_ms[unmeasured]
    truth = [unit_ms(unit, 1.0) for unit in found.profiled.units.take(unmeasured)]
    assert len(unmeasured) >= 4 and np.median(np.abs(alone / truth - 1)) < 0.1
    assert found.accuracy["mape_percent"] < 4


def test_networks_are_counted_in_units(table):
    networks = Networks.of(table)
    assert networks.counts.shape == (60, len(networks.units)) and networks.judging.all()
    first = next(what for what in table.subjects.values() if what.kind == "network")
    blocks = sum(len(stage["blocks"]) for stage in first.config["architecture"]["stages"])
    assert networks.counts[0].sum() == 2 + 2 * blocks


def test_too_few_networks_name_the_setting(tmp_path):
    few = device(tmp_path, "cpu-old-1t", 5, np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"5 measured networks; a fit needs 12\..*`latency\.profile`"):
        fit(few, [], WORKS)
