"""A new device from few measurements."""

import numpy as np
import pytest

from mixnas.predictors.latency.estimate import estimate
from mixnas.predictors.latency.fit import fit
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import FitConfig
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.transfer import nearest_source, transfer, transfer_curve
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.space import SearchSpace

from .devices import IO, PLAIN, WORKS, device


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    table = device(tmp_path_factory.mktemp("tables"), "cpu-old-1t", 60, np.random.default_rng(7))
    return fit(table, [SpaceUnits(SearchSpace.from_dict(PLAIN), IO)], WORKS, FitConfig(num_trees=40))


def another_device(directory, count, rng):
    return device(directory, "cpu-other-1t", count, rng, speed=2.0, pooling=1.6)


def test_transfer_learns_the_difference(source, tmp_path):
    rng = np.random.default_rng(0)
    table = another_device(tmp_path, 90, rng)
    curve = transfer_curve(table, source, [4, 16, 48], 6, rng)
    assert curve[0]["mape_percent"] > curve[-1]["mape_percent"] < 2
    with pytest.raises(ConfigError, match="none to judge"):
        transfer_curve(table, source, [90], 1, rng)
    predictor = transfer(table, source)
    assert predictor.device == "cpu-other-1t" and predictor.accuracy["mape_percent"] < 2
    predictor.save(tmp_path)
    again = LatencyPredictor.load("cpu-other-1t", directory=tmp_path)
    assert again.meta["transferred_from"] == f"{source.device} (eager)"
    space = again.spaces[0].space
    encoded = space.sample_many(50, rng)
    each = [again.predict(a).latency.ms for a in space.decode_many(encoded)]
    np.testing.assert_allclose(again.predict_many(encoded, space), each, rtol=1e-5)
    np.testing.assert_allclose(predictor.predict_many(encoded, space), each, rtol=1e-5)
    unseen = SearchSpace.from_dict({**PLAIN, "norm": "rms"}).sample(rng)
    assert again.predict(unseen).latency.ms == pytest.approx(predictor.predict(unseen).latency.ms)


def test_the_nearest_source_is_taken(source, tmp_path):
    table = another_device(tmp_path, 30, np.random.default_rng(1))
    space = source.spaces[0].space
    far = estimate("nvidia-t4", space, IO)
    assert nearest_source(table, [far, source]) is source
    with pytest.raises(ConfigError, match="no device to transfer from"):
        nearest_source(table, [])


def test_too_few_networks(source, tmp_path):
    table = another_device(tmp_path, 3, np.random.default_rng(2))
    with pytest.raises(ConfigError, match="needs 4"):
        transfer(table, source)
