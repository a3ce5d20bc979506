"""From measuring to a query, for real on a tiny space; then the file of the predictor."""

import io
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixnas.predictors.latency import profile as profile_module
from mixnas.predictors.latency.model import FitConfig
from mixnas.predictors.latency.predictor import LatencyPredictor, installed, summary
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring import device
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search_space.errors import ConfigError, IntegrityError, StoppedEarly
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

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


def test_predictions_order_networks(profiled, space):
    _, predictor = profiled
    assert predictor.meta["num_units"] >= 8 and predictor.meta["num_networks"] >= 12
    cheap = space.from_params(_params(space, width=8, depth=1, mixer="identity", expansion=1))
    dear = space.from_params(_params(space, width=16, depth=2, mixer="dwconv", expansion=4))
    low, high = predictor.predict(cheap), predictor.predict(dear)
    assert low.latency.ms < high.latency.ms
    for answer in (low, high):
        latency = answer.latency
        assert latency.low_ms < latency.ms < latency.high_ms
        assert latency.outside == () and latency.kind == "predicted"
        assert sum(unit.latency_ms for unit in answer.units) == pytest.approx(latency.ms)
    blocks = [f"stages.0.blocks.{b}.{role}" for b in (0, 1) for role in ("token", "channel")]
    assert [unit.name for unit in high.units] == ["stem", *blocks, "head"]
    assert [unit.role for unit in high.units] == ["stem", "token", "channel", "token", "channel", "head"]


def _params(space, *, width, depth, mixer, expansion):
    answers = {"width": width, "depth": depth, "mixer": mixer, "expansion": expansion, "kernel_size": 5, "gate": "none"}
    return {v.name: answers[v.name.split(".")[-1]] for v in space.variables}


def test_many_are_each(profiled, space):
    _, predictor = profiled
    encoded = space.sample_many(100, np.random.default_rng(0))
    single = [predictor.predict(architecture).latency.ms for architecture in space.decode_many(encoded)]
    np.testing.assert_allclose(predictor.predict_many(encoded, space), single, rtol=1e-5)


def test_operators_that_outweigh_the_units_leave_a_share_of_them(profiled, space):
    """A network unlike the few that were measured came out at less than no time."""
    directory, _ = profiled
    (_, _, path), *_ = installed(directory)
    predictor = LatencyPredictor.open(path)
    predictor.composition = replace(predictor.composition, presence_ms=predictor.composition.presence_ms - 100.0)
    encoded = space.sample_many(20, np.random.default_rng(0))
    answers = [predictor.predict(architecture) for architecture in space.decode_many(encoded)]
    for answer in answers:
        assert 0 < answer.latency.low_ms < answer.latency.ms < answer.latency.high_ms
        assert sum(unit.latency_ms for unit in answer.units) == pytest.approx(answer.latency.ms)
        assert all(unit.latency_ms > 0 for unit in answer.units)
    many = predictor.predict_many(encoded, space)
    np.testing.assert_allclose(many, [answer.latency.ms for answer in answers], rtol=1e-5)


def test_outside_is_reported_and_widens(profiled, space):
    _, predictor = profiled
    plain = {
        "stem": {"name": "conv", "stride": 2},
        "stages": [{"width": 64, "block": {"mixer": "pooling", "channel_mixer": {"name": "mlp", "expansion": 2}}}],
    }
    other = SearchSpace.from_dict(plain)
    answer = predictor.predict(other.single()).latency
    assert any("mixer pooling was not measured" in text for text in answer.outside)
    assert any("width 64 is outside" in text for text in answer.outside)
    inside = predictor.predict(space.sample(np.random.default_rng(0))).latency
    assert answer.high_ms / answer.low_ms > inside.high_ms / inside.low_ms
    many = predictor.predict_many(other.encode_many([other.single()]), other)
    assert many[0] == pytest.approx(answer.ms, rel=1e-5)


def test_a_block_that_runs_again_costs_again(profiled, space):
    _, predictor = profiled
    plain = {"stem": {"name": "conv", "stride": 2}}
    block = {"mixer": "identity", "gate": "se", "channel_mixer": {"name": "mlp", "expansion": 2}, "recursion": [1, 3]}
    looped = SearchSpace.from_dict({**plain, "stages": [{"width": 16, "block": block}]})
    first, again = (predictor.predict(looped.decode([choice])) for choice in (0, 1))
    assert len(again.units) == len(first.units) + 4
    own = sum(unit.latency_ms for unit in again.units[-3:-1])
    assert again.latency.ms == pytest.approx(first.latency.ms + 2 * own)
    many = predictor.predict_many(np.array([[0], [1]]), looped)
    np.testing.assert_allclose(many, [first.latency.ms, again.latency.ms], rtol=1e-5)


