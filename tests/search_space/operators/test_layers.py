from __future__ import annotations

import pytest
import torch

from mixnas.kernels import work
from mixnas.kernels.depthwise import taps_of
from mixnas.search_space.operators.layers import DepthwiseConv
from mixnas.search_space.registry import Context


@pytest.mark.parametrize(
    ("kind", "size", "kernel_size"),
    [("image", (5, 6), 3), ("image", (5, 6), (1, 5)), ("sequence", (9,), 5), ("causal", (9,), 4)],
)
def test_the_gate_multiplies_what_is_activated(kind, size, kernel_size):
    generator = torch.Generator().manual_seed(0)
    conv = DepthwiseConv(Context(6, size, kind), kernel_size)
    x, gate = (torch.randn(2, *size, 6, generator=generator, requires_grad=True) for _ in range(2))
    gated, apart = conv(x, "silu", gate), conv(x, "silu") * gate
    torch.testing.assert_close(gated, apart)
    operands = [x, gate, *conv.parameters()]
    for grad, wanted in zip(*(torch.autograd.grad(y.square().sum(), operands) for y in (gated, apart)), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_a_square_convolution_counts_what_it_multiplies_whatever_runs():
    conv, seen = DepthwiseConv(Context(6, (5, 6), "image"), 3), []
    with work.watching(seen.append):
        conv(torch.zeros(2, 5, 6, 6), "silu", torch.zeros(2, 5, 6, 6))
    assert [(one.kernel, one.macs, one.bits) for one in seen] == [("depthwise_conv2d", 2 * 5 * 6 * 6 * 9, 32)]


@pytest.mark.parametrize(("kind", "size"), [("image", (5, 6)), ("sequence", (9,))])
def test_taps_that_were_laid_out_for_a_gpu_are_the_same_and_are_not_copied(kind, size):
    conv, x = DepthwiseConv(Context(6, size, kind), 3), torch.randn(2, *size, 6)
    before, weight = conv(x), conv.weight.detach().clone()
    conv.requires_grad_(False)
    conv.lay_out()
    assert conv.weight.shape == weight.shape and torch.equal(conv.weight, weight)
    torch.testing.assert_close(conv(x), before)
    square = conv.weight if kind == "image" else conv.weight.unsqueeze(2)
    assert taps_of(square).data_ptr() == conv.weight.data_ptr()
