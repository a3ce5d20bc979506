from typing import ClassVar

import pytest
import torch

from mixnas.kernels.fused_block import fused_conv_block, fused_conv_block_reference
from mixnas.kernels.testing import Case, KernelContract


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
