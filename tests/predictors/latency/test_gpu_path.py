"""The GPU's path without a GPU: real Triton kernels in the interpreter, on tiny shapes. The timings are no device's."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CODE = """
import sys
from pathlib import Path
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.units import IOSpec
from mixnas.search_space.space import SearchSpace

plain = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [{"width": [8, 16], "depth": [1, 2], "block": {"mixer": [MIXER, "identity"], "channel_mixer": "swiglu"}}],
}
measure = MeasureConfig(passes=1, window_ms=0.1, min_repeats=1, max_repeats=1, sentinel_repeats=2, max_extra_passes=0)
config = ProfileConfig(budget_s=120, max_networks=2, measure=measure)
folder = Path(sys.argv[1])
try:
    space, io = SearchSpace.from_dict(plain), IOSpec("image", (8, 8), 1, 4)
    profile(space, io, device="interpreter", directory=folder, config=config)
except ConfigError as error:
    assert "no device's" in str(error), error
else:
    raise AssertionError("the fit took the interpreter's timings")
table = MeasurementTable.load(folder, "interpreter", "eager")
assert {what.kind for what in table.subjects.values()} == {"unit", "network"}
assert any(name.startswith("mixnas") for what in table.subjects.values() for name in what.work), "no kernel ran"
assert any(name == "norm_forward.waves" for what in table.subjects.values() for name in what.work), "no launch was seen"
assert not list(folder.glob("*.npz"))

import torch
from mixnas.kernels.tools import resources
from mixnas.kernels.glu import glu, glu_reference

seen = []
gate, up = torch.randn(2, 40, 8), torch.randn(2, 40, 8)
with resources.watching(lambda *launch: seen.append(launch[:3]), "interpreter", run=True):
    out = glu(gate, up)
assert seen == [("glu_forward", (1,), "float32")], seen
torch.testing.assert_close(out, glu_reference(gate, up, "silu"))
"""


@pytest.mark.parametrize("mixer", ["{'name': 'neighborhood_attention', 'window': 3, 'heads': 1}"])
def test_profiling_through_the_kernels(tmp_path, mixer):
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE.replace("MIXER", mixer), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
