"""gpu.py end to end on a CPU, as it would be called on a lent machine: not installed, without optuna, ray or pandas."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixnas.kernels import dispatch

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"

# Found by every process of the run: what is not on a lent machine cannot be imported, the package is not installed, and
# a step with a fault does it after each result that it keeps. Nothing waits for a length of time: a step that hangs has
# used up its time as soon as it does, and one that ends badly is not tried again in the same call.
_SITE = """
import importlib.util, os, signal, sys, time

class Without:
    def __init__(self, finder):
        self._finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"optuna", "ray", "pandas", "plotly", "moocore", "pytest", "hypothesis"}:
            return None
        return self._finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self._finder, name)

class Changed:
    def __init__(self, name, change):
        self._name, self._change = name, change
    def find_spec(self, name, path=None, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        plain = spec.loader.exec_module
        def exec_module(module):
            plain(module)
            self._change(module)
        spec.loader.exec_module = exec_module
        return spec

def faulty(module):
    keep = module.Results.keep
    def faulty(self, key, item):
        keep(self, key, item)
        if fault == "fail":
            raise RuntimeError("it was made to fail")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        print("it was made to hang", flush=True)
        time.sleep(3600)
    module.Results.keep = faulty

def impatient(module):
    def wait(process, seconds):
        while process.poll() is None:
            time.sleep(0.1)
            if open(log).read().endswith("it was made to hang\\n"):
                raise module.subprocess.TimeoutExpired("step", seconds)
        return process.returncode
    module.wait, module._TRIES = wait, 1

step = dict(zip(sys.orig_argv, sys.orig_argv[1:])).get("--step", "")
fault = dict(pair.split(":") for pair in os.environ.get("GPU_FAULTS", "").split(",") if pair).get(step)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if "editable" not in repr(finder)]
log = os.environ.get("GPU_LOG")
if fault:
    sys.meta_path.insert(0, Changed("_gpu_results", faulty))
if os.environ.get("GPU_FAULTS") and not step:
    sys.meta_path.insert(0, Changed("_gpu_steps", impatient))
"""


def _call(tmp_path, *options, faults=""):
    site, out = tmp_path / "site", tmp_path / "out"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITE)
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment = {"PYTHONPATH": str(site), "GPU_FAULTS": faults, "GPU_LOG": str(out / "log.txt")}
    command = [sys.executable, str(_SCRIPT), "--dry", "--out", str(out), *options]
    done = subprocess.run(
        command, env=kept | environment | {"TMPDIR": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True
    )
    return done, out


def _steps(out):
    return json.loads((out / "gpu.json").read_text())["calls"][-1]["steps"]


_STEPS = ("right", "tuned", "fast", "measured", "trained")


def _read(out):
    return {step: json.loads((out / f"{step}.json").read_text()) for step in _STEPS}


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton isn't installed")
def test_a_dry_run_goes_on_after_faults_to_its_end_and_is_no_devices(tmp_path):
    """Each step ends badly after its first result; the next call goes on from there. It has all the time it wants.

    On stubs each step does each, and is tried again (test_gpu_steps).
    """
    faults = {"right": "die", "tuned": "fail", "fast": "hang", "measured": "die", "trained": "fail"}
    done, out = _call(tmp_path, "--minutes", "600", faults=",".join(f"{s}:{fault}" for s, fault in faults.items()))
    assert done.returncode == 1, done.stderr
    steps = _steps(out)
    states = {"die": "died", "fail": "failed", "hang": "timed out"}
    assert steps["machine"]["state"] == "done"
    assert {step: steps[step]["state"] for step in _STEPS} == {step: states[fault] for step, fault in faults.items()}
    assert {steps[step]["why"] for step in ("tuned", "trained")} == {"RuntimeError: it was made to fail"}
    first = _read(out)
    assert all(data["items"] and not data["complete"] for data in first.values()), "what each had kept is there"
    assert done.stdout.splitlines()[-1].startswith(("  ", "=="))

    done, out = _call(tmp_path, "--minutes", "600")
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    assert {name: step["state"] for name, step in _steps(out).items()} == dict.fromkeys(_STEPS, "done") | {
        "machine": "known"
    }
    machine = json.loads((out / "gpu.json").read_text())["machine"]
    assert not any(machine["installed"][name] for name in ("optuna", "ray", "pandas"))
    assert len(list(out.iterdir())) == 8 and all(path.stat().st_size < 2**20 for path in out.iterdir())
    found = _read(out)
    for step, data in found.items():
        assert data["dry"] and data["device"].startswith("dry run") and data["complete"], (step, data["left_out"])
    for step in ("right", "tuned", "fast"):  # the others' first results are of a part that was not whole
        for key, item in first[step]["items"].items():
            assert found[step]["items"][key] == item or item.get("state") in ("timed", "tuning"), "it is not done again"
    assert all(item["right"] for item in found["right"]["items"].values())
    assert len(found["right"]["items"]) > 60
    assert {item["state"] for item in found["tuned"]["items"].values()} == {"tuned"}
    for item in found["fast"]["items"].values():
        assert all(entry["right"] for entry in item["implementations"].values() if entry["same_function"])
    (measured,) = found["measured"]["items"].values()
    assert measured["held_out"]["networks"] == 4 and measured["units"] > 0
    assert all(item["right"] for item in found["trained"]["items"].values())
    lines = done.stdout.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("=="))) :]
    assert "a dry run: no device's figures" in table[0] and len(table) < 47
    assert f"triton {dispatch.triton.__version__}" in table[0]
    assert not list(tmp_path.glob("mixnas-gpu-*/src")), "no checkout stays"
    taken = subprocess.run([sys.executable, str(_SCRIPT), "--take", str(out)], capture_output=True, text=True)
    assert taken.returncode == 1 and "dry run" in taken.stderr


def _gpu(*options):
    return subprocess.run(
        [sys.executable, str(_SCRIPT), *map(str, options)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_without_a_gpu_it_says_so_at_once(tmp_path):
    done = _gpu("--minutes", "1", "--out", tmp_path / "out")
    assert done.returncode == 1 and "torch finds none here" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "out").iterdir()), "no step was started"


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "inf", "soon"])
def test_minutes_are_a_length_of_time(tmp_path, minutes):
    done = _gpu("--dry", "--minutes", minutes, "--out", tmp_path / "out")
    assert done.returncode == 2 and "argument --minutes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_folders_that_are_none_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for options, says in (
        (("--dry", "--out", file), "no folder can be made there"),
        (("--dry", "--out", file / "below"), "no folder can be made there"),
        (("--table", file), "no results of gpu.py"),
        (("--table", tmp_path / "nothing"), "no results of gpu.py"),
        (("--take", file), "no results of gpu.py"),
    ):
        done = _gpu(*options)
        assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    done = _gpu("--out", tmp_path, "--step", "fast")
    assert done.returncode == 2 and "use --only" in done.stderr


def test_a_dry_run_and_a_real_one_do_not_mix(tmp_path):
    (tmp_path / "gpu.json").write_text('{"dry": true}')
    done = _gpu("--out", tmp_path)
    assert done.returncode == 1 and "Give another --out" in done.stderr
    (tmp_path / "gpu.json").unlink()
    whole = {"format": 1, "device": "nvidia-h100", "dry": False, "items": {"a": {}}, "left_out": {}, "seconds": 1.0}
    (tmp_path / "right.json").write_text(json.dumps(whole))
    done = _gpu("--dry", "--out", tmp_path)
    assert done.returncode == 1 and "right.json: is of a run without --dry" in done.stderr
    assert json.loads((tmp_path / "right.json").read_text()) == whole
