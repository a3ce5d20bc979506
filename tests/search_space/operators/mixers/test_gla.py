from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mixnas.kernels.gated_linear_attention import gated_linear_attention_reference
from mixnas.search_space.operators.mixers.gla import GatedLinearAttention
from mixnas.search_space.registry import Context

from ..proofs.catalogue import drawn, filled, fingerprint, load, relative_error


def gla(width, size, kind, **knobs):
    return GatedLinearAttention(Context(width, size, kind), **({"heads": 4, "expand_k": 0.5, "gate_rank": 16} | knobs))


def official(mixer: GatedLinearAttention, weights: dict[str, torch.Tensor]) -> GatedLinearAttention:
    """Copy the weights of ViG's module, under its names, with q, k and v in one and both decays in one."""
    keys = mixer.query.out_features
    query, key, value = weights["qkv_proj.weight"].split([keys, keys, mixer.value.out_features])
    decay, reverse_decay = weights["gk_proj.1.weight"].chunk(2)
    decay_bias, reverse_bias = weights["gk_proj.1.bias"].chunk(2)
    state = {
        "local.weight": weights["in_proj.0.weight"],
        "query.weight": query,
        "key.weight": key,
        "value.weight": value,
        "decay_low.weight": weights["gk_proj.0.weight"],
        "decay.weight": decay,
        "decay.bias": decay_bias,
        "reverse_decay.weight": reverse_decay,
        "reverse_decay.bias": reverse_bias,
        "gate.weight": weights["g_proj.weight"],
        "gate.bias": weights["g_proj.bias"],
        "norm.weight": weights["g_norm.weight"],
        "local_norm.weight": weights["l_norm.weight"],
        "out.weight": weights["o_proj.weight"],
    }
    mixer.load_state_dict(state)
    return mixer


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_equals_the_official_vig_module(dtype, limit):
    config, x, y, weights = load("bigla")
    height, width = config["grid"]
    mixer = gla(config["C"], (height, width), "image", heads=config["heads"], expand_k=config["e_k"])
    official(mixer.to(dtype), weights)
    actual = mixer(x.to(dtype).view(len(x), height, width, -1))
    assert relative_error(actual.flatten(1, 2), y) < limit


def test_has_the_fingerprint_of_the_official_vig_module():
    mixer = gla(16, (8, 8), "image", heads=2)
    weights = {
        "in_proj.0.weight": filled(16, 1, 3, 3),
        "qkv_proj.weight": filled(32, 16),
        "gk_proj.0.weight": filled(16, 16),
        "gk_proj.1.weight": filled(16, 16),
        "gk_proj.1.bias": filled(16, bias=True),
        "g_proj.weight": filled(16, 16),
        "g_proj.bias": filled(16, bias=True),
        "g_norm.weight": filled(8),
        "l_norm.weight": filled(8),
        "o_proj.weight": filled(16, 16),
    }
    expected = [-7.23268447, 30.70631721, -0.56335884, -0.69894070, 0.30871783]
    y = official(mixer.double(), weights)(drawn(2, 64, 16).view(2, 8, 8, 16))
    assert fingerprint(y) == pytest.approx(expected, abs=2e-7)
    y = official(mixer.float(), weights)(drawn(2, 64, 16).view(2, 8, 8, 16).float())
    assert fingerprint(y)[1:] == pytest.approx(expected[1:], rel=1e-5)


def test_causal_form_is_that_of_the_paper():
    mixer = gla(16, (21,), "causal").double()
    x = torch.randn(2, 21, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (p(x).view(2, 21, 4, -1) for p in (mixer.query, mixer.key, mixer.value))
    decay = F.logsigmoid(mixer.decay(mixer.decay_low(x))).view(q.shape) / 16
    o = gated_linear_attention_reference(q, k, v, decay)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.norm.weight
    expected = mixer.out(o.flatten(2) * F.silu(mixer.gate(x)))
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize(
    ("width", "heads", "kind", "expected"),
    # ViG-T's layer [run]; GLA 340M: 24 layers of it, SwiGLU 2816 and two norms, embedding and norm make 341,707,776.
    [(192, 3, "image", 155_840), (1024, 4, "causal", (341_707_776 - 32_000 * 1024 - 1024) // 24 - 8_650_752 - 2048)],
)
def test_has_the_published_number_of_parameters(width, heads, kind, expected):
    with torch.device("meta"):
        mixer = gla(width, (8, 8) if kind == "image" else (8,), kind, heads=heads)
    assert sum(p.numel() for p in mixer.parameters()) == expected


@pytest.mark.parametrize("length", [1, 15, 16, 37])
def test_no_token_sees_a_later_one(length):
    mixer = gla(16, (length,), "causal", expand_k=0.25)
    x = torch.randn(1, length, 16, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, length // 2 :] += 1.0
    before, after = mixer(x), mixer(changed)
    torch.testing.assert_close(before[:, : length // 2], after[:, : length // 2])
    assert not torch.equal(before[:, length // 2 :], after[:, length // 2 :])


@pytest.mark.parametrize(("size", "kind"), [((7, 5), "image"), ((1, 1), "image"), ((19,), "sequence")])
def test_both_directions_reach_every_token(size, kind):
    mixer = gla(8, size, kind, heads=2)
    x = torch.randn(1, *size, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape
    (grad,) = torch.autograd.grad(y.flatten(1, -2)[:, 0].sum(), x)
    assert (grad.flatten(1, -2).abs().sum(-1) > 0).all()
