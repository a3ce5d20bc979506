"""Kernels kept in an exported program, run by Triton's interpreter: in a process of its own, which Triton needs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.search_space.formats import format as formats

from ...contracts.format import FEATURES, small

INTERPRETED = """
import sys
from pathlib import Path
import torch
from mixnas import Architecture, IOSpec, Network
from mixnas.search_space.formats import format as formats

path = Path(sys.argv[1])
block = {"mixer": "dwconv", "gate": "output_sigmoid", "channel_mixer": "swiglu"}
network = Network(Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]}),
                  IOSpec("image", (4, 8), 3, 5), generator=torch.Generator().manual_seed(0)).eval().deploy()
kernels = formats.get("torch-export-kernels")
assert kernels.why_not(network) == ""
kernels.write(network, path, {})
called = {str(node.target) for node in torch.export.load(path).graph.nodes if str(node.target).startswith("mixnas.")}
print(*sorted(called))
agreement = formats.verify(kernels, path, network, network.io.example(3))
assert agreement.difference <= 1e-4, agreement
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_stay_in_the_file_and_answer_as_the_network(tmp_path: Path):
    path = tmp_path / "model-kernels.pt2"
    command = [sys.executable, "-c", INTERPRETED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    called = done.stdout.split()
    assert {"mixnas.depthwise_conv.default", "mixnas.glu.default", "mixnas.norm.default"} <= set(called), called


@pytest.mark.skipif(torch.cuda.is_available() or dispatch.INTERPRETING, reason="kernels run here")
def test_without_a_gpu_it_is_refused_by_name():
    assert "run on CUDA devices alone" in formats.get("torch-export-kernels").why_not(small(FEATURES))
