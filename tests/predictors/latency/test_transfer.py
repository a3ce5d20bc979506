"""A new device from few measurements, and estimates from data sheets."""

import functools

import numpy as np
import pytest

from mixnas.predictors.latency.estimate import GPUS, estimate
from mixnas.predictors.latency.features import work_of
from mixnas.predictors.latency.fit import SpaceToFit, fit
from mixnas.predictors.latency.model import FitConfig
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.transfer import nearest_source, transfer, transfer_curve
from mixnas.predictors.measuring.measure import Window
from mixnas.predictors.measuring.table import MeasurementTable, subject
from mixnas.predictors.units import io_fields, key_to_plain, registry_size_after, walk
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import IOSpec
from mixnas.search_space.space import SearchSpace

PLAIN = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [
        {
            "width": [8, 16],
            "depth": [1, 2, 3],
            "block": {
                "mixer": ["identity", "pooling", {"name": "dwconv", "kernel_size": [3, 5]}],
                "channel_mixer": [{"name": "mlp", "expansion": [1, 2, 4]}, "swiglu"],
            },
        }
    ],
}
IO = IOSpec("image", (8, 8), 1, 10)


@functools.cache
def counted(key):
    return work_of(key, 1)


def unit_ms(key, pooling):
    """The truth about made-up devices: launches, arithmetic, and what pooling costs there."""
    work = counted(key)
    calls = sum(value for name, value in work.items() if name.endswith(".calls"))
    macs = sum(value for name, value in work.items() if name.endswith(".macs"))
    slow = pooling if key.role == "block" and key.op.mixer.name == "pooling" else 1.0
    return (0.004 * calls + 2e-7 * macs) * slow


def device(directory, name, num_networks, rng, *, speed=1.0, pooling=1.0):
    """A table of a made-up device, with 1% of noise."""
    directory.mkdir(exist_ok=True)
    table = MeasurementTable.create_or_open(directory, name, "eager", 1, 0.2)
    provenance = table.add_provenance({"device": name})
    space, fields = SearchSpace.from_dict(PLAIN), io_fields(IO)

    rows = []

    def add(what, latency):
        noisy = latency / speed * rng.lognormal(0, 0.01)
        rows.extend((what, Window(0, i, np.full(10, noisy * 1e6), 2e5, 2e5)) for i in range(3))

    truth = {key: unit_ms(key, pooling) for key in SpaceToFit.of(space, fields).keys}
    for key, latency in truth.items():
        add(subject("unit", key_to_plain(key), counted(key), 1), latency)
    encoded = np.unique(space.sample_many(2 * num_networks, rng), axis=0)
    for vector in rng.permutation(encoded)[:num_networks]:
        architecture = space.decode(vector)
        total = sum(truth[key] for _, key in walk(architecture, fields, registry_size_after))
        add(subject("network", {"architecture": architecture.to_dict(), "io": fields}, {}, 1), 1.1 * total)
    table.append(rows, provenance)
    return table


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    table = device(tmp_path_factory.mktemp("tables"), "cpu-old-1t", 60, np.random.default_rng(7))
    spaces = [SpaceToFit.of(SearchSpace.from_dict(PLAIN), io_fields(IO))]
    return fit(table, spaces, counted, FitConfig(num_trees=40))


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
    each = [again.predict(a).latency_ms for a in space.decode_many(encoded)]
    np.testing.assert_allclose(again.predict_many(encoded, space), each, rtol=1e-5)
    np.testing.assert_allclose(predictor.predict_many(encoded, space), each, rtol=1e-5)
    unseen = SearchSpace.from_dict({**PLAIN, "norm": "rms"}).sample(rng)
    assert again.predict(unseen).latency_ms == pytest.approx(predictor.predict(unseen).latency_ms)


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


def test_estimates_are_labelled_and_never_kept(tmp_path):
    space = SearchSpace.from_dict(PLAIN)
    architecture = space.sample(np.random.default_rng(0))
    slow = estimate("nvidia-t4", space, IO, batch_size=8, plain=PLAIN)
    answer = slow.predict(architecture)
    assert answer.estimate and answer.high_ms / answer.low_ms > 4 and sum(u.latency_ms for u in answer.units) > 0
    assert slow.stored_space(PLAIN) is slow.spaces[0]
    fast = estimate("nvidia-h200", space, IO, batch_size=8)
    assert fast.predict(architecture).latency_ms < answer.latency_ms
    with pytest.raises(ConfigError, match="not kept among the measured"):
        slow.save(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'nvidia-h200'"):
        estimate("nvidia-h20", space, IO)
    with pytest.raises(ConfigError, match="allowed are eager, graph"):
        estimate("nvidia-t4", space, IO, runtime="compiled")
    assert all(gpu.int8 > gpu.half > gpu.fp32 for gpu in GPUS.values())
