from typing import ClassVar

import pytest
import torch

from mixnas.kernels import dispatch, fused_block
from mixnas.kernels.fused_block import fused_conv_block, fused_conv_block_reference
from mixnas.kernels.testing import Case, KernelContract, relative_error
from mixnas.search_space.operators.mixers.convnext import ConvNeXt
from mixnas.search_space.registry import Context


def _case(size, kernel_size, hidden, norm="layer", activation="gelu", skip=True):
    channels = size[-1]
    tensors = {
        "x_BHWC": size,
        "weight_C1KK": (channels, 1, kernel_size, kernel_size),
        "conv_bias": (channels,),
        "norm_weight": (channels,),
        "up_EC": (hidden, channels),
        "up_bias": (hidden,),
        "down_CE": (channels, hidden),
        "down_bias": (channels,),
    }
    options = {"norm": norm, "activation": activation, "skip": skip}
    if norm == "layer":
        tensors["norm_bias"] = (channels,)
    else:
        options["norm_bias"] = None
    return Case(tensors=tensors, options=options)


class TestFusedConvBlock(KernelContract):
    function = staticmethod(fused_conv_block)
    reference = staticmethod(fused_conv_block_reference)
    operator = "mixnas::fused_conv_block"
    cases: ClassVar = {
        "layer": _case((1, 3, 5, 17), 3, 65),
        "rms without skip": _case((2, 5, 7, 24), 5, 96, "rms", "silu", skip=False),
        "wider than the kernel takes": _case((1, 2, 2, 129), 3, 7, activation="relu"),
    }


def test_says_what_is_wrong():
    x, row, weight = torch.zeros(1, 2, 2, 4), torch.zeros(4), torch.zeros(4, 1, 3, 3)
    up, bias = torch.zeros(8, 4), torch.zeros(8)
    with pytest.raises(ValueError, match="norm 'batch'"):
        fused_conv_block(x, weight, row, row, row, up, bias, up.t(), row, norm="batch")
    with pytest.raises(ValueError, match="no bias"):
        fused_conv_block(x, weight, row, row, row, up, bias, up.t(), row, norm="rms")
    with pytest.raises(ValueError, match="mirror"):
        fused_conv_block(x, weight, row, row, row, up, bias, up, row)


def _launched(monkeypatch):
    """Names of the kernels that are launched from now on."""
    names, launch = [], fused_block.launch

    def noted(kernel, *arguments, **options):
        names.append(kernel)
        return launch(kernel, *arguments, **options)

    monkeypatch.setattr(fused_block, "launch", noted)
    return names


def test_the_convnext_mixer_is_one_kernel(monkeypatch):
    mixer = ConvNeXt(Context(12, (4, 5), "image"), kernel_size=5, expansion=2.0)
    x = torch.randn(2, 4, 5, 12, generator=torch.Generator().manual_seed(0))
    with dispatch.backend("aten"):
        expected = mixer(x)
        wanted = torch.autograd.grad(expected.square().sum(), list(mixer.parameters()))
    launched = _launched(monkeypatch)
    with dispatch.backend("triton"):
        y = mixer(x)
        assert launched == [fused_block.fused_block_forward_kernel]
        found = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
    assert relative_error(y, expected) < 1e-5
    for grad, right in zip(found, wanted, strict=True):
        assert relative_error(grad, right) < 1e-5


@pytest.mark.parametrize("skip", [False, True])
def test_under_autocast_products_are_narrow_and_the_skip_is_not(monkeypatch, skip):
    """As ATen's are, and whether or not the products' weights are stored narrow already."""
    case = TestFusedConvBlock.cases["layer"]
    tensors = {name: tensor.requires_grad_() for name, tensor in case.draw(torch.float32).items()}
    if skip:  # so large that what is rounded away of x would be seen, and what is rounded in the block is not
        tensors["x_BHWC"] = (1e4 * tensors["x_BHWC"].detach()).requires_grad_()
    reference = fused_conv_block_reference(**tensors, skip=skip)
    wanted = torch.autograd.grad(reference.square().sum(), list(tensors.values()))
    launched = _launched(monkeypatch)
    with dispatch.backend("triton"), torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_conv_block(**tensors, skip=skip)
        narrow = {name: t.detach().bfloat16() if name[:2] in ("up", "do") else t for name, t in tensors.items()}
        assert torch.equal(fused_conv_block(**narrow, skip=skip), out)
    assert launched == [fused_block.fused_block_forward_kernel] * 2
    assert out.dtype == (torch.float32 if skip else torch.bfloat16)
    assert 0 < relative_error(out, reference) < (1e-4 if skip else 1e-2)
    found = torch.autograd.grad(out.float().square().sum(), list(tensors.values()))
    for name, grad, right in zip(tensors, found, wanted, strict=True):
        assert grad.dtype == torch.float32, name
        assert relative_error(grad, right) < 2e-2, name
