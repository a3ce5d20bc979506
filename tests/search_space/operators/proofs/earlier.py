"""Operators that were there before: their numbers stand in tests of their own as well."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import channels_first, channels_last, count, loaded, make, params, proof
from .catalogue import load


@proof("mixer", "inception_dwconv", "formula of catalogue b, 3, from torch's convolutions")
def inception_dwconv(dtype):
    mixer = make("mixer", "inception_dwconv", 32, (9, 8)).to(dtype)
    x = torch.randn(2, 32, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    square, across, down = mixer.branches
    parts = [x[:, :20]]
    for begin, conv, padding in ((20, square, (1, 1)), (24, across, (0, 5)), (28, down, (5, 0))):
        parts.append(F.conv2d(x[:, begin : begin + 4], conv.weight, conv.bias, padding=padding, groups=4))
    return mixer(channels_last(x)), channels_last(torch.cat(parts, dim=1))


@proof("mixer", "attention", "torch.nn.MultiheadAttention")
def attention(dtype):
    mixer = make("mixer", "attention", 12, (5, 7), heads=3).to(dtype)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True).to(dtype).eval()
    projections = (mixer.query, mixer.key, mixer.value)
    theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
    theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    theirs.out_proj.load_state_dict(mixer.out.state_dict())
    x = torch.randn(2, 35, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    return mixer(x.view(2, 5, 7, 12)).flatten(1, 2), theirs(x, x, x, need_weights=False)[0]


@proof("mixer", "dwconv", "torch.nn.Conv2d")
def dwconv(dtype):
    mixer = make("mixer", "dwconv", 8, (9, 7)).to(dtype)
    x = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    return channels_first(mixer(channels_last(x))), F.conv2d(x, mixer.weight, mixer.bias, padding=3, groups=8)


@proof("mixer", "short_conv_gate", "authors' BaseConv, fixture of the catalogue")
def short_conv_gate(dtype):
    config, x, y, weights = load("baseconv")
    state = {f"conv.{n}": weights[f"conv.conv.{n}"] for n in ("weight", "bias")}
    state |= {f"gate.{n}": weights[f"projection.{n}"] for n in ("weight", "bias")}
    knobs = {"form": "baseconv", "kernel_size": config["k"]}
    mixer = make("mixer", "short_conv_gate", config["C"], (x.shape[1],), "causal", **knobs)
    return loaded(mixer, state, dtype)(x.to(dtype)), y


@proof("gate", "se", "formula of catalogue c, from torch's convolutions")
def se(dtype):
    gate = make("gate", "se", 8, (5, 7)).to(dtype)
    x = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    squeezed = F.conv2d(x.mean((2, 3), keepdim=True), gate.squeeze.weight[..., None, None], gate.squeeze.bias).relu()
    factors = F.conv2d(squeezed, gate.excite.weight[..., None, None], gate.excite.bias).sigmoid()
    return gate(channels_last(x), lambda y: y), channels_last(x * factors)


@count("mixer", "inception_dwconv", "InceptionNeXt-T", 28_055_680)
def inceptionnext():
    widths = (96, 192, 384, 768)
    total = 16 * 3 * 96 + 96 + 2 * 96
    for i, (width, depth) in enumerate(zip(widths, (3, 3, 9, 3), strict=True)):
        if i:
            total += 2 * widths[i - 1] + 4 * widths[i - 1] * width + width
        mlp = params("channel_mixer", "mlp", width, expansion=3.0 if i == 3 else 4.0)
        total += depth * (params("mixer", "inception_dwconv", width) + 2 * width + mlp + width)
    hidden = 3 * 768
    return total + 768 * hidden + hidden + 2 * hidden + hidden * 1000 + 1000


@count("mixer", "gla", "ViG-T's layer (192), 3 heads", 155_840)
def vig():
    return params("mixer", "gla", 192, heads=3)


@count("mixer", "short_conv_gate", "BaseConv (64), 3 taps", 4_416)
def baseconv():
    return params("mixer", "short_conv_gate", 64, (8,), "causal", form="baseconv")


@count("mixer", "ssm", "PlainMamba2D (64), state 16, 7 x 7", 31_120)
def plain_mamba():
    return params("mixer", "ssm", 64, (8, 8))
