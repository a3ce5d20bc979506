from __future__ import annotations

import pytest
import torch
from torch import nn

from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.cost import cost, op_cost
from mixnas.search_space.network import IOSpec
from mixnas.search_space.operators.mixers.convnext import ConvNeXt
from mixnas.search_space.registry import Context

from ..proofs.catalogue import relative_error


class Permute(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(*self.order)


def plain(mixer, width, size, kernel_size, kind):
    """The same block from torch's own layers, in float64."""
    if len(size) == 2:
        conv = nn.Conv2d(width, width, kernel_size, padding="same", groups=width)
        around = (Permute(0, 3, 1, 2), conv, Permute(0, 2, 3, 1))
    else:
        before = kernel_size - 1 if kind == "causal" else kernel_size // 2
        conv = nn.Conv1d(width, width, kernel_size, groups=width)
        pad = nn.ConstantPad1d((before, kernel_size - 1 - before), 0.0)
        around = (Permute(0, 2, 1), pad, conv, Permute(0, 2, 1))
    hidden = mixer.up.out_features
    norm, up, down = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, hidden), nn.Linear(hidden, width)
    for layer, own in ((conv, mixer.conv), (norm, mixer.norm), (up, mixer.up), (down, mixer.down)):
        layer.load_state_dict(own.state_dict())
    return nn.Sequential(*around, norm, up, nn.GELU(), down).double()


@pytest.mark.parametrize(
    ("width", "size", "kind", "kernel_size", "expansion"),
    [
        (17, (5, 7), "image", 7, 4.0),
        (24, (9, 8), "image", 3, 0.25),
        (9, (4, 4), "image", 11, 2.5),
        (130, (3, 3), "image", 5, 1.0),
        (12, (13,), "sequence", 5, 3.0),
        (12, (13,), "causal", 7, 3.0),
    ],
)
def test_equals_torchs_own_layers(width, size, kind, kernel_size, expansion):
    generator = torch.Generator().manual_seed(0)
    mixer = ConvNeXt(Context(width, size, kind), kernel_size=kernel_size, expansion=expansion)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    oracle = plain(mixer, width, size, kernel_size, kind)
    x = torch.randn(2, *size, width, generator=generator, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    y, expected = mixer(x), oracle(x64)
    assert relative_error(y, expected.detach()) < 1e-5
    cotangent = torch.randn(y.shape, generator=generator)
    found = torch.autograd.grad(y, [x, *mixer.parameters()], cotangent)
    wanted = torch.autograd.grad(expected, [x64, *oracle.parameters()], cotangent.double())
    for grad, right in zip(found, wanted, strict=True):
        assert relative_error(grad, right) < 1e-5


def test_numbers_of_convnext_tiny():
    """28,589,128 parameters and 4.456 G multiply-accumulates (catalogue b, DCLS); their layer scales hold 6,624."""
    widths, depths, size = (96, 192, 384, 768), (3, 3, 9, 3), 224
    outside_params = 48 * 96 + 96 + 2 * 96 + 2 * 768 + 768 * 1000 + 1000  # stem and its norm, head and its norm
    outside_macs = 56 * 56 * 48 * 96 + 768 * 1000
    params = macs = 0
    size //= 4
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if i:
            size //= 2
            outside_params += 2 * widths[i - 1] + 4 * widths[i - 1] * width + width
            outside_macs += size * size * 4 * widths[i - 1] * width
        context = Context(width, (size, size), "image")
        own = op_cost("mixer", Op("convnext", (("expansion", 4.0), ("kernel_size", 7))), None, context, context)
        macs += depth * own.macs
        params += depth * own.params
    assert params + outside_params + 6_624 == 28_589_128
    assert round((macs + outside_macs) / 1e9, 3) == 4.456


@pytest.mark.parametrize(("kind", "size"), [("image", (6, 6)), ("sequence", (10,)), ("causal", (10,))])
def test_a_networks_multiply_accumulates_are_counted_once(kind, size):
    io = IOSpec(kind, size, 8, 3)

    def of(mixer):
        stem = {"image": {"name": "conv", "stride": 1}}.get(kind, "linear")
        block = {"mixer": mixer, "channel_mixer": "none"}
        return cost(Architecture.from_dict({"stem": stem, "stages": [{"width": 8, "block": block}]}), io)

    with_it, without = of({"name": "convnext", "kernel_size": 5, "expansion": 3}), of("identity")
    window = 5 ** len(size)
    assert with_it.params - without.params == 8 * window + 8 + 16 + 24 * 8 + 24 + 24 * 8 + 8
    tokens = Context(8, size, kind).tokens
    assert with_it.macs - without.macs == tokens * 8 * (window + 2 * 24)


@pytest.mark.parametrize(("kind", "size"), [("sequence", (9,)), ("causal", (9,))])
def test_sees_its_window(kind, size):
    mixer = ConvNeXt(Context(6, size, kind), kernel_size=3, expansion=2.0)
    x = torch.randn(1, *size, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x)[:, 4, 0].sum(), x)
    seen = {t for t in range(9) if grad[0, t].abs().sum() > 0}
    assert seen == ({2, 3, 4} if kind == "causal" else {3, 4, 5})
