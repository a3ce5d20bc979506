"""benchmarks/kernels.py where only torch, numpy and the folder are: nothing installed, the package included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_runs_the_grid_on_aten_and_says_so(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _BARE, str(_ROOT / "benchmarks" / "kernels.py"), "--label", "4096x"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out.json")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "No CUDA device" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["ran"].startswith("ATen only")
    assert {"torch", "cpu", "commit", "time"} <= set(result["provenance"])
    assert [point["family"] for point in result["points"]] == ["norm", "glu"]
    for point in result["points"]:
        entry = point["implementations"]["ATen"]
        assert entry["right"]
        times = entry["times"]["step, eager, cold"]
        assert 0 < times["p20_us"] <= times["p50_us"] <= times["p80_us"]
