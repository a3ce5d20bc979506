"""From measuring to a query, for real on a tiny space; then the file of the predictor."""

import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from mixnas.predictors.latency.features import count_work, deployed_unit, example_input, work_of
from mixnas.predictors.latency.model import FitConfig
from mixnas.predictors.latency.predictor import LatencyPredictor, installed, summary
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring import device
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.predictors.units import io_fields, registry_size_after, walk
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.network import IOSpec, unit_cost
from mixnas.search_space.space import SearchSpace

PLAIN = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [
        {
            "width": [8, 16],
            "depth": [1, 2],
            "block": {
                "mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}],
                "gate": ["none", "se"],
                "channel_mixer": {"name": "mlp", "expansion": [1, 2, 4]},
            },
        }
    ],
}
IO = IOSpec("image", (8, 8), 1, 10)
QUICK = ProfileConfig(
    budget_s=60.0,  # never reached: all units and these networks are measured before
    max_networks=24,
    measure=MeasureConfig(passes=2, window_ms=0.5, sentinel_repeats=4, max_extra_passes=1),
    fit=FitConfig(num_trees=40),
)


@pytest.fixture(scope="module")
def space():
    return SearchSpace.from_dict(PLAIN)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, space):
    directory = tmp_path_factory.mktemp("tables")
    return directory, profile(space, IO, device="cpu", directory=directory, config=QUICK, plain=PLAIN)


def test_counted_work_agrees_with_the_exact_count(space):
    import torch

    encoded = space.sample_many(20, np.random.default_rng(0))
    from mixnas.search_space.network import Unit

    for architecture in space.decode_many(encoded):
        for _, key in walk(architecture, io_fields(IO), registry_size_after):
            work = count_work(deployed_unit(key), example_input(key, 1, torch.Generator()))
            macs = sum(value for name, value in work.items() if name.endswith(".macs"))
            assert macs == unit_cost(Unit("", *key)).macs
            assert work == work_of(key, 1)


def test_predictions_order_networks(profiled, space):
    _, predictor = profiled
    assert predictor.meta["num_units"] >= 8 and predictor.meta["num_networks"] >= 12
    cheap = space.from_params(_params(space, width=8, depth=1, mixer="identity", expansion=1))
    dear = space.from_params(_params(space, width=16, depth=2, mixer="dwconv", expansion=4))
    low, high = predictor.predict(cheap), predictor.predict(dear)
    assert low.latency_ms < high.latency_ms
    for answer in (low, high):
        assert answer.low_ms < answer.latency_ms < answer.high_ms and answer.outside == ()
        assert sum(unit.latency_ms for unit in answer.units) == pytest.approx(answer.latency_ms)
    assert [unit.name for unit in high.units] == ["stem", "stages.0.blocks.0", "stages.0.blocks.1", "head"]


def _params(space, *, width, depth, mixer, expansion):
    answers = {"width": width, "depth": depth, "mixer": mixer, "expansion": expansion, "kernel_size": 5, "gate": "none"}
    return {v.name: answers[v.name.split(".")[-1]] for v in space.variables}


def test_many_are_each(profiled, space):
    _, predictor = profiled
    encoded = space.sample_many(100, np.random.default_rng(0))
    single = [predictor.predict(architecture).latency_ms for architecture in space.decode_many(encoded)]
    np.testing.assert_allclose(predictor.predict_many(encoded, space), single, rtol=1e-5)


def test_outside_is_reported_and_widens(profiled, space):
    _, predictor = profiled
    plain = {
        "stem": {"name": "conv", "stride": 2},
        "stages": [{"width": 64, "block": {"mixer": "pooling", "channel_mixer": {"name": "mlp", "expansion": 2}}}],
    }
    other = SearchSpace.from_dict(plain)
    answer = predictor.predict(other.single())
    assert any("mixer pooling was not measured" in text for text in answer.outside)
    assert any("width 64 is outside" in text for text in answer.outside)
    inside = predictor.predict(space.sample(np.random.default_rng(0)))
    assert answer.high_ms / answer.low_ms > inside.high_ms / inside.low_ms
    assert predictor.predict_many(other.encode_many([other.single()]), other)[0] == pytest.approx(
        answer.latency_ms, rel=1e-5
    )


