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
_STEPS = ("right", "tuned", "fast", "measured", "trained")
_BLOCK = {"mixer": ["identity", "pooling"], "gate": "none", "channel_mixer": ["none", "mlp"], "quant": "fp32"}
_PLAIN = {
    "stem": {"name": "conv", "stride": 1},
    "norm": "layer",
    "stages": [{"width": [4, 8, 16], "depth": [1, 2], "block": _BLOCK}],
}
_IO = IOSpec("image", (8, 8), 1, 10)


def _clock(call, repeats):
    """Tells the same on any machine: the more modules, the longer."""
    inside = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    modules = [len(list(module.modules())) for module in inside if isinstance(module, torch.nn.Module)]
    return np.full(repeats, 1e5 + 1e4 * sum(modules))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A table and a predictor as a GPU of that name would leave them."""
    place = tmp_path_factory.mktemp("tables")
    quick = MeasureConfig(passes=1, window_ms=0.2, sentinel_repeats=2, max_extra_passes=0)
    config = ProfileConfig(budget_s=600, max_networks=16, measure=quick, fit=FitConfig(num_trees=10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_module, "device_name", lambda *_: _DEVICE)
        patch.setattr(profile_module.runtimes, "clock_of", lambda *_: _clock)
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
        for path in (p for p in tables.iterdir() if not p.name.startswith(".")):  # no lock
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
        (lambda data: data.pop("dry"), "of which device"),
        (lambda data: data.update(device="nvidia-other"), "of one device"),
        (lambda data: data.update(device="nvidia-../x"), "of one device"),
        (lambda data: data.update(format=0), "in format"),
        (lambda data: data.pop("items"), "no results by name"),
        (lambda data: data.update(items=["x"]), "no results by name"),
    ],
)
@pytest.mark.parametrize("step", ["fast", "trained"])
def test_what_is_no_devices_is_refused(came_back, checkout, step, spoil, says):
    from _gpu_results import read_json, write_json

    out, _, _ = came_back
    data = read_json(out / f"{step}.json")
    spoil(data)
    write_json(out / f"{step}.json", data)
    _refused(out, checkout, says)


def _refused(out, checkout, says):
    """All is looked at before anything is written."""
    from _gpu_take import take

    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    came = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SystemExit, match=says) as refused:
        list(take(out, checkout, reports=False))
    assert "\n" not in str(refused.value) and str(out.parent) in str(refused.value)
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before
    assert {path: path.read_bytes() for path in out.iterdir()} == came


def test_a_half_written_file_is_refused(came_back, checkout):
    out, _, _ = came_back
    (out / "tuned.json").write_text((out / "tuned.json").read_text()[:-20])
    _refused(out, checkout, "tuned.json: is no JSON object")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda item, data: item.update(strange=1), "strange"),
        (lambda item, data: item.pop("kernel"), "kernel"),
        (lambda item, data: item["best"]["launch"].update(OTHER=2), "has no launch of"),
        (lambda item, data: item["best"]["launch"].update(num_warps="4"), "has no launch of"),
        (lambda item, data: item.update(best={}), "KeyError"),
        (lambda item, data: data.update(gpu="any"), "its rows are for 'any'"),
        (lambda item, data: data.pop("table_provenance"), "table_provenance"),
    ],
)
def test_foreign_launches_are_refused(came_back, checkout, spoil, says):
    from _gpu_results import read_json, write_json

    out, job, _ = came_back
    data = read_json(out / "tuned.json")
    spoil(data["items"][job.key], data)
    write_json(out / "tuned.json", data)
    _refused(out, checkout, says)


def test_foreign_networks_are_refused(came_back, checkout):
    from _gpu_measured import SETTINGS
    from _gpu_results import read_json, write_json

    out, _, _ = came_back
    data = read_json(out / "measured.json")
    data["items"][SETTINGS[0].name] = {"architectures": [{"no": "architecture"}], "io": {}, "measured_ms": [1.0]}
    write_json(out / "measured.json", data)
    _refused(out, checkout, "measured.json: is not as gpu.py leaves it")


def _repacked(out, change, comment=b""):
    """Write tables.zip anew from what `change` makes of its contents."""
    with zipfile.ZipFile(out / "tables.zip") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(out / "tables.zip", "w") as archive:
        archive.comment = comment
        for name, content in change(contents):
            archive.writestr(name, content)


def _without(kind):
    return lambda found: [(name, content) for name, content in found.items() if not name.endswith(kind)]


def _spoilt(kind, content):
    return lambda found: [(name, content if name.endswith(kind) else own) for name, own in found.items()]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: [*found.items(), ("../outside.csv", "x")], "not a table of"),
        (lambda found: [*found.items(), ("/outside.csv", "x")], "not a table of"),
        (lambda found: [*found.items(), (f"{_DEVICE}.py", "x")], "not a table of"),
        (lambda found: [*found.items(), (f"{_DEVICE}.eager.npz/../../../kernels/norm.json", "x")], "not a table of"),
        (lambda found: [*found.items(), (f"{_DEVICE}.other.csv", "x")], "not a table of"),
        (lambda found: [*found.items(), (f"{_DEVICE}.eager.npz", "x")], "twice"),
        (_without(".json"), "eager.json is not in it"),
        (_without(".csv"), "eager.csv is not in it"),
        (_spoilt(".npz", b"junk"), "damaged, truncated or not a latency predictor"),
        (_spoilt(".csv", b"junk"), "columns"),
        (_spoilt(".json", b"{"), "eager.json: damaged"),
        (lambda found: [(f"{_DEVICE}.graph.{name.rpartition('.')[2]}", own) for name, own in found.items()], "eager"),
    ],
)
def test_tables_that_are_none_are_refused(came_back, checkout, change, says):
    out, _, _ = came_back
    _repacked(out, change)
    _refused(out, checkout, says)


def test_a_zip_that_is_none_is_of_a_dry_run_or_too_large_is_refused(came_back, checkout, monkeypatch):
    import _gpu_take

    out, _, _ = came_back
    whole = (out / "tables.zip").read_bytes()
    _repacked(out, lambda found: found.items(), b"dry")
    _refused(out, checkout, "dry run")
    for damaged in (b"", b"junk", whole[:-30]):
        (out / "tables.zip").write_bytes(damaged)
        _refused(out, checkout, "tables.zip: ")
    (out / "tables.zip").write_bytes(whole)
    monkeypatch.setattr(_gpu_take, "_LARGEST_UNPACKED", 100)
    _refused(out, checkout, "would unpack to more than")


def test_what_an_earlier_call_gave_stays(came_back, checkout):
    from _gpu_results import read_json, write_json
    from _gpu_take import kept, take

    out, _, _ = came_back
    list(take(out, checkout, reports=False))
    right = read_json(out / "right.json")
    right["items"] = {"norm: later": {"group": "norm", "right": True}}
    write_json(out / "right.json", right)
    list(take(out, checkout, reports=False))
    assert set(read_json(kept("right", _DEVICE, checkout))["items"]) == {"norm: a", "norm: later"}
    table = checkout / "predictors" / "tables" / f"{_DEVICE}.eager.csv"
    with open(table, "a") as file:
        file.write("a row that only this one has\n")
    _refused(out, checkout, "has 1 rows that the table which came back lacks")


def test_what_came_back_may_be_read_only(came_back, checkout):
    from _gpu_take import kept, take

    out, _, _ = came_back
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    list(take(out, checkout, reports=False))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert kept("measured", _DEVICE, checkout).exists()


def test_what_ships_of_gpus_loads_and_is_used(scripts):
    """Whatever `--take` has put into this checkout, and what else is there."""
    from _checkout import ROOT
    from _gpu_results import read_step

    from mixnas.predictors.latency.predictor import SHIPPED, installed
    from mixnas.predictors.measuring.table import MeasurementTable

    shipped = installed(SHIPPED)
    assert shipped, "a device ships"
    for device, tag, path in shipped:
        predictor = LatencyPredictor.open(path)
        assert (predictor.device, predictor.tag) == (device, tag) and predictor.meta["num_units"] > 0
        assert MeasurementTable.load(SHIPPED, device, tag).subjects
        assert LatencyPredictor.load(device, tag).device == device, "a query finds it"
    for path in (ROOT / "benchmarks" / "results").glob("gpu-*.json"):
        data, fault = read_step(path)
        assert not fault and not data["dry"] and path.name == f"gpu-{data['device']}.{data['step']}.json"
    for family, table in configs.load().items():
        for kernel, by_gpu in table["kernels"].items():
            for gpu in by_gpu:
                assert gpu in (configs.ANY_GPU, configs.NO_WGMMA, configs.INTERPRETER, *table["provenance"]), (
                    f"{family}: {kernel} for {gpu} says where it is from"
                )
                assert configs.rows(kernel, gpu)[-1].up_to == {}, "every size has a row"


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
    monkeypatch.setattr(_gpu_take, "devices_here", lambda: ["nvidia-another"])
    _gpu_take.bring(fresh)
    assert not list(fresh.iterdir())
    monkeypatch.setattr(_gpu_take, "devices_here", lambda: [_DEVICE])
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
    states = {step: {"state": "timed out", "seconds": 100.0} for step in ("machine", *_STEPS)}
    versions = {"python": "3.12.3", "torch": "2.11.0+cu130", "triton": "3.6.0", "numpy": ""}
    write_json(out / "gpu.json", {"machine": {"device": _DEVICE, "versions": versions}, "calls": [{"steps": states}]})
    head = "\n".join(table(out)[:5])
    assert f"{_DEVICE}, torch 2.11.0+cu130, triton 3.6.0, numpy none" in head
    assert all(f"{step} timed out (100 s)" in " ".join(head.split()) for step in states), "none is cut off"
    row = next(line for line in lines if "0x56x56x64" in line)
    assert "12.0" in row and "6.0 (bytes)" in row and "2.0x" in row
    assert table(out / "nothing") == ["== the step machine found no device"]
    (out / "trained.json").write_text("{")
    (out / "gpu.json").write_text('{"machine": 3, "calls": [1]}')
    fast["items"]["glu: 1"] = {"floor": 3}
    write_json(out / "fast.json", fast)
    text = "\n".join(table(out))
    assert "trained.json: is no JSON object" in text and "== gpu.json: is not as gpu.py leaves it" in text
    assert "== fast.json: is not as gpu.py leaves it" in text and "data sheet 48%" in text
