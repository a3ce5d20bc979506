from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mixnas.kernels.selective_scan import selective_scan_reference
from mixnas.search_space.operators.mixers.ssm import Mamba, PlainMamba, SelectiveStateSpace, snakes
from mixnas.search_space.registry import Context


def ssm(width, size, kind, **knobs):
    knobs = {"state": 16, "expansion": 2, "kernel_size": 4 if kind == "causal" else 7} | knobs
    return SelectiveStateSpace(Context(width, size, kind), **knobs)


@pytest.mark.parametrize(
    ("width", "kind", "expected"),
    # PlainMamba2D of VCMamba at 64 channels [run]; mamba-130m: 24 of them with a norm, embedding 50280, final norm.
    [(64, "image", 31_120), (768, "causal", (129_135_360 - 50_280 * 768 - 768) // 24 - 768)],
)
def test_has_the_published_number_of_parameters(width, kind, expected):
    with torch.device("meta"):
        mixer = ssm(width, (8, 8) if kind == "image" else (8,), kind)
    assert sum(p.numel() for p in mixer.parameters()) == expected


def test_snakes_visit_neighbours():
    orders, steps = snakes((3, 4))
    assert orders[0] == (0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11) and orders[1] == orders[0][::-1]
    assert orders[2] == (0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3) and orders[3] == orders[2][::-1]
    assert steps[0] == (0, 1, 1, 1, 4, 2, 2, 2, 4, 1, 1, 1)
    assert steps[1] == (0, 2, 2, 2, 3, 1, 1, 1, 3, 2, 2, 2)
    assert steps[2] == (0, 4, 4, 1, 3, 3, 1, 4, 4, 1, 3, 3)
    assert snakes((3,)) == (((0, 1, 2), (2, 1, 0)), ((0, 1, 1), (0, 2, 2)))


def plain_mamba(mixer: PlainMamba, x):
    """The definition of catalogue c, entry C6: plain recurrences in the order in which it is written there."""
    B, H, W, _ = x.shape
    norm = mixer.input_norm
    u = (mixer.input(x) - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    conv = mixer.conv
    u = F.conv2d(u.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=3, groups=u.shape[-1]).permute(0, 2, 3, 1)
    v = F.silu(u).flatten(1, 2)
    delta = F.softplus(mixer.step_low(v) @ mixer.step.weight.T + 2 * mixer.step.bias)
    b, c, a = mixer.b(v), mixer.c(v), -mixer.log_decay.exp()
    total = torch.zeros_like(v)
    for order, steps in zip(*snakes((H, W)), strict=True):
        h = v.new_zeros(B, *a.shape)
        for t, (token, step) in enumerate(zip(order, steps, strict=True)):
            put_in = b[:, t] + mixer.direction[step]
            h = (delta[:, t, :, None] * a).exp() * h + (delta[:, t] * v[:, token])[..., None] * put_in[:, None]
            total[:, token] += (h * c[:, t, None]).sum(-1) + mixer.skip * v[:, token]
    y = mixer.out(F.relu(F.layer_norm(total, total.shape[-1:], mixer.norm.weight, mixer.norm.bias)))
    norm = mixer.out_norm
    y = (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    return y.view(x.shape)


@pytest.mark.parametrize(("size", "dtype", "limit"), [((5, 7), torch.float32, 1e-5), ((1, 3), torch.float64, 1e-9)])
def test_image_form_is_that_of_the_catalogue(size, dtype, limit):
    mixer = ssm(6, size, "image").double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*mixer.parameters(), *mixer.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
        x = torch.randn(2, *size, 6, generator=generator, dtype=torch.float64)
        expected = plain_mamba(mixer.scan, x)
        actual = mixer.to(dtype)(x.to(dtype)).double()
    assert float((actual - expected).norm() / expected.norm()) < limit


def test_causal_form_is_mamba():
    mixer = ssm(20, (23,), "causal").double()
    block = mixer.scan
    assert isinstance(block, Mamba)
    x = torch.randn(2, 23, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = F.conv1d(F.pad(block.input(x).mT, (3, 0)), block.conv.weight, block.conv.bias, groups=40).mT
    u = F.silu(u)
    step = block.step(block.step_low(u))
    y = selective_scan_reference(u, step, -block.log_decay.exp(), block.b(u), block.c(u), block.skip, block.step_bias)
    torch.testing.assert_close(mixer(x), block.out(y * F.silu(block.gate(x))))


def test_initial_steps_and_decays_are_mambas():
    for kind, size in (("causal", (8,)), ("image", (4, 4))):
        block = ssm(32, size, kind).requires_grad_(False).scan
        steps = F.softplus(block.step_bias if kind == "causal" else block.step.bias)
        assert float(steps.min()) > 0.99e-3 and float(steps.max()) < 1.01e-1
        torch.testing.assert_close(block.log_decay.exp()[5], torch.arange(1.0, 17.0))


@pytest.mark.parametrize("length", [1, 8, 21])
def test_no_token_sees_a_later_one(length):
    mixer = ssm(8, (length,), "causal", kernel_size=3)
    x = torch.randn(1, length, 8, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, length // 2 :] += 1.0
    before, after = mixer(x), mixer(changed)
    torch.testing.assert_close(before[:, : length // 2], after[:, : length // 2])
    assert not torch.equal(before[:, length // 2 :], after[:, length // 2 :])


@pytest.mark.parametrize(("size", "kind"), [((5, 3), "image"), ((13,), "sequence")])
def test_scans_reach_every_token_and_follow_the_input_size(size, kind):
    mixer = ssm(8, (2, 2) if kind == "image" else (4,), kind, kernel_size=3)
    mixer.eval()
    x = torch.randn(1, *size, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape
    (grad,) = torch.autograd.grad(y.flatten(1, -2)[:, 0].sum(), x)
    assert (grad.flatten(1, -2).abs().sum(-1) > 0).all()