def test_the_file_says_the_same(profiled, space):
    directory, predictor = profiled
    name = device.device_name("cpu", 1)
    again = LatencyPredictor.load(name, directory=directory)
    encoded = space.sample_many(50, np.random.default_rng(3))
    np.testing.assert_array_equal(again.predict_many(encoded, space), predictor.predict_many(encoded, space))
    architecture = space.decode(encoded[0])
    assert again.predict(architecture) == predictor.predict(architecture)
    assert installed(directory) == [(name, "eager", directory / f"{name}.eager.npz")]
    told = summary(directory / f"{name}.eager.npz")
    assert told["accuracy"]["networks"] > 0 and told["provenance"][0]["device"] == name
    assert again.meta["rows_digest"] == MeasurementTable.load(directory, name, "eager").rows_digest


def test_a_query_needs_no_torch(profiled):
    directory, _ = profiled
    code = f"""
import sys
import numpy as np
from mixnas.predictors.latency.predictor import LatencyPredictor
predictor = LatencyPredictor.load({device.device_name("cpu", 1)!r}, directory={str(directory)!r})
table = predictor.stored_space({PLAIN!r})
encoded = table.space.sample_many(20, np.random.default_rng(0))
each = [predictor.predict(a).latency_ms for a in table.space.decode_many(encoded)]
assert np.allclose(each, table.predict_many(encoded), rtol=1e-5)
assert predictor.stored_space({{}}) is None
assert not any(name in sys.modules for name in ("torch", "sklearn", "scipy")), "heavy imports"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_profiling_goes_on_and_keeps_other_spaces(profiled, space, tmp_path):
    directory, first = profiled
    work = tmp_path / "tables"
    shutil.copytree(directory, work)
    other = SearchSpace.from_dict({**PLAIN, "norm": ["layer", "rms"]})
    second = profile(other, IO, device="cpu", directory=work, config=replace(QUICK, seed=1, max_networks=30))
    assert second.meta["num_networks"] > first.meta["num_networks"]
    assert len(second.meta["provenance"]) == 2 and len(second.spaces) == 2
    for which in (space, other):
        assert np.isfinite(second.predict_many(which.sample_many(20, np.random.default_rng(0)), which)).all()
    done = profile(other, IO, device="cpu", directory=work, config=replace(QUICK, max_networks=1))
    assert done.meta["num_networks"] == second.meta["num_networks"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_file_is_refused(profiled, tmp_path, damage):
    directory, _ = profiled
    name = f"{device.device_name('cpu', 1)}.eager.npz"
    content = bytearray((directory / name).read_bytes())
    if damage == "flip":
        with zipfile.ZipFile(directory / name) as archive:  # within an array, not in the archive's own padding
            largest = max(archive.infolist(), key=lambda member: member.compress_size)
        content[largest.header_offset + len(largest.filename) + 30 + largest.compress_size // 2] ^= 0x40
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    else:
        np.savez(tmp_path / "other.npz", a=np.arange(3))
        content = bytearray((tmp_path / "other.npz").read_bytes())
        (tmp_path / "other.npz").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntegrityError, match="nas latency profile"):
        LatencyPredictor.load(device.device_name("cpu", 1), directory=tmp_path)


def test_a_pickle_is_refused(tmp_path):
    np.savez(tmp_path / "cpu-x-1t.eager.npz", meta=np.array([{"a": 1}], dtype=object))
    with pytest.raises(IntegrityError):
        LatencyPredictor.load("cpu-x-1t", directory=tmp_path)


def test_an_unknown_device_lists_those_there_are(profiled):
    directory, _ = profiled
    name = device.device_name("cpu", 1)
    with pytest.raises(ConfigError, match=rf"{name} .*nas latency profile"):
        LatencyPredictor.load("nvidia-h201", directory=directory)
    with pytest.raises(ConfigError, match="not this machine's"):
        profile(SearchSpace.from_dict(PLAIN), IO, device="nvidia-h200", directory=directory)


def test_the_interpreters_timings_are_refused(tmp_path, space):
    with pytest.raises(ConfigError, match="no device's"):
        profile(space, IO, device=device.INTERPRETER, directory=tmp_path, config=QUICK)
    assert MeasurementTable.load(tmp_path, device.INTERPRETER, "eager").subjects


def test_too_short_a_budget_says_so(tmp_path, space):
    with pytest.raises(ConfigError, match=r"Profile for longer|longer budget"):
        profile(space, IO, device="cpu", directory=tmp_path, config=replace(QUICK, budget_s=0.5))
