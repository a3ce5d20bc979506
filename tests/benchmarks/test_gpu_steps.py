"""gpu.py's steps: whatever one does, the others run, what was found stays, and the time is kept."""

import json
import signal
import time

import pytest

# Stands for gpu.py in the working folder: each step keeps three results, and does afterwards what FAULTS says of it.
_STUB = """
import os, sys, time, signal
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from _gpu_results import Results, read_json, write_json
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
step, out = arguments["--step"], Path(arguments["--out"])
if step == "machine":
    write_json(out / "gpu.json", read_json(out / "gpu.json") | {"machine": {"device": "nvidia-test"}})
    sys.exit(0)
faults = dict(pair.split(":") for pair in os.environ["FAULTS"].split(",") if pair)
results = Results(out / f"{step}.json", step, "nvidia-test", False, {})
for number in range(3):
    if results.known(f"result {number}", "s") is None:
        results.keep(f"result {number}", {"sources": "s", "by": os.getpid()})
        fault = faults.get(step)
        if fault == "late":
            results.leave_out("the rest", "out of time")
            break
        if fault == "fail":
            raise ValueError(f"{step} was made to fail")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            print("now it hangs", flush=True)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.fork()
            time.sleep(3600)
results.complete()
"""


@pytest.fixture
def call(tmp_path, monkeypatch, scripts):
    """Run the steps on stubs, with faults; returns how each ended."""
    import _gpu_steps

    def checkout(work):
        folder = work / "src" / "mixnas" / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.py").write_text(_STUB)
        (folder / "_gpu_results.py").write_text((scripts / "_gpu_results.py").read_text())
        return work / "src"

    monkeypatch.setattr(_gpu_steps, "_TERM_S", 0.2)

    def run(faults="", seconds=300.0, steps=_gpu_steps.STEPS):
        monkeypatch.setenv("FAULTS", faults)
        out, work = tmp_path / "out", tmp_path / "work"
        out.mkdir(exist_ok=True)
        checkout(work)
        settings = _gpu_steps.Run(
            out=out, work=work, deadline=time.monotonic() + seconds, dry=False, grace_s=0.3, least_s=0.5
        )
        return _gpu_steps.run_all(settings, list(steps), say=lambda text: None)["steps"], out

    return run


def _items(out, step):
    return json.loads((out / f"{step}.json").read_text())["items"]


@pytest.mark.parametrize("fault", ["fail", "hang", "die"])
@pytest.mark.parametrize("step", ["right", "tuned", "fast", "measured", "trained"])
def test_one_step_never_stops_the_others(call, step, fault):
    # What hangs takes its whole share; what ends by itself has all the time that a loaded machine may want for it.
    given, began = 15.0 if fault == "hang" else 300.0, time.monotonic()
    ended, out = call(f"{step}:{fault}", seconds=given)
    assert time.monotonic() - began < given + 300.0  # it hangs for an hour otherwise
    expected = {"fail": "failed", "hang": "timed out", "die": "died"}[fault]
    if fault == "hang":
        assert ended[step]["state"] == expected
        assert len(_items(out, step)) == 1
    else:  # it is tried again as long as it gets further, up to three times
        assert ended[step]["tries"][0].startswith(expected)
        assert len(_items(out, step)) == 3
    if fault == "fail":
        assert f"{step} was made to fail" in ended[step]["tries"][0]
    if fault == "die":
        assert f"by signal {signal.SIGKILL}" in ended[step]["tries"][0]
    for other in {"right", "tuned", "fast", "measured", "trained"} - {step}:
        assert ended[other]["state"] == "done"
        assert len(_items(out, other)) == 3
    noted = json.loads((out / "gpu.json").read_text())
    assert noted["calls"][-1]["steps"] == ended
    assert noted["machine"] == {"device": "nvidia-test"}


def test_a_second_call_goes_on_where_the_first_ended(call):
    _, out = call("fast:hang", seconds=15.0)
    first = _items(out, "fast")["result 0"]["by"]
    ended, out = call()
    assert ended["fast"]["state"] == "done"
    assert _items(out, "fast")["result 0"]["by"] == first
    assert len({item["by"] for item in _items(out, "fast").values()}) == 2
    assert len(json.loads((out / "gpu.json").read_text())["calls"]) == 2


