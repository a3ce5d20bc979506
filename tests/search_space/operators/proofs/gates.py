"""Gates round the mixer that does nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixnas.search_space import registry
from mixnas.search_space.registry import Context

from . import channels_first, channels_last, count, loaded, make, params, proof
from .catalogue import drawn, filled, fingerprints, load


def _gated(name: str, state: dict[str, Tensor], dtype: torch.dtype, expected: list[float], **knobs):
    gate = loaded(make("gate", name, 16, (8, 8), **knobs), state, dtype)
    x = channels_last(drawn(2, 16, 8, 8)).to(dtype)
    return fingerprints(channels_first(gate(x, lambda y: y)), expected)


@proof("gate", "eca", "timm 1.0.31 EcaModule, fingerprint of catalogue b")
def eca(dtype):
    expected = [-2.95690660, 19.38291512, -0.32726790, -0.62758160, 0.09283664]
    return _gated("eca", {"weight": filled(1, 1, 3)}, dtype, expected)


def _polarized() -> dict[str, Tensor]:
    half = filled(8, 16)
    return {"key.weight": filled(1, 16)} | {
        f"{name}.weight": half for name in ("value", "position_query", "position_value")
    }


@proof("gate", "polarized", "authors' PSA_p, fingerprint of catalogue b")
def polarized_parallel(dtype):
    expected = [-2.22198519, 38.91671369, -0.49335706, -1.14748238, 0.19330159]
    return _gated("polarized", _polarized() | {"up.weight": filled(16, 8)}, dtype, expected, form="parallel")


@proof("gate", "polarized", "authors' PSA_s, fingerprint of catalogue b")
def polarized_sequential(dtype):
    expected = [-1.21004721, 9.53567720, -0.14573292, -0.30205448, 0.04596545]
    state = _polarized() | {
        "squeeze.weight": filled(2, 8),
        "squeeze.bias": filled(2, bias=True),
        "norm.weight": filled(2, 1, 1).flatten(),
        "norm.bias": filled(2, 1, 1).flatten(),
        "excite.weight": filled(16, 2),
        "excite.bias": filled(16, bias=True),
    }
    return _gated("polarized", state, dtype, expected, form="sequential")


@proof("gate", "g1_head_sigmoid", "formula of catalogue a, A26, head by head")
def g1_head_sigmoid(dtype):
    width, heads, generator = 24, 3, torch.Generator().manual_seed(0)
    gate = make("gate", "g1_head_sigmoid", width, (11,), "causal", heads=heads).to(dtype)
    x, projections = torch.randn(2, 11, width, generator=generator), torch.randn(3, width, width, generator=generator)
    x, projections = x.to(dtype), projections.to(dtype) / width**0.5
    q, k, v = (torch.einsum("blc,dc->bld", x, p).view(2, 11, heads, -1).transpose(1, 2) for p in projections)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    joined = torch.stack(
        [attended[:, :, h] * torch.sigmoid(x @ gate.linear.weight[h])[..., None] for h in range(heads)], dim=2
    )
    return gate(x, lambda _: attended.flatten(2)), joined.flatten(2)


@proof("gate", "value_gate", "formula of catalogue a, A26, position G2: a depthwise convolution of gated values")
def value_gate(dtype):
    gate, mixer = (
        make(axis, name, 8, (5, 7)).to(dtype) for axis, name in (("gate", "value_gate"), ("mixer", "dwconv"))
    )
    x = torch.randn(2, 5, 7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = channels_first(x * torch.sigmoid(x @ gate.linear.weight.T))
    expected = F.conv2d(values, mixer.weight, mixer.bias, padding=3, groups=8)
    return gate(x, mixer), channels_last(expected)


@count("gate", "polarized", "PSA_p(256)", 131_328)
def psa_p():
    return params("gate", "polarized", 256, form="parallel")


@count("gate", "polarized", "PSA_s(256)", 111_200)
def psa_s():
    return params("gate", "polarized", 256, form="sequential")


@count("gate", "eca", "what ECA-Net50 has beyond ResNet-50, kernels 3, 5, 5, 7", 80)
def eca50():
    stages = ((3, 256, 3), (4, 512, 5), (6, 1024, 5), (3, 2048, 7))
    return sum(blocks * params("gate", "eca", width, kernel_size=k) for blocks, width, k in stages)


@count("gate", "eca", "the same by the adaptive rule (timm)", 86)
def eca50_adaptive():
    return sum(blocks * params("gate", "eca", width) for blocks, width in ((3, 256), (4, 512), (6, 1024), (3, 2048)))


@count("gate", "g1_head_sigmoid", "C x heads, catalogue a, A26", 64 * 4)
def g1():
    return params("gate", "g1_head_sigmoid", 64)


@proof("gate", "gated_cross", "authors' GateCorssLayer, three layers, fixture of the catalogue")
def gated_cross(dtype):
    config, x, y, weights = load("gated_cross")
    state = {}
    for i in range(config["layers"]):
        state |= {f"crosses.{i}.weight": weights[f"w.{i}.weight"], f"crosses.{i}.bias": weights[f"b.{i}"]}
        state |= {f"gates.{i}.weight": weights[f"wg.{i}.weight"]}
    gate = loaded(make("gate", "gated_cross", config["D"], (1,), layers=config["layers"]), state, dtype)
    return gate(x.to(dtype).unsqueeze(1), lambda z: z).squeeze(1), y


def _dico(dtype):
    """The block with its conditioning, from the mixer and a feed-forward layer."""
    state = {
        "up.weight": filled(16, 16),
        "up.bias": filled(16, bias=True),
        "window.weight": filled(16, 1, 3, 3),
        "window.bias": filled(16, bias=True),
        "attention.linear.weight": filled(16, 16),
        "attention.linear.bias": filled(16, bias=True),
        "out.weight": filled(16, 16),
        "out.bias": filled(16, bias=True),
    }
    mixer = loaded(make("mixer", "dico", 16, (8, 8)), state, dtype)
    state = {"up.weight": filled(32, 16), "up.bias": filled(32, bias=True)}
    state |= {"down.weight": filled(16, 32), "down.bias": filled(16, bias=True)}
    mlp = loaded(make("channel_mixer", "mlp", 16, (8, 8), expansion=2.0), state, dtype)
    x, condition = channels_last(drawn(2, 16, 8, 8)).to(dtype), drawn(2, 16).to(dtype)
    modulation = F.linear(F.silu(condition), filled(96, 16).to(dtype), filled(96, bias=True).to(dtype))
    shift, scale, gate, shift2, scale2, gate2 = modulation[:, None, None].chunk(6, dim=-1)

    def normalised(y):
        return F.layer_norm(y, (16,), eps=1e-6)

    x = x + gate * mixer(normalised(x) * (1 + scale) + shift)
    x = x + gate2 * mlp(normalised(x) * (1 + scale2) + shift2)
    expected = [33.89133036, 42.62249696, -1.21223985, -1.41633195, 0.50981180]
    return fingerprints(channels_first(x), expected)


proof("gate", "compact_channel_attention", "authors' DiCoBlock (with dico), fingerprint of catalogue b")(_dico)
proof("mixer", "dico", "authors' DiCoBlock, fingerprint of catalogue b")(_dico)


@count("mixer", "dico", "DiCoBlock(128, ratio 2)", 215_808)
def dico_128():
    mlp = params("channel_mixer", "mlp", 128, expansion=2.0)
    return params("mixer", "dico", 128) + mlp + 128 * 6 * 128 + 6 * 128


@proof("head", "attsets", "formula of catalogue a, B27, channel by channel")
def attsets(dtype):
    before, after = Context(6, (3, 5), "image"), Context(4, (), "image")
    head = registry.get("head", "attsets").build(before, after).to(dtype)
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = torch.einsum("bhwc,dc->bdhw", x, head.weights.weight).flatten(2)
    shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
    pooled = torch.einsum("bdn,bnd->bd", shares, x.flatten(1, 2))
    return head(x), pooled @ head.linear.weight.T + head.linear.bias
