from typing import ClassVar

import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.kernels.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_reference
from mixnas.kernels.testing import Case, KernelContract


def _case(batch, length, channels, size, activation="none", bias=False, gate=False, causal=True):
    tensors = {"x_BLC": (batch, length, channels), "weight_C1K": (channels, 1, size)}
    if bias:
        tensors["bias"] = (channels,)
    if gate:
        tensors["gate"] = tensors["x_BLC"]
    return Case(tensors=tensors, options={"activation": activation, "causal": causal})


class TestDepthwiseConv1d(KernelContract):
    function = staticmethod(depthwise_conv1d)
    reference = staticmethod(depthwise_conv1d_reference)
    operator = "mixnas::depthwise_conv"
    cases: ClassVar = {
        "k4 causal all fused": _case(2, 17, 5, 4, "silu", bias=True, gate=True),
        "k3 centred": _case(2, 63, 13, 3, "gelu", bias=True, causal=False),
        "k1": _case(1, 7, 16, 1, "sigmoid"),
        "k15 longer than the sequence": _case(2, 11, 3, 15, "relu"),
        "k31 centred": _case(1, 29, 2, 31, gate=True, causal=False),
        "one position": _case(1, 1, 1, 4),
    }


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_causal_does_not_look_ahead(backend):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 9, 3, generator=generator), torch.randn(3, 1, 4, generator=generator)
    changed = x.clone()
    changed[:, 5:] += 1
    with dispatch.backend(backend):
        before, after = depthwise_conv1d(x, weight), depthwise_conv1d(changed, weight)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])


def test_says_what_is_wrong():
    x = torch.zeros(1, 4, 3)
    with pytest.raises(ValueError, match="must be odd"):
        depthwise_conv1d(x, torch.zeros(3, 1, 4), causal=False)
    with pytest.raises(ValueError, match=r"\(C, 1, K\)"):
        depthwise_conv1d(x, torch.zeros(4, 1, 4))
    with pytest.raises(ValueError, match="activation"):
        depthwise_conv1d(x, torch.zeros(3, 1, 4), activation="swish")
