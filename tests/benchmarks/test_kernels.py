"""benchmarks/kernels.py where only torch, numpy and the folder are: nothing installed, the package included."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mixnas.kernels import dispatch

_ROOT = Path(__file__).parents[2]
_BARE = """
import runpy, sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"yaml", "sklearn", "optuna", "ray", "rich", "safetensors", "plotly", "moocore"}:
            raise ModuleNotFoundError(name)
sys.meta_path[:] = [Bare()] + [finder for finder in sys.meta_path if "editable" not in repr(finder)]
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def _run(tmp_path, *options):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    output = tmp_path / "out.json"
    command = [sys.executable, "-c", _BARE, str(_ROOT / "benchmarks" / "kernels.py"), *options, "--output", str(output)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_runs_the_grid_on_aten_and_says_so(tmp_path):
    printed, result = _run(tmp_path, "--label", "4096x", "--minutes", "600")
    assert "No CUDA device" in printed
    assert result["complete"]
    assert result["ran"].startswith("ATen only")
    assert {"torch", "cpu", "commit", "sources_sha256", "time"} <= set(result["provenance"])
    assert {entry["implementation"] for entry in result["left_out"]} == {"mixnas (Triton)", "ATen, torch.compile"}
    assert [point["family"] for point in result["points"]] == ["norm", "glu"]
    for point in result["points"]:
        entry = point["implementations"]["ATen"]
        assert entry["right"]
        times = entry["times"]["step, eager, cold"]
        assert 0 < times["p20_us"] <= times["p50_us"] <= times["p80_us"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_says_what_it_had_no_time_for(tmp_path):
    printed, result = _run(tmp_path, "--label", "4096x", "--minutes", "0")
    assert printed.count("left out, out of time") == 2
    late = [entry["point"] for entry in result["left_out"] if entry["why"] == "out of time"]
    assert late == ["norm: layer 4096x32 with residual", "glu: sigmoid 4096x128"]
    assert [point["implementations"] for point in result["points"]] == [{}, {}]


@pytest.fixture(scope="module")
def benchmark():
    path = _ROOT / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("kernels_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
    return module


def test_a_row_is_repeated_less_where_it_would_take_longer_than_its_share(benchmark, monkeypatch):
    timer = benchmark.Timer(0.01, 3, 50)
    slow = timer(lambda: time.sleep(0.02), share=0.0)
    assert slow["repeats"] == 1
    assert slow["shortened"].startswith("3 repeats wanted, 1")
    assert slow["p50_us"] >= 20_000
    assert "shortened" not in timer(lambda: time.sleep(0.02))
    assert timer(lambda: time.sleep(0.02))["repeats"] == 3
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: 0.0)  # a call that takes no time
    assert timer(lambda: None)["repeats"] == 50


def test_points_share_what_time_is_left(benchmark, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    budget = benchmark.Budget(100.0, points=4)
    budget.start_point()
    assert budget.share(5) == 5.0
    now[0] = 10.0  # a fast point leaves its time to the others
    budget.start_point()
    assert budget.share(1) == 30.0
    now[0] = 90.0  # a slow one takes it from them
    assert budget.share(1) == 0.0
    budget.start_point()
    assert budget.share(1) == 5.0
    assert budget.allows(point="a")
    now[0] = 101.0
    assert not budget.allows(point="b", figure="c")
    assert budget.left_out == [{"point": "b", "figure": "c", "why": "out of time"}]


@pytest.mark.parametrize("where", ["output", "gradient of gate"])
def test_a_wrong_last_example_is_found(benchmark, where):
    """A grid that does not reach the end of a large shape is right at a small one."""
    point = next(point for point in benchmark.grid() if point.label == "sigmoid 4096x128")

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate):
            return gate.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.cat((grad[:-1], 2 * grad[-1:])) if len(grad) > 2 else grad

    def function(gate, up, activation):
        if where != "output":
            return point.function(Spoilt.apply(gate), up, activation=activation)
        out = point.function(gate, up, activation=activation)
        return torch.cat((out[:-1], 2 * out[-1:])) if len(out) > 2 else out

    tensors = point.case.draw(torch.float32)
    with dispatch.backend("aten"):
        right = benchmark.check(point, point.function, tensors, small=True)
        wrong = benchmark.check(point, function, tensors, small=True)
    assert max(right.values()) < 1e-5
    assert wrong[f"{where}, whole shape"] > 0.1
    assert wrong["output 0"] < 1e-5
