"""gpu.py end to end on a CPU, as it would be called on a lent machine: not installed, without optuna, ray or pandas."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixnas.kernels import dispatch

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"

# Found by every process of the run: what is not on a lent machine cannot be imported, the package is not installed, and
# a step with a fault does it after each result that it keeps.
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

class Faulty:
    def find_spec(self, name, path=None, target=None):
        if name != "_gpu_results":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        plain = spec.loader.exec_module
        def exec_module(module):
            plain(module)
            keep = module.Results.keep
            def faulty(self, key, item):
                keep(self, key, item)
                if fault == "fail":
                    raise RuntimeError("it was made to fail")
                if fault == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(3600)
            module.Results.keep = faulty
        spec.loader.exec_module = exec_module
        return spec

step = dict(zip(sys.orig_argv, sys.orig_argv[1:])).get("--step", "")
fault = dict(pair.split(":") for pair in os.environ.get("GPU_FAULTS", "").split(",") if pair).get(step)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if "editable" not in repr(finder)]
if fault:
    sys.meta_path.insert(0, Faulty())
"""


def _call(tmp_path, *options, faults=""):
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITE)
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment = kept | {"PYTHONPATH": str(site), "GPU_FAULTS": faults, "TMPDIR": str(tmp_path)}
    out = tmp_path / "out"
    command = [sys.executable, str(_SCRIPT), "--dry", "--out", str(out), *options]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    return done, out, time.monotonic() - began


def _steps(out):
    return json.loads((out / "gpu.json").read_text())["calls"][-1]["steps"]


def _read(out, step):
    return json.loads((out / f"{step}.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton isn't installed")
def test_a_dry_run_goes_through_and_is_no_devices(tmp_path):
    done, out, _ = _call(tmp_path, "--minutes", "8")
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()
    assert {name: step["state"] for name, step in _steps(out).items()} == dict.fromkeys(
        ("machine", "right", "tuned", "fast", "measured", "trained"), "done"
    )
    machine = json.loads((out / "gpu.json").read_text())["machine"]
    assert not any(machine["installed"][name] for name in ("optuna", "ray", "pandas"))
    assert len(list(out.iterdir())) == 8 and all(path.stat().st_size < 2**20 for path in out.iterdir())
    found = {step: _read(out, step) for step in ("right", "tuned", "fast", "measured", "trained")}
    for step, data in found.items():
        assert data["dry"] and data["device"].startswith("dry run") and data["complete"], (step, data["left_out"])
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
    # A second call has nothing left to do where nothing has changed, and leaves no checkout or other folder behind.
    before = found["right"]["items"]
    done, out, _ = _call(tmp_path, "--minutes", "2", "--only", "right")
    assert done.returncode == 0 and _read(out, "right")["items"] == before
    assert not list(tmp_path.glob("mixnas-gpu-*/src"))
    taken = subprocess.run([sys.executable, str(_SCRIPT), "--take", str(out)], capture_output=True, text=True)
    assert taken.returncode == 1 and "dry run" in taken.stderr


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton isn't installed")
def test_steps_that_fail_hang_and_die_cost_no_other(tmp_path):
    """The real steps; on stubs each of them does each (test_gpu_steps)."""
    faults = "right:die,tuned:fail,fast:hang,measured:die,trained:fail"
    done, out, took = _call(tmp_path, "--minutes", "2.5", "--grace", "2", faults=faults)
    assert done.returncode == 1 and took < 2.5 * 60 + 15
    steps = _steps(out)
    assert steps["machine"]["state"] == "done"
    assert steps["fast"]["state"] == "timed out"
    for step, fault in (("right", "died"), ("measured", "died"), ("tuned", "failed"), ("trained", "failed")):
        assert steps[step]["tries"][0].startswith(fault), steps
    for step in ("right", "tuned", "fast", "measured", "trained"):
        assert _read(out, step)["items"], f"{step}: what it had kept is there"
    assert done.stdout.splitlines()[-1].startswith(("  ", "=="))


def test_without_a_gpu_it_says_so_and_ends(tmp_path):
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), "--minutes", "1", "--out", str(tmp_path / "out")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "torch finds none here" in done.stdout


def test_a_dry_run_and_a_real_one_do_not_mix(tmp_path):
    (tmp_path / "gpu.json").write_text('{"dry": true}')
    done = subprocess.run([sys.executable, str(_SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "Give another --out" in done.stderr
