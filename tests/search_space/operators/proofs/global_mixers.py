"""Mixers over all tokens that are no attention: long convolutions, spectra, wavelets, pooling."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from . import channels_first, channels_last, count, loaded, make, params, proof
from .catalogue import drawn, filled, fingerprints, load


@proof("mixer", "sgconv", "authors' GConv, both directions, fingerprint of catalogue b")
def sgconv(dtype):
    mixer = make("mixer", "sgconv", 4, (64,), kernel_dim=8)
    scales = filled(2, 4, 8).expand(4, 2, 4, 8)
    state = {"scales": scales, "skip": filled(1, 4).flatten()}
    state |= {"out.weight": filled(4, 4), "out.bias": filled(4, bias=True), "length": torch.ones(2, 4, 1)}
    mixer = loaded(mixer, state, dtype)
    # As the authors do it: the length of the weights that the first forward finds.
    mixer.length.copy_(torch.linalg.vector_norm(mixer._long(), dim=-1, keepdim=True))
    expected = [-164.35223775, 21.70267439, 0.01720873, -0.31352509, -2.01985479]
    return fingerprints(channels_first(mixer(channels_last(drawn(2, 4, 64)).to(dtype))), expected)


@proof("mixer", "long_conv", "authors' LongConv, two kernels, fingerprint of catalogue b")
def long_conv(dtype):
    mixer = make("mixer", "long_conv", 4, (64,), channels=2, threshold=0.001)
    kernel = filled(2, 4, 128)
    value, gate = filled(8, 8).chunk(2)
    value_bias, gate_bias = filled(8, bias=True).chunk(2)
    state = {"taps": torch.stack([kernel[..., :64], kernel[..., 64:].flip(-1)], dim=1), "skip": filled(2, 4)}
    for name, weight, bias in (("value", value, value_bias), ("gate", gate, gate_bias)):
        state |= {f"{name}.0.weight": weight[:, :4], f"{name}.0.bias": bias, f"{name}.1.weight": weight[:, 4:]}
    mixer = loaded(mixer, state, dtype)
    expected = [-1.42127746, 3.73790491, -0.18630399, -0.20406066, 0.16902198]
    return fingerprints(channels_first(mixer(channels_last(drawn(2, 4, 64)).to(dtype))), expected)


@proof("mixer", "long_conv", "its definition, tap by tap, causal")
def long_conv_causal(dtype):
    mixer = make("mixer", "long_conv", 6, (19,), "causal", threshold=0.0005).to(dtype)
    x = torch.randn(2, 19, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    taps = F.softshrink(mixer.taps[0, 0], 0.0005)
    rows = [sum(taps[:, t - s] * x[:, s] for s in range(t + 1)) for t in range(19)]
    y = F.gelu(torch.stack(rows, dim=1) + mixer.skip * x)
    return mixer(x), mixer.value[0](y) * mixer.gate[0](y).sigmoid()


@proof("mixer", "frequency_filter", "authors' AFNO2D_channelfirst, in float32, fixture of the catalogue", double=1e-5)
def frequency_filter(dtype):
    config, x, y, weights = load("aff_filter")
    names = {"w1": "first", "w2": "second", "b1": "first_bias", "b2": "second_bias"}
    state = {own: weights[theirs] for theirs, own in names.items()}
    knobs = {"blocks": config["blocks"], "threshold": config["lam"]}
    mixer = loaded(make("mixer", "frequency_filter", config["C"], x.shape[2:], **knobs), state, dtype)
    return channels_first(mixer(channels_last(x).to(dtype))), y


@proof("mixer", "parameter_free", "authors' EffLayer, fixture of the catalogue")
def parameter_free(dtype):
    config, x, y, weights = load("efflayer_max")
    state = {f"up.{n}": weights[f"qkv.{n}"] for n in ("weight", "bias")}
    state |= {f"out.{n}": weights[f"proj.{n}"] for n in ("weight", "bias")}
    grid = (config["grid"], config["grid"])
    mixer = loaded(make("mixer", "parameter_free", config["C"], grid), state, dtype)
    return mixer(x.to(dtype).unflatten(1, grid)).flatten(1, 2), y


@proof("mixer", "parameter_free", "torch.nn.MaxPool2d, the max layer")
def parameter_free_max(dtype):
    x = torch.randn(2, 5, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    mixer = make("mixer", "parameter_free", 8, (5, 9), form="max", pool_size=5)
    return mixer(x), channels_last(torch.nn.MaxPool2d(5, 1, 2)(channels_first(x)))


def _bands(u: torch.Tensor, depth: int) -> list[torch.Tensor]:
    """Haar bands by convolution with the filters' outer products, the low one first, as the wavelet library does it."""
    low, high = torch.tensor([1.0, 1.0]) / 2**0.5, torch.tensor([1.0, -1.0]) / 2**0.5
    filters = torch.stack([torch.outer(a, b) for a, b in ((low, low), (high, low), (low, high), (high, high))])
    found = []
    for _ in range(depth):
        u = F.pad(u, (0, u.shape[-1] % 2, 0, u.shape[-2] % 2))
        weight = filters.to(u.dtype).repeat(u.shape[1], 1, 1).unsqueeze(1)
        bands = F.conv2d(u, weight, stride=2, groups=u.shape[1]).unflatten(1, (-1, 4))
        u = bands[:, :, 0]
        found.append(torch.cat([u, bands[:, :, 1:].flatten(1, 2)], dim=1))
    return found