def test_the_input_is_part_of_the_question(profiled, space):
    _, predictor = profiled
    architecture = space.sample(np.random.default_rng(0))
    same = predictor.predict(architecture)
    assert predictor.predict(architecture, IO) == same
    for other, what in (
        (replace(IO, size=(16, 16)), "image 16x16"),
        (replace(IO, num_outputs=11), "11 outputs"),
        (replace(IO, in_features=3), "3 features"),
    ):
        answer = predictor.predict(architecture, other).latency
        assert any(text.startswith("input: ") and what in text for text in answer.outside)
        assert answer.high_ms / answer.low_ms > same.latency.high_ms / same.latency.low_ms
        encoded = space.encode_many([architecture])
        np.testing.assert_allclose(predictor.predict_many(encoded, space, other), [answer.ms], rtol=1e-5)


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
each = [predictor.predict(a).latency.ms for a in table.space.decode_many(encoded)]
assert np.allclose(each, predictor.predict_many(encoded, table.space), rtol=1e-5)
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
    larger = replace(IO, size=(16, 16))
    third = profile(space, larger, device="cpu", directory=work, config=replace(QUICK, max_networks=12), plain=PLAIN)
    assert third.inputs == (larger, IO) and len(third.spaces) == 3
    architecture = space.sample(np.random.default_rng(1))
    with pytest.raises(ConfigError, match=r"image 16x16 .*; image 8x8 .*Give `io`"):
        third.predict(architecture)
    assert third.predict(architecture, IO).latency.outside == ()
    assert third.stored_space(PLAIN, larger).io == larger and third.stored_space(PLAIN) is None
    done = profile(other, IO, device="cpu", directory=work, config=replace(QUICK, max_networks=1))
    assert done.meta["num_networks"] == third.meta["num_networks"] > second.meta["num_networks"]


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


def test_too_short_a_budget_stops_keeps_what_it_has_and_can_be_gone_on_with(tmp_path, space, monkeypatch):
    monkeypatch.setattr(profile_module, "_LEAST_PATIENCE_S", 0.0)
    with pytest.raises(StoppedEarly, match=r"lacks .* networks\. What was measured is kept .*`latency\.profile`"):
        profile(space, IO, device="cpu", directory=tmp_path, config=replace(QUICK, budget_s=0.01))
    kept = set(MeasurementTable.load(tmp_path, device.device_name("cpu", 1), "eager").subjects)
    predictor = profile(space, IO, device="cpu", directory=tmp_path, config=replace(QUICK, max_networks=12))
    assert predictor.meta["num_networks"] == 12 and predictor.meta["num_units"] > 8
    again = MeasurementTable.load(tmp_path, device.device_name("cpu", 1), "eager").subjects
    assert kept < set(again)


OLD = sorted((Path(__file__).parents[2] / "data" / "v1").glob("*/latency/*.npz"))


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.parents[1].name)
def test_a_predictor_of_whole_blocks_is_refused_in_one_sentence(path, tmp_path, space):
    device_there = path.stem.rpartition(".")[0]
    sentence = rf"whole blocks were measured .*`nas latency profile --device {device_there}`\.$"
    with pytest.raises(IntegrityError, match=sentence) as error:
        LatencyPredictor.load(device_there, directory=path.parent)
    assert str(error.value).count(". ") == 0 and path.name in str(error.value)
    with pytest.raises(IntegrityError, match=sentence):
        summary(path)
    # Profiling goes on without it, where its table is gone.
    name = device.device_name("cpu", 1)
    shutil.copy(path, tmp_path / f"{name}.eager.npz")
    predictor = profile(space, IO, device="cpu", directory=tmp_path, config=replace(QUICK, max_networks=12))
    assert LatencyPredictor.load(name, directory=tmp_path).accuracy == predictor.accuracy


def test_there_are_old_predictors_to_refuse():
    assert len(OLD) == 2


def test_an_archive_that_would_unpack_to_gigabytes_is_refused_by_its_header(tmp_path):
    """4 MB of zeros, once read whole."""
    path = tmp_path / "cpu-x-1t.eager.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 32,)})
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("low.npy", "w", force_zip64=True) as f,
    ):
        f.write(header.getvalue())
        for _ in range(300):
            f.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(IntegrityError, match=r"it would unpack to 31\d,\d{3},\d{3} bytes; allowed are 268,435,456"):
        LatencyPredictor.open(path)


def test_a_file_that_announces_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "cpu-x-1t.eager.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("low.npy", header.getvalue())
    with pytest.raises(IntegrityError, match="damaged, truncated or not a latency predictor"):
        LatencyPredictor.open(path)
