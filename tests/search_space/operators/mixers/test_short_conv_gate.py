from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mixnas.search_space.operators.mixers.short_conv_gate import ShortConvGate
from mixnas.search_space.registry import Context

from ..proofs.catalogue import load, relative_error


def short_conv(width, size, kind, form="lfm2", kernel_size=3):
    return ShortConvGate(Context(width, size, kind), kernel_size=kernel_size, form=form)


def test_equals_the_official_baseconv_module():
    config, x, y, weights = load("baseconv")
    mixer = short_conv(config["C"], (x.shape[1],), "causal", "baseconv", config["k"])
    mixer.load_state_dict(
        {
            "conv.weight": weights["conv.conv.weight"],
            "conv.bias": weights["conv.conv.bias"],
            "gate.weight": weights["projection.weight"],
            "gate.bias": weights["projection.bias"],
        }
    )
    assert relative_error(mixer(x.float()), y) < 1e-5


def test_lfm2_form_is_that_of_the_catalogue():
    mixer = short_conv(8, (11,), "causal")
    x = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(0))
    gated = (mixer.before(x) * mixer.value(x)).mT
    convolved = F.conv1d(F.pad(gated, (2, 0)), mixer.conv.weight, groups=8).mT
    torch.testing.assert_close(mixer(x), mixer.out(mixer.after(x) * convolved))


@pytest.mark.parametrize(("form", "expected"), [("baseconv", 4_416), ("lfm2", 4 * 64**2 + 3 * 64)])
def test_number_of_parameters(form, expected):
    assert sum(p.numel() for p in short_conv(64, (8,), "causal", form).parameters()) == expected


@pytest.mark.parametrize("form", ["lfm2", "baseconv"])
def test_sees_its_window_and_no_later_token(form):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, 6, generator=generator, requires_grad=True)
    (grad,) = torch.autograd.grad(short_conv(6, (9,), "causal", form)(x)[:, 4].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).tolist() == [2 <= t <= 4 for t in range(9)]
    (grad,) = torch.autograd.grad(short_conv(6, (9,), "sequence", form)(x)[:, 4].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).tolist() == [3 <= t <= 5 for t in range(9)]
    x = torch.randn(1, 5, 7, 6, generator=generator, requires_grad=True)
    (grad,) = torch.autograd.grad(short_conv(6, (5, 7), "image", form)(x)[:, 2, 3].sum(), x)
    seen = [[1 <= i <= 3 and 2 <= j <= 4 for j in range(7)] for i in range(5)]
    assert (grad[0].abs().sum(-1) > 0).tolist() == seen
