"""gpu.py's steps: whatever one does, the others run, what was found stays, and the time is kept."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

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
    from _gpu_results import STEPS

    def checkout(work):
        folder = work / "src" / "mixnas" / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.py").write_text(_STUB)
        (folder / "_gpu_results.py").write_text((scripts / "_gpu_results.py").read_text())
        return work / "src"

    plain = _gpu_steps.wait

    def wait(process, seconds):
        """A step that hangs has used up its time as soon as it does: no test depends on what else the machine does."""
        log = tmp_path / "out" / "log.txt"
        while process.poll() is None:
            if log.read_text().splitlines()[-1:] == ["now it hangs"]:
                raise subprocess.TimeoutExpired("step", seconds)
            time.sleep(0.02)
        return plain(process, seconds)

    monkeypatch.setattr(_gpu_steps, "_TERM_S", 0.2)
    monkeypatch.setattr(_gpu_steps, "wait", wait)

    def run(faults="", seconds=3600.0, steps=STEPS):
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
    ended, out = call(f"{step}:{fault}")
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
    _, out = call("fast:hang")
    first = _items(out, "fast")["result 0"]["by"]
    ended, out = call()
    assert ended["fast"]["state"] == "done"
    assert _items(out, "fast")["result 0"]["by"] == first
    assert len({item["by"] for item in _items(out, "fast").values()}) == 2
    assert len(json.loads((out / "gpu.json").read_text())["calls"]) == 2


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch, scripts):
    import _gpu_steps

    monkeypatch.setattr(_gpu_steps, "_TERM_S", 0.2)
    script = tmp_path / "src" / "mixnas" / "benchmarks" / "gpu.py"
    script.parent.mkdir(parents=True)
    script.write_text("import os, time\nos.fork()\ntime.sleep(3600)\n")
    run = _gpu_steps.Run(out=tmp_path, work=tmp_path, deadline=time.monotonic() + 60, dry=False, grace_s=0.2)
    groups, plain = [], _gpu_steps.start
    monkeypatch.setattr(_gpu_steps, "start", lambda *given: groups.append(plain(*given)) or groups[-1])
    assert _gpu_steps.one_try(run, "fast", 0.1)[0] == "timed out"
    assert _all_end(groups[0].pid)


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
    from _gpu_results import STEPS

    steps = list(STEPS)
    assert _gpu_steps.share("trained", steps, 100.0) == 100.0
    total, left = 0.0, 485.0
    for step in steps:
        took = _gpu_steps.share(step, steps, left)
        total, left = total + took, left - took
    assert total == pytest.approx(485.0)
    assert _gpu_steps.share("measured", ["measured"], 60.0) == 60.0


@pytest.mark.parametrize("patience", [0.0, 3.0])
def test_nine_minutes_are_kept_whatever_hangs(tmp_path, monkeypatch, scripts, patience):
    """On a recorded clock: every step takes all it is given, and what it takes to end it besides."""
    import _gpu_steps
    import gpu

    now = [1000.0]
    monkeypatch.setattr(_gpu_steps.time, "monotonic", lambda: now[0])

    def hang(run, step, seconds):
        now[0] += seconds + run.grace_s + patience
        return "timed out", ""

    monkeypatch.setattr(_gpu_steps, "one_try", hang)
    deadline = now[0] + 540.0 - gpu._CLOSING_S
    run = _gpu_steps.Run(out=tmp_path, work=tmp_path, deadline=deadline, dry=False, grace_s=12.0)
    ended = _gpu_steps.run_all(run, list(gpu.STEPS), say=lambda text: None)["steps"]
    assert {step["state"] for step in ended.values()} == {"timed out"}
    assert 1000.0 + 540.0 - 2 * gpu._CLOSING_S < now[0] <= 1000.0 + 540.0


def test_a_log_is_cut_from_its_beginning(tmp_path, monkeypatch, scripts):
    import _gpu_steps

    monkeypatch.setattr(_gpu_steps, "_KEPT_LOG", 100)
    log = tmp_path / "log.txt"
    log.write_bytes(b"x" * 200 + b"the end")
    _gpu_steps.shorten(log)
    assert log.stat().st_size < 100 and log.read_bytes().endswith(b"the end")


def test_why_a_step_failed_is_not_what_a_helper_said_last(tmp_path, scripts):
    import _gpu_steps

    log = tmp_path / "log.txt"
    before = "\n== right, 9 s\ngpu.py: of another step\n"
    log.write_text(before + "\n== tuned, 5 s\nTraceback\ngpu.py: ValueError: no row\nwarnings.warn('a tracker')\n")
    assert _gpu_steps._last_words(log) == "ValueError: no row"
    log.write_text(before + "\n== tuned, 5 s\nSegmentation fault\n\n")
    assert _gpu_steps._last_words(log) == "Segmentation fault"
    log.write_text(before + "\n== tuned, 5 s\n")
    assert _gpu_steps._last_words(log) == "it said nothing"


def test_results_of_other_sources_count_for_nothing(tmp_path, scripts):
    from _gpu_results import Results

    path = tmp_path / "out" / "fast.json"
    path.parent.mkdir()
    first = Results(path, "fast", "nvidia-h200", False, {})
    first.keep("a", {"sources": "1"})
    assert Results(path, "fast", "nvidia-h200", False, {}).known("a", "1") == {"sources": "1"}
    assert Results(path, "fast", "nvidia-h200", False, {}).known("a", "2") is None


_WHOLE = {"format": 1, "device": "nvidia-h200", "dry": False, "items": {"a": {}}, "left_out": {}, "seconds": 1.0}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps(_WHOLE | {"device": "nvidia-h100"}), "is of nvidia-h100, and this device is nvidia-h200"),
        (json.dumps(_WHOLE | {"dry": True}), "is of"),
        (json.dumps(_WHOLE)[:-20], "no JSON object"),
        ("[]", "no JSON object"),
        (json.dumps(_WHOLE | {"format": 0}), "in format 0, not 1"),
        (json.dumps(_WHOLE | {"items": []}), "no results by name"),
        (json.dumps(_WHOLE | {"items": None}), "no results by name"),
        (json.dumps(_WHOLE | {"items": {"a": 3}}), "no results by name"),
        (json.dumps(_WHOLE | {"left_out": {"a": 3}}), "no reasons by name"),
        (json.dumps(_WHOLE | {"seconds": None}), "for `seconds`"),
        (json.dumps(_WHOLE | {"seconds": "x"}), "for `seconds`"),
        (json.dumps(_WHOLE | {"seconds": float("nan")}), "for `seconds`"),
    ],
)
def test_what_a_machine_gave_is_never_written_over(tmp_path, scripts, content, says):
    from _gpu_results import Results, unfit

    path = tmp_path / "right.json"
    path.write_text(content)
    assert says in unfit(tmp_path, False, "nvidia-h200") or "without --dry" in unfit(tmp_path, True)
    with pytest.raises(SystemExit, match="No result was touched") as refused:
        Results(path, "right", "nvidia-h200", False, {})
    assert says in str(refused.value)
    assert path.read_text() == content


def _zip(path, comment=b"", **files):
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = comment
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)


def test_tables_of_another_device_or_damaged_stop_a_call(tmp_path, scripts):
    from _gpu_results import unfit

    assert unfit(tmp_path, False) == unfit(tmp_path, True) == unfit(tmp_path, False, "nvidia-h200") == ""
    _zip(tmp_path / "tables.zip", **{"nvidia-h100__graph__csv": "x"})
    assert unfit(tmp_path, False, "nvidia-h100") == ""
    assert "holds nvidia-h100.graph.csv" in unfit(tmp_path, False, "nvidia-h200")
    assert "without --dry" in unfit(tmp_path, True)
    _zip(tmp_path / "tables.zip", b"dry")
    assert "with --dry" in unfit(tmp_path, False) and unfit(tmp_path, True) == ""
    whole = (tmp_path / "tables.zip").read_bytes()
    (tmp_path / "tables.zip").write_bytes(whole[:-8])
    assert "tables.zip" in unfit(tmp_path, False)
    (tmp_path / "tables.zip").unlink()
    (tmp_path / "gpu.json").write_text('{"half')
    assert "gpu.json" in unfit(tmp_path, False)


def test_the_machine_is_looked_at_once(tmp_path, monkeypatch, scripts):
    import _gpu_steps
    from _gpu_results import DRY_DEVICE, write_json

    def known(dry, **machine):
        write_json(tmp_path / "gpu.json", {"machine": machine})
        return _gpu_steps.machine_is_known(
            _gpu_steps.Run(out=tmp_path, work=tmp_path, deadline=0.0, dry=dry, grace_s=0.0)
        )

    here, rates = _gpu_steps.versions(), dict.fromkeys("abcd", 1.0)
    assert here["torch"] and here["python"]
    assert known(True, device=DRY_DEVICE, versions=here)
    assert not known(True, device=DRY_DEVICE, versions=here | {"torch": "1.0"})
    assert not known(False, device=DRY_DEVICE, versions=here, rates=rates)
    monkeypatch.setattr(_gpu_steps, "devices_here", lambda: ["nvidia-h200"])
    assert known(False, device="nvidia-h200", versions=here, rates=rates)
    assert not known(False, device="nvidia-h200", versions=here, rates={"special_operations_per_s": 1.0})
    assert not known(False, device="nvidia-h100", versions=here, rates=rates)
    assert not known(False)


def test_working_folders_of_killed_calls_are_removed(tmp_path, monkeypatch, scripts):
    import _gpu_steps

    monkeypatch.setattr(_gpu_steps.tempfile, "tempdir", str(tmp_path))
    code = f"import sys; sys.path.insert(0, {str(scripts)!r}); import _gpu_steps, os, signal; " + (
        "print(_gpu_steps.new_work(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    left = Path(done.stdout.strip())
    (left / "src").mkdir()
    living, strange = _gpu_steps.new_work(), tmp_path / "mixnas-gpu-cache-0"
    strange.mkdir()
    assert not left.exists()
    _gpu_steps.new_work()
    assert living.exists() and strange.exists()


def test_a_step_ends_with_the_call_that_started_it(tmp_path, scripts):
    """The call is killed at once after the start, before the step can have asked the system to end it."""
    step = (
        f"import sys, os, time; sys.path.insert(0, {str(scripts)!r}); sys.argv = ['gpu.py']; import gpu; "
        "gpu.ctypes.CDLL = lambda name: None; gpu._end_with_parent(); print(os.getpid(), flush=True); time.sleep(3600)"
    )
    code = (
        "import subprocess, sys, os, signal\n"
        f"step = subprocess.Popen([sys.executable, '-c', {step!r}], stdin=subprocess.PIPE, process_group=0,"
        " stdout=subprocess.PIPE)\n"
        "print(step.stdout.readline().decode(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert _all_end(int(done.stdout))


def _all_end(group):
    """Whether no process of a group goes on; nobody may be there to fetch what is left of one that was killed."""
    until = time.monotonic() + 300.0
    while time.monotonic() < until:
        states = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
                states += [state] if int(its_group) == group else []
        if set(states) <= {"Z"}:
            return True
        time.sleep(0.05)
    return False


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
