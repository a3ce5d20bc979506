from typing import ClassVar

import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.kernels.depthwise import cropped, laid_out, taps_of, valid_taps
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference
from mixnas.kernels.testing import Case, KernelContract, compare


def _case(batch, height, width, channels, size, activation="none", bias=False, gate=False):
    tensors = {"x_BHWC": (batch, height, width, channels), "weight_C1KK": (channels, 1, size, size)}
    if bias:
        tensors["bias"] = (channels,)
    if gate:
        tensors["gate"] = tensors["x_BHWC"]
    return Case(tensors=tensors, options={"activation": activation})


class TestDepthwiseConv2d(KernelContract):
    function = staticmethod(depthwise_conv2d)
    reference = staticmethod(depthwise_conv2d_reference)
    operator = "mixnas::depthwise_conv"
    cases: ClassVar = {
        "k3 all fused": _case(2, 3, 5, 13, 3, "silu", bias=True, gate=True),
        "k3 of 63 columns": _case(1, 2, 63, 8, 3),
        "k5 gelu": _case(1, 3, 5, 17, 5, "gelu", bias=True),
        "k7 relu": _case(3, 4, 4, 16, 7, "relu"),
        "k7 sigmoid gate": _case(1, 3, 8, 3, 7, "sigmoid", gate=True),
        "k13": _case(1, 2, 9, 4, 13, bias=True),
        "one pixel": _case(1, 1, 1, 1, 3),
        "k9 of which a map reaches 5 by 7": _case(2, 3, 4, 5, 9, bias=True),
    }


def test_taps_that_no_position_reaches_are_cropped():
    assert cropped((1, 3, 40, 8), (31, 31, 15, 15)) == ((13, 5, 2), (0, 31, 15))
    assert cropped((1, 1, 2, 8), (1, 4, 0, 3)) == ((0, 1, 0), (2, 2, 1)), "causal: its own and one before"


def test_taps_in_the_order_of_the_kernels_are_not_copied():
    weight = torch.randn(5, 1, 3, 3)
    kept = laid_out(weight)
    assert torch.equal(kept, weight) and taps_of(kept).data_ptr() == kept.data_ptr()
    copied, half = taps_of(weight.bfloat16()), weight.bfloat16()
    assert torch.equal(copied, half[:, 0].permute(1, 2, 0).reshape(9, 5).float())
    assert copied.dtype == torch.float32 and copied.is_contiguous()


@pytest.mark.slow
def test_the_largest_kernel():
    with dispatch.backend("triton"):
        errors = compare(depthwise_conv2d, depthwise_conv2d_reference, _case(1, 2, 17, 3, 31), torch.float32)
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("size", [5, 7, 9, 13, 31])
@pytest.mark.parametrize("area", [(4, 4), (8, 8), (9, 17), (20, 1)])
def test_the_cpu_backward_at_every_branch(size, area):
    case = _case(2, *area, 3, size, bias=True)
    with dispatch.backend("aten"):
        errors = compare(depthwise_conv2d, depthwise_conv2d_reference, case, torch.float32)
    assert max(errors.values()) < 1e-5, errors


# torch's tracer makes an instance of a `torch.autograd.Function`, which torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("area", [(4, 4), (9, 9)])
def test_the_cpu_backward_is_traced_whole(area):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *area, 3, generator=generator, requires_grad=True)
    weight = torch.randn(3, 1, 5, 5, generator=generator, requires_grad=True)
    with dispatch.backend("aten"):
        compiled = torch.compile(depthwise_conv2d, backend="aot_eager", fullgraph=True)
        traced = torch.autograd.grad(compiled(x, weight).square().sum(), (x, weight))
        eager = torch.autograd.grad(depthwise_conv2d(x, weight).square().sum(), (x, weight))
    torch.testing.assert_close(traced, eager)


def test_cpu_second_derivatives():
    x = torch.randn(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    with dispatch.backend("aten"):
        assert torch.autograd.gradgradcheck(depthwise_conv2d, (x, weight))


@pytest.mark.parametrize(("size", "taps", "before"), [(5, 3, 1), (4, 31, 15), (7, 4, 3), (1, 1, 0), (3, 7, 3)])
def test_the_taps_that_are_counted_fall_inside(size, taps, before):
    inside = sum(0 <= i + j - before < size for i in range(size) for j in range(taps))
    assert valid_taps(size, taps, before) == inside


def test_float64_takes_aten():
    x, weight = torch.randn(1, 3, 3, 2, dtype=torch.float64), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    assert dispatch.choose(x, weight) == "aten"


def test_says_what_is_wrong():
    x = torch.zeros(1, 4, 4, 3)
    with pytest.raises(ValueError, match="K odd"):
        depthwise_conv2d(x, torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match="K odd"):
        depthwise_conv2d(x, torch.zeros(4, 1, 3, 3))
    with pytest.raises(ValueError, match="gate"):
        depthwise_conv2d(x, torch.zeros(3, 1, 3, 3), gate=x[:, :2])
    with pytest.raises(ValueError, match="activation 'swish'"):
        depthwise_conv2d(x, torch.zeros(3, 1, 3, 3), activation="swish")
