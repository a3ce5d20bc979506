"""The depthwise convolution by products of banded matrices, against the definition, and where a GPU takes it."""

import pytest
import torch

from mixnas.kernels import depthwise, depthwise_banded, dispatch
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference
from mixnas.kernels.fused_block import fused_conv_block, fused_conv_block_reference
from mixnas.kernels.testing import LIMITS, Case, compare
from mixnas.kernels.tools import aot

_MAPS = [
    pytest.param((2, 5, 7, 5), 3, id="odd sizes"),
    pytest.param((3, 4, 4, 17), 7, id="taps beyond the map"),
    pytest.param((1, 3, 70, 3), 31, id="blocks of columns beside each other"),
    pytest.param((1, 2, 130, 2), 9, id="three blocks"),
    pytest.param((1, 1, 17, 1), 5, id="one row"),
]


@pytest.fixture
def banded(monkeypatch):
    monkeypatch.setattr(depthwise_banded, "worth_it", lambda x, *_, **__: x.element_size() == 2)


@pytest.mark.parametrize(("shape", "size"), _MAPS)
def test_whole_numbers_are_exact(banded, shape, size):
    """Operands and sums that bfloat16 holds: output and gradients are the definition's, bit by bit."""
    generator = torch.Generator().manual_seed(size)
    x, grad = (torch.randint(-1, 2, shape, generator=generator).bfloat16() for _ in range(2))
    weight = torch.randint(-1, 2, (shape[-1], 1, size, size), generator=generator).bfloat16()
    weight = torch.where(torch.rand(weight.shape, generator=generator) < 0.3, weight, 0)  # sums below 256
    bias = torch.randint(-4, 5, shape[-1:], generator=generator).bfloat16()
    found = []
    for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        operands = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        with dispatch.backend(backend):
            out = depthwise_conv2d(*operands)
        found.append([out, *torch.autograd.grad(out, operands, grad.to(dtype))])
    for actual, expected in zip(*found, strict=True):
        assert expected.abs().max() <= 256
        assert torch.equal(actual.double(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_fused_behind_it(banded, dtype):
    tensors = {"x_BHWC": (2, 3, 9, 13), "weight_C1KK": (13, 1, 5, 5), "bias": (13,), "gate": (2, 3, 9, 13)}
    case = Case(tensors=tensors, options={"activation": "silu"})
    with dispatch.backend("triton"):
        errors = compare(depthwise_conv2d, depthwise_conv2d_reference, case, dtype)
    assert max(errors.values()) < LIMITS[dtype], errors


def test_a_fused_block_whose_convolution_is_done_before(banded):
    sizes = {"x_BHWC": (2, 3, 5, 13), "weight_C1KK": (13, 1, 7, 7), "conv_bias": (13,), "norm_weight": (13,)}
    sizes |= {"norm_bias": (13,), "up_EC": (24, 13), "up_bias": (24,), "down_CE": (13, 24), "down_bias": (13,)}
    with dispatch.backend("triton"):
        errors = compare(fused_conv_block, fused_conv_block_reference, Case(tensors=sizes), torch.bfloat16)
    assert max(errors.values()) < LIMITS[torch.bfloat16], errors


def _launched(dtype, batch, side, channels, size, call="convolve"):
    x = torch.empty(batch, side, side, channels, dtype=dtype, device="meta")
    taps, geometry = torch.empty(size * size, channels, device="meta"), (size, size, size // 2, size // 2)
    if call == "convolve":
        launches = aot.launches_of(lambda: depthwise.convolve(x, taps, None, None, "none", geometry), "any")
    else:
        launches = aot.launches_of(lambda: depthwise.weight_gradient(x, x, geometry), "any")
    return [launch.name for launch in launches]


def test_where_a_gpu_takes_it():
    """Maps of 16 bits with enough to multiply; never float32, whose digits the tensor cores would round."""
    products = ["depthwise_planes", "depthwise_bands", "depthwise_banded", "depthwise_maps"]
    assert _launched(torch.bfloat16, 32, 56, 64, 7) == products
    assert _launched(torch.float16, 32, 14, 256, 31) == products
    assert _launched(torch.float32, 32, 56, 64, 31) == ["depthwise_forward"]
    assert _launched(torch.bfloat16, 32, 56, 64, 3) == ["depthwise_forward"]
    assert _launched(torch.bfloat16, 1, 7, 64, 7) == ["depthwise_forward"]
    gradient = _launched(torch.bfloat16, 32, 56, 64, 7, "gradient")
    assert gradient == ["depthwise_planes", "depthwise_planes", "depthwise_correlation"]
    x = torch.empty(32, 56, 56, 64, dtype=torch.bfloat16)
    assert not depthwise_banded.worth_it(x, 31, 31), "on a CPU it is for tests that ask for it"
