from typing import ClassVar

import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from mixnas.kernels.testing import Case, KernelContract


def _case(shape, bias=False, residual=False, eps=1e-5):
    tensors = {"x": shape, "weight": shape[-1:]}
    if bias:
        tensors["bias"] = shape[-1:]
    if residual:
        tensors["residual"] = shape
    return Case(tensors=tensors, options={"eps": eps})


class TestLayerNorm(KernelContract):
    function = staticmethod(layer_norm)
    reference = staticmethod(layer_norm_reference)
    operator = "mixnas::norm"
    cases: ClassVar = {
        "residual": _case((2, 3, 5, 13), bias=True, residual=True),
        "63 rows": _case((63, 64), bias=True),
        "no bias": _case((7, 129)),
        "wide": _case((3, 1023), bias=True, eps=1e-3),
    }


class TestRmsNorm(KernelContract):
    function = staticmethod(rms_norm)
    reference = staticmethod(rms_norm_reference)
    operator = "mixnas::norm"
    cases: ClassVar = {
        "residual": _case((2, 31, 17), residual=True),
        "63 rows": _case((63, 32)),
        "one channel": _case((5, 1), eps=1e-2),
        "one row": _case((257,)),
    }


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_only_the_sum_is_used(norm):
    """The gradient that reaches the sum alone passes through unchanged."""
    x, residual = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    with dispatch.backend("triton"):
        _, total = norm(x, torch.ones(8, requires_grad=True), residual=residual)
        grads = torch.autograd.grad(total.sum(), (x, residual))
    for grad in grads:
        torch.testing.assert_close(grad, torch.ones(3, 8))


def test_says_what_is_wrong():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="3 channels"):
        layer_norm(x, torch.zeros(4))
    with pytest.raises(ValueError, match="residual"):
        rms_norm(x, torch.zeros(3), residual=x[:1])
