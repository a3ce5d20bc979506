import os
import subprocess
import sys

import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference
from mixnas.kernels.selective_scan import selective_scan
from mixnas.kernels.testing import relative_error

_HIDE_TRITON = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
"""


def _python(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_choice_on_a_cpu():
    code = "import torch; from mixnas.kernels.dispatch import choose; print(choose(torch.ones(1)))"
    assert _python(code, TRITON_INTERPRET="0") == ["aten"]
    if dispatch.HAS_TRITON:
        assert dispatch.INTERPRETING, "these tests' own process, see conftest.py"
        assert dispatch.choose(torch.ones(1)) == "triton"


def test_works_without_triton():
    """Every family loads and computes where Triton isn't installed."""
    code = (
        "import importlib, torch; from mixnas.kernels import FAMILIES\n"
        "for family in FAMILIES: importlib.import_module('mixnas.kernels.' + family)\n"
        "from mixnas.kernels.glu import glu; print(glu(torch.ones(2), torch.ones(2)).shape[0])\n"
        "from mixnas.kernels import dispatch; print(dispatch.HAS_TRITON)"
    )
    assert _python(_HIDE_TRITON + code) == ["2", "False"]


def test_backend_is_scoped():
    x = torch.zeros(1)
    before = dispatch.choose(x)
    with dispatch.backend("reference"):
        assert dispatch.choose(x) == "reference"
        with dispatch.backend("aten"):
            assert dispatch.choose(x) == "aten"
        assert dispatch.choose(x) == "reference"
    assert dispatch.choose(x) == before


def test_an_unknown_backend_names_the_known():
    with pytest.raises(ValueError, match="triton, aten, reference"), dispatch.backend("cuda"):
        pass


def test_dtypes_that_no_kernel_takes_run_on_aten():
    assert dispatch.choose(torch.zeros(1, dtype=torch.float64)) == "aten"
    assert dispatch.choose(torch.zeros(1), torch.zeros(1, dtype=torch.int64)) == "aten"


def test_autocast_reaches_the_kernels():
    """Activations in autocast's type, taps, biases and decays as they are; gradients in the operands' types."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 4, 3, generator=generator, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, generator=generator, requires_grad=True)
    with dispatch.backend("triton"), torch.autocast("cpu", torch.bfloat16):
        out = depthwise_conv2d(x, weight)
        tokens, row = x.flatten(1, 2), torch.zeros(3)
        b_c = torch.ones(2, 1, 16, 2)
        narrow = selective_scan(tokens, tokens, -torch.ones(3, 2), *b_c, row, row)
    assert out.dtype == narrow.dtype == torch.bfloat16
    exact = depthwise_conv2d_reference(x.detach().bfloat16().double(), weight.detach().double())
    assert relative_error(out, exact) < 4e-3
    gradients = torch.autograd.grad(out.float().sum(), (x, weight))
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]
    assert dispatch.as_autocast(x, None) == (x, None)
