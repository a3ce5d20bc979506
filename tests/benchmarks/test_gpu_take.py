"""gpu.py --take: what came back loads, predicts and is used; what is no device's is refused."""

import json
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch

from mixnas.kernels import configs
from mixnas.kernels.tools import retune, rows
from mixnas.predictors.latency import profile as profile_module
from mixnas.predictors.latency.model import FitConfig
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

_DEVICE = "nvidia-test-gpu"
_BLOCK = {"mixer": ["identity", "pooling"], "gate": "none", "channel_mixer": ["none", "mlp"], "quant": "fp32"}
_PLAIN = {
    "stem": {"name": "conv", "stride": 1},
    "norm": "layer",
    "stages": [{"width": [4, 8, 16], "depth": [1, 2], "block": _BLOCK}],
}
_IO = IOSpec("image", (8, 8), 1, 10)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A table and a predictor as a GPU of that name would leave them."""
    place = tmp_path_factory.mktemp("tables")
    quick = MeasureConfig(passes=1, window_ms=0.2, sentinel_repeats=2, max_extra_passes=0)
    config = ProfileConfig(budget_s=60, max_networks=16, measure=quick, fit=FitConfig(num_trees=10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_module, "device_name", lambda *_: _DEVICE)
        profile(SearchSpace.from_dict(_PLAIN), _IO, runtime="eager", directory=place, config=config)
    return place


def _record(job, launch):
    present, best = {"launch": dict(job.launch), "us": {"a": 4.0}}, {"launch": launch, "us": {"a": 2.0}}
    record = retune.Record(job.key, job.family, job.kernel, dict(job.bounds), rows.sources(job.family), 1.0)
    record.present, record.best, record.state = present, best, "tuned"
    return record


@pytest.fixture
def came_back(tmp_path, tables, scripts):
    """What a run leaves in its folder."""
    from _gpu_results import Results

    out = tmp_path / "out"
    out.mkdir()
    job = next(job for job in rows.jobs(["norm"]) if job.kernel == "norm_forward" and not job.small)
    launch = {**job.launch, "num_warps": 2 * job.launch["num_warps"]}
    about = {"gpu": _DEVICE, "table_provenance": {"source": "a test"}, "provenance": {"checkout_commit": "abc"}}
    for step in ("right", "tuned", "fast", "measured", "trained"):
        results = Results(out / f"{step}.json", step, _DEVICE, False, about)
        if step == "tuned":
            results.keep(job.key, asdict(_record(job, launch)))
        if step == "right":
            results.keep("norm: a", {"group": "norm", "right": True})
    with zipfile.ZipFile(out / "tables.zip", "w") as archive:
        for path in tables.iterdir():
            archive.write(path, path.name)
    return out, job, launch


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    for folder in ("benchmarks/results", "kernels", "predictors/tables", "docs"):
        (root / folder).mkdir(parents=True)
    return root


def test_what_came_back_loads_predicts_and_is_used(came_back, checkout, monkeypatch):
    from _gpu_take import kept, take

    out, job, launch = came_back
    said = list(take(out, checkout, reports=False))
    assert any("norm.json: rows for" in line for line in said)
    for step in ("right", "tuned", "fast", "measured", "trained"):
        assert json.loads(kept(step, _DEVICE, checkout).read_text())["device"] == _DEVICE
    predictor = LatencyPredictor.load(_DEVICE, directory=checkout / "predictors" / "tables")
    architecture = SearchSpace.from_dict(_PLAIN).sample(np.random.default_rng(0))
    assert predictor.predict(architecture, _IO).latency.ms > 0
    for family in configs.load():
        if not (checkout / "kernels" / f"{family}.json").exists():
            text = (configs.TABLES / f"{family}.json").read_text()
            (checkout / "kernels" / f"{family}.json").write_text(text)
    before = configs.pick("norm_forward", torch.empty(1), channels=8, positions=1)
    monkeypatch.setattr(configs, "TABLES", checkout / "kernels")
    for cached in (configs.load, configs.kernels, configs._pick):
        cached.cache_clear()
    try:
        monkeypatch.setattr(configs, "gpu_of", lambda tensor: _DEVICE)
        features = {"channels": job.bounds.get("channels", 9999), "positions": 10**9}
        assert configs.pick("norm_forward", torch.empty(1), **features) == launch
        assert configs.load()["norm"]["provenance"][_DEVICE] == {"source": "a test", "commit": "abc"}
        assert configs.gpus("norm_backward") == ("any", "interpreter")
    finally:
        monkeypatch.undo()
        for cached in (configs.load, configs.kernels, configs._pick):
            cached.cache_clear()
    assert configs.pick("norm_forward", torch.empty(1), channels=8, positions=1) == before


def test_no_launch_of_a_family_that_was_wrong_or_has_changed(came_back, checkout):
    from _gpu_results import read_json, write_json
    from _gpu_take import take

    out, _, _ = came_back
    right = read_json(out / "right.json")
    right["items"]["norm: b"] = {"group": "norm", "right": False}
    write_json(out / "right.json", right)
    assert any("its results were wrong" in line for line in take(out, checkout, reports=False))
    assert not list((checkout / "kernels").iterdir())
    del right["items"]["norm: b"]
    write_json(out / "right.json", right)
    tuned = read_json(out / "tuned.json")
    for item in tuned["items"].values():
        item["sources"] = "of before"
    write_json(out / "tuned.json", tuned)
    assert any("have changed since" in line for line in take(out, checkout, reports=False))
    assert not list((checkout / "kernels").iterdir())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data.update(dry=True), "dry run"),
        (lambda data: data.pop("dry"), "dry run"),
        (lambda data: data.update(device="nvidia-other"), "of one device"),
        (lambda data: data.update(format=0), "in format"),
    ],
)
def test_what_is_no_devices_is_refused(came_back, checkout, spoil, says):
    from _gpu_results import read_json, write_json
    from _gpu_take import take

    out, _, _ = came_back
    data = read_json(out / "fast.json")
    spoil(data)
    write_json(out / "fast.json", data)
    with pytest.raises(SystemExit, match=says):
        list(take(out, checkout, reports=False))
    assert not list((checkout / "benchmarks" / "results").iterdir())


def test_tables_of_another_name_or_a_dry_run_are_refused(came_back, checkout):
    from _gpu_take import take

    out, _, _ = came_back
    with zipfile.ZipFile(out / "tables.zip", "w") as archive:
        archive.writestr("../outside.csv", "x")
    with pytest.raises(SystemExit, match="not a table of"):
        list(take(out, checkout, reports=False))
    with zipfile.ZipFile(out / "tables.zip", "w") as archive:
        archive.comment = b"dry"
    with pytest.raises(SystemExit, match="dry run"):
        list(take(out, checkout, reports=False))


def test_nothing_is_taken_from_nothing(tmp_path, scripts):
    from _gpu_take import take

    with pytest.raises(SystemExit, match="no results"):
        list(take(tmp_path))


def test_the_next_call_begins_with_what_was_taken(came_back, checkout, tmp_path, monkeypatch):
    import _gpu_take

    out, _, _ = came_back
    list(_gpu_take.take(out, checkout, reports=False))
    monkeypatch.setattr(_gpu_take, "ROOT", checkout)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    monkeypatch.setattr(_gpu_take, "_devices_here", lambda: ["nvidia-another"])
    _gpu_take.bring(fresh)
    assert not list(fresh.iterdir())
    monkeypatch.setattr(_gpu_take, "_devices_here", lambda: [_DEVICE])
    _gpu_take.bring(fresh)
    assert json.loads((fresh / "tuned.json").read_text())["items"]


def test_the_table_is_one_screen_with_units_and_floors(came_back, scripts):
    from _gpu_results import read_json, write_json
    from _gpu_table import table

    out, _, _ = came_back
    floor = {"bytes_us": 6.0, "operations_us": 1.0, "special_us": 0.0, "bound_by": "bytes"}
    time = {"forward, graph, cold": {"p50_us": 12.0}}
    entry = {"same_function": True, "right": True, "times": time}
    fast = read_json(out / "fast.json")
    for number in range(60):
        both = {"mixnas (Triton)": entry, "ATen": entry}
        fast["items"][f"depthwise_conv2d: {number}x56x56x64 k7"] = {"floor": floor, "implementations": both}
    write_json(out / "fast.json", fast)
    judged = {"mape_percent": 5.0, "networks": 60, "coverage_percent": 91.0}
    item = {"held_out": judged, "noise_ceiling": {"mape_percent": 1.5}, "estimate": {"mape_percent": 48.0}}
    measured = read_json(out / "measured.json")
    measured["items"]["imagenet"] = item | {"profile_s": 70.0, "units": 300, "networks": 100}
    write_json(out / "measured.json", measured)
    lines = table(out)
    assert len(lines) <= 46 and max(map(len, lines)) <= 118
    text = "\n".join(lines)
    assert "more in fast.json" in text
    assert "5.0%, floor 1.5%; interval of 90% holds 91%; data sheet 48%" in text
    row = next(line for line in lines if "0x56x56x64" in line)
    assert "12.0" in row and "6.0 (bytes)" in row and "2.0x" in row
    assert table(out / "nothing")