@proof("mixer", "wavelet", "formula of catalogue c, D16, from torch's convolutions, two levels, odd grid")
def wavelet(dtype):
    mixer, generator = make("mixer", "wavelet", 16, (9, 7), levels=2).to(dtype), torch.Generator().manual_seed(0)
    for tensor in mixer.buffers():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator).to(dtype))
    x = torch.randn(2, 16, 9, 7, generator=generator).to(dtype)

    def pointwise(y, *layers):
        weight = torch.cat([layer.weight for layer in layers], dim=1)[..., None, None]
        return F.conv2d(y, weight, layers[0].bias)

    def level(layer, z, size, *projections):
        y = pointwise(F.gelu(pointwise(z, *projections)), layer.mix)
        y = F.conv_transpose2d(y, layer.grow, layer.bias, stride=2, padding=1)[..., : size[0], : size[1]]
        norm = layer.norm
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    u = pointwise(x, mixer.squeeze)
    fine, coarse = _bands(u, 2)
    top, deep = mixer.levels
    y = level(deep, coarse, fine.shape[-2:], deep.smooth, deep.detail)
    y = level(top, torch.cat([fine, y], dim=1), x.shape[-2:], top.smooth, top.detail, top.coarser)
    return mixer(channels_last(x)), channels_last(y)


@count("mixer", "sgconv", "GConv(256), length 1024, both directions", 164_352)
def gconv():
    return params("mixer", "sgconv", 256, (1024,))


@count("mixer", "long_conv", "LongConv(256), length 1024, two kernels", 1_311_744)
def long_conv_256():
    return params("mixer", "long_conv", 256, (1024,), channels=2)


@count("mixer", "frequency_filter", "C^2 / 2 + 4 C for C = 64, catalogue a, B33", 64 * 64 // 2 + 4 * 64)
def filter_64():
    return params("mixer", "frequency_filter", 64)


@count("mixer", "parameter_free", "ViT-Ti-max", 6_159_400)
def vit_max():
    width = 192
    attention, free = params("mixer", "attention", width), params("mixer", "parameter_free", width)
    blocks = 6 * (attention + free) + 12 * (params("channel_mixer", "mlp", width) + 4 * width)
    return 16 * 16 * 3 * width + width + 196 * width + blocks + 2 * width + width * 1000 + 1000


for _levels, _published in ((1, 83_344), (2, 136_880), (3, 190_416), (4, 243_952)):
    count("mixer", "wavelet", f"WaveMix block (64), {_levels} levels", _published)(
        functools.partial(params, "mixer", "wavelet", 64, levels=_levels)
    )


@proof("mixer", "random_mixing", "softmax of uniform numbers, by definition, causal")
def random_mixing(dtype):
    mixer = make("mixer", "random_mixing", 6, (7,), "causal").to(dtype)
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    # The shares of the tokens so far are those of a uniform draw: between 1 and e to each other, and one in all.
    rows = mixer.matrix
    kept = [rows[t, : t + 1] for t in range(7)]
    ratios = torch.stack([row.max() / row.min() for row in kept])
    assert (ratios < 2.7183).all() and (ratios[1:] > 1).all() and (rows.triu(1) == 0).all()
    torch.testing.assert_close(rows.sum(-1), torch.ones(7, dtype=dtype))
    expected = torch.stack([sum(rows[t, s] * x[:, s] for s in range(t + 1)) for t in range(7)], dim=1)
    return mixer(x), expected


@count("mixer", "random_mixing", "what is frozen in RandFormer-S12: 12,127,010 - 11,891,712", 235_298)
def randformer():
    def frozen(side: int) -> int:
        with torch.device("meta"):
            return sum(buffer.numel() for buffer in make("mixer", "random_mixing", 8, (side, side)).buffers())

    return 6 * frozen(14) + 2 * frozen(7)