def test_what_is_over_its_time_is_left_out(call):
    ended, _ = call(seconds=0.4)  # less than any step needs
    assert {one["state"] for step, one in ended.items() if step != "machine"} == {"left out"}


def test_eight_files_at_any_moment(call):
    _, out = call()
    (out / "tables.zip").write_bytes(b"")
    assert len(list(out.iterdir())) == 8
    assert {path.name for path in out.iterdir()} == {
        *("gpu.json", "log.txt", "tables.zip"),
        *(f"{step}.json" for step in ("right", "tuned", "fast", "measured", "trained")),
    }


def test_shares_pass_on_what_is_left(scripts):
    import _gpu_steps

    steps = list(_gpu_steps.STEPS)
    assert _gpu_steps.share("trained", steps, 100.0) == 100.0
    total, left = 0.0, 485.0
    for step in steps:
        took = _gpu_steps.share(step, steps, left)
        total, left = total + took, left - took
    assert total == pytest.approx(485.0)
    assert _gpu_steps.share("measured", ["measured"], 60.0) == 60.0


def test_a_log_is_cut_from_its_beginning(tmp_path, monkeypatch, scripts):
    import _gpu_steps

    monkeypatch.setattr(_gpu_steps, "_KEPT_LOG", 100)
    log = tmp_path / "log.txt"
    log.write_bytes(b"x" * 200 + b"the end")
    _gpu_steps.shorten(log)
    assert log.stat().st_size < 100 and log.read_bytes().endswith(b"the end")


def test_results_of_other_sources_or_devices_count_for_nothing(tmp_path, scripts):
    from _gpu_results import Results

    path = tmp_path / "out" / "fast.json"
    path.parent.mkdir()
    first = Results(path, "fast", "nvidia-h200", False, {})
    first.keep("a", {"sources": "1"})
    assert Results(path, "fast", "nvidia-h200", False, {}).known("a", "1") == {"sources": "1"}
    assert Results(path, "fast", "nvidia-h200", False, {}).known("a", "2") is None
    assert Results(path, "fast", "nvidia-h200", True, {}).items == {}
    assert Results(path, "fast", "nvidia-h100", False, {}).items == {}
    path.write_text('{"format": 1, "half a fi')
    assert Results(path, "fast", "nvidia-h200", False, {}).items == {}


def test_complete_is_what_lacked_no_time(tmp_path, scripts):
    from _gpu_results import Results

    results = Results(tmp_path / "right.json", "right", "d", False, {})
    results.leave_out("sanitized", "no compute-sanitizer here")
    results.complete()
    assert results.data["complete"]
    results.leave_out("glu", "out of time")
    results.complete()
    assert not results.data["complete"]
    results.keep("glu", {})
    results.complete()
    assert results.data["complete"]


def test_a_family_is_wrong_where_any_of_its_functions_is(scripts):
    from _gpu_results import was_wrong

    items = {"a": {"group": "depthwise_conv2d", "right": False}, "b": {"group": "norm", "right": None}}
    assert was_wrong("depthwise", {"items": items})
    assert not was_wrong("norm", {"items": items}) and not was_wrong("glu", {})
    refused = {"norm: 8x8, compiled": {"group": "norm", "right": False, "raised": True, "why": "no compiler"}}
    assert not was_wrong("norm", {"items": refused})
    assert was_wrong("norm", {"items": {"norm: 8x8, eager": refused["norm: 8x8, compiled"]}})
    assert not was_wrong("depth", {"items": {"a": {"group": "depthwise", "right": False}}})


def test_a_step_that_had_too_little_time_is_incomplete(call):
    ended, _ = call("tuned:late", steps=("right", "tuned"))
    assert ended["right"]["state"] == "done"
    assert ended["tuned"]["state"] == "incomplete" and "1 things" in ended["tuned"]["why"]
