"""Attention mixers."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from . import channels_first, channels_last, count, loaded, make, params, proof
from .catalogue import drawn, filled, fingerprints, load


def _drawn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _each_head(module, q, k, v, allowed, bias):
    """Softmax attention from its definition, (B, tokens, C) to the same; `allowed` and `bias` (heads, tokens, keys)."""
    heads, outputs = module.heads, []
    for h, (a, b, c) in enumerate(zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)):
        logits = torch.einsum("bqd,bkd->bqk", a, b) * a.shape[-1] ** -0.5 + bias[h]
        weights = torch.where(allowed, logits.exp(), 0)
        outputs.append(torch.einsum("bqk,bkd->bqd", weights / weights.sum(-1, keepdim=True), c))
    return torch.cat(outputs, dim=-1)


def _windows(dtype, *, shift, size=(9, 10), window=4):
    """Over all pairs of tokens: which are in one tile, and how far they are from each other."""
    mixer = make("mixer", "window_attention", 12, size, heads=3, window=window, shift=shift).to(dtype)
    x = _drawn(2, *size, 12, dtype=dtype)
    moved = window // 2 if shift else 0
    y, z = (t.flatten() for t in torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij"))
    # A shifted tile begins half a tile later; what is before the first is by itself, and so it is at the ends.
    tile = ((y - moved).div(window, rounding_mode="floor"), (z - moved).div(window, rounding_mode="floor"))
    together = (tile[0][:, None] == tile[0]) & (tile[1][:, None] == tile[1])
    apart = [(t[None, :] - t[:, None]).clamp(1 - window, window - 1) + window - 1 for t in (y, z)]
    tokens = x.flatten(1, 2)
    q, k, v = (p(tokens) for p in (mixer.query, mixer.key, mixer.value))
    expected = mixer.out(_each_head(mixer, q, k, v, together, mixer.bias[:, apart[0], apart[1]]))
    return mixer(x).flatten(1, 2), expected


proof("mixer", "window_attention", "definition over all pairs of tokens, grid that tiles do not divide")(
    functools.partial(_windows, shift=False)
)
proof("mixer", "window_attention", "definition over all pairs of tokens, shifted, grid that tiles do not divide")(
    functools.partial(_windows, shift=True)
)


def _swin(dtype, expected, *, shift):
    query, key, value = filled(48, 16).chunk(3)
    query_bias, key_bias, value_bias = filled(48, bias=True).chunk(3)
    # There a row for each distance from the key to the query, here from the query to the key.
    state = {"bias": filled(49, 2).T.reshape(2, 7, 7).flip(1, 2)}
    state |= {"query.weight": query, "key.weight": key, "value.weight": value, "out.weight": filled(16, 16)}
    state |= {"query.bias": query_bias, "key.bias": key_bias, "value.bias": value_bias}
    state |= {"out.bias": filled(16, bias=True)}
    mixer = make("mixer", "window_attention", 16, (8, 8), heads=2, window=4, shift=shift)
    x = drawn(2, 64, 16).view(2, 8, 8, 16).to(dtype)
    return fingerprints(loaded(mixer, state, dtype)(x), expected)


@proof("mixer", "window_attention", "timm 1.0.31 SwinTransformerBlock, fingerprint (benchmarks/operator_oracles.py)")
def swin(dtype):
    expected = [-21.2523790794, 17.4769496391, -0.4207521395, 0.1704667254, -0.3712879502]
    return _swin(dtype, expected, shift=False)


@proof("mixer", "window_attention", "the same, shifted")
def swin_shifted(dtype):
    expected = [-30.1530118649, 21.6225174013, -0.6461756738, -0.0516711023, -0.0240077206]
    return _swin(dtype, expected, shift=True)


@proof("mixer", "halo_attention", "timm 1.0.31 HaloAttn, fingerprint (benchmarks/operator_oracles.py)")
def halo_attention_timm(dtype):
    key, value = filled(32, 16).view(2, 2, 8, 16).transpose(0, 1).flatten(1, 2)  # there each head's keys and values
    state = {"query.weight": filled(16, 16), "key.weight": key, "value.weight": value}
    state |= {"rows": filled(11, 8), "columns": filled(11, 8)}
    mixer = loaded(make("mixer", "halo_attention", 16, (8, 8), heads=2, block=4, halo=1), state, dtype)
    expected = [29.3155880824, 12.2209952813, 0.4730815513, 0.0114459005, 0.4619599036]
    return fingerprints(channels_first(mixer(channels_last(drawn(2, 16, 8, 8)).to(dtype))), expected)


@proof("mixer", "single_head_attention", "timm 1.0.31 SHSA, fingerprint (benchmarks/operator_oracles.py)")
def shsa_timm(dtype):
    widths = (8, 8, 6)
    state = {"norm.weight": filled(6), "norm.bias": filled(6, bias=True), "out.weight": filled(16, 16)}
    state |= {"out_norm.weight": filled(16), "out_norm.bias": filled(16, bias=True)}
    parts = (t.split(widths) for t in (filled(22, 6), filled(22), filled(22, bias=True)))
    for name, weight, scale, bias in zip(("query", "key", "value"), *parts, strict=True):
        state |= {f"{name}.weight": weight, f"{name}_norm.weight": scale, f"{name}_norm.bias": bias}
    mixer = loaded(make("mixer", "single_head_attention", 16, (8, 8), ratio=0.4, key_width=8), state, dtype)
    expected = [-289.4212387720, 21.1049899131, -0.1521670361, 0.0047036290, -0.8425165056]
    return fingerprints(channels_first(mixer(channels_last(drawn(2, 16, 8, 8)).to(dtype))), expected)


@proof("mixer", "halo_attention", "formula of catalogue c, D23, query by query")
def halo_attention(dtype):
    heads, block, halo, size = 2, 3, 1, (6, 9)
    mixer = make("mixer", "halo_attention", 8, size, heads=heads, block=block, halo=halo).to(dtype)
    x = _drawn(2, *size, 8, dtype=dtype)
    q, k, v = (torch.einsum("bhwc,dc->bhwd", x, p.weight) for p in (mixer.query, mixer.key, mixer.value))
    k, v = (F.pad(t, (0, 0, halo, halo, halo, halo)) for t in (k, v))
    window, expected = block + 2 * halo, torch.zeros_like(x)
    for i in range(size[0]):
        for j in range(size[1]):
            top, left = i // block * block, j // block * block
            keys, values = (t[:, top : top + window, left : left + window].flatten(1, 2) for t in (k, v))
            down = torch.arange(window) - i % block + window - 1
            right = torch.arange(window) - j % block + window - 1
            places = (mixer.rows[down][:, None] + mixer.columns[right][None, :]).flatten(0, 1)
            for h in range(heads):
                part = slice(4 * h, 4 * h + 4)
                query = q[:, i, j, part].unsqueeze(1)
                logits = (query * (keys[..., part] * 4**-0.5 + places)).sum(-1)
                expected[:, i, j, part] = (logits.softmax(-1).unsqueeze(-1) * values[..., part]).sum(1)
    return mixer(x), expected


@proof("mixer", "spatial_reduction_attention", "formula of catalogue c, C17, from torch's layers")
def spatial_reduction_attention(dtype):
    mixer = make("mixer", "spatial_reduction_attention", 12, (7, 9), heads=3, reduction=2).to(dtype)
    x = _drawn(2, 7, 9, 12, dtype=dtype)
    coarse = F.conv2d(channels_first(x), mixer.reduce.weight, mixer.reduce.bias, stride=2)
    coarse = F.layer_norm(coarse.flatten(2).mT, (12,), mixer.norm.weight, mixer.norm.bias)
    attention = torch.nn.MultiheadAttention(12, 3, batch_first=True).to(dtype)
    projections = (mixer.query, mixer.key, mixer.value)
    attention.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
    attention.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    attention.out_proj.load_state_dict(mixer.out.state_dict())
    return mixer(x).flatten(1, 2), attention(x.flatten(1, 2), coarse, coarse, need_weights=False)[0]


@proof("mixer", "single_head_attention", "formula of catalogue c, D24, from torch's layers")
def single_head_attention(dtype):
    mixer = make("mixer", "single_head_attention", 20, (5, 6), ratio=0.3, key_width=8).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*mixer.named_parameters(), *mixer.named_buffers()]:
        if "norm" in name and tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator).to(dtype))
    x = torch.randn(2, 20, 5, 6, generator=generator).to(dtype)

    def projected(y, layer, n):
        y = F.conv2d(y, layer.weight[..., None, None])
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias)

    attended, rest = x[:, :6], x[:, 6:]
    attended = F.group_norm(attended, 1, mixer.norm.weight, mixer.norm.bias)
    q, k, v = (
        projected(attended, getattr(mixer, name), getattr(mixer, f"{name}_norm")).flatten(2)
        for name in ("query", "key", "value")
    )
    weights = torch.softmax(q.mT @ k / 8**0.5, dim=-1)
    y = (v @ weights.mT).view(2, 6, 5, 6)
    y = projected(torch.cat([y, rest], dim=1).relu(), mixer.out, mixer.out_norm)
    return mixer(channels_last(x)), channels_last(y)


@proof("mixer", "transposed_attention", "formula of catalogue a, A5 (MDTA), from torch's convolutions")
def transposed_attention(dtype):
    width, heads, size = 12, 3, (5, 7)
    mixer = make("mixer", "transposed_attention", width, size, heads=heads).to(dtype)
    mixer.temperature.copy_(torch.tensor([0.5, 1.5, 3.0]))
    x = _drawn(2, width, *size, dtype=dtype)
    q, k, v = (
        F.conv2d(F.conv2d(x, p.weight[..., None, None]), w.weight, padding=1, groups=width).flatten(2)
        for p, w in (
            (mixer.query, mixer.query_window),
            (mixer.key, mixer.key_window),
            (mixer.value, mixer.value_window),
        )
    )
    outputs = []
    for h, (a, b, c) in enumerate(zip(*(t.chunk(heads, dim=1) for t in (q, k, v)), strict=True)):
        cosine = torch.einsum("bin,bjn->bij", a, b) / (a.norm(dim=-1)[:, :, None] * b.norm(dim=-1)[:, None, :])
        outputs.append(torch.softmax(cosine * mixer.temperature[h], dim=-1) @ c)
    expected = F.conv2d(torch.cat(outputs, dim=1).view(x.shape), mixer.out.weight[..., None, None])
    return mixer(channels_last(x)), channels_last(expected)


def _retention(width, size, config, **knobs):
    knobs |= {"heads": config["heads"], "initial": float(config["a"]), "spread": float(config["b"])}
    return make("mixer", "retention_2d", width, size, **knobs)


@proof("mixer", "retention_2d", "authors' VisionRetentionChunk, fixture of the catalogue")
def retention_2d(dtype):
    config, x, y, weights = load("masa_decomposed")
    state = {}
    for own, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
        state |= {f"{own}.{n}": weights[f"{theirs}.{n}"] for n in ("weight", "bias")}
    state |= {f"local.{n}": weights[f"lepe.conv.{n}"] for n in ("weight", "bias")}
    mixer = _retention(config["C"], x.shape[1:3], config)
    return loaded(mixer, state, dtype)(x.to(dtype)), y


@proof("mixer", "retention_2d", "formula of catalogue a, A7, all pairs at once (VisionRetentionAll)", double=3e-7)
def retention_2d_whole(dtype):
    """Turned by complex numbers instead of sines."""
    size, width, heads = (4, 5), 12, 3
    mixer = _retention(width, size, {"heads": heads, "a": 1, "b": 5}, form="whole").to(dtype)
    x = _drawn(2, *size, width, dtype=dtype)
    places = torch.arange(20).double()
    turn = torch.polar(torch.ones(20, 2).double(), places[:, None] / 10_000 ** torch.linspace(0, 1, 2).double())

    def turned(t):
        return torch.view_as_real(torch.view_as_complex(t.double().unflatten(-1, (-1, 2))) * turn[:, None]).flatten(-2)

    q, k, v = (p(x).flatten(1, 2).unflatten(-1, (heads, -1)) for p in (mixer.query, mixer.key, mixer.value))
    q, k = turned(q), turned(k)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 4**-0.5
    y, z = places // 5, places % 5
    distance = (y[:, None] - y).abs() + (z[:, None] - z).abs()
    decays = torch.log(1 - 2.0 ** -(1 + 5 * torch.arange(heads).double() / heads))
    weights = torch.softmax(logits + decays[:, None, None] * distance, dim=-1)
    attended = torch.einsum("bhqk,bkhd->bqhd", weights, v.double()).flatten(2).view(x.shape)
    local = F.conv2d(channels_first(mixer.value(x)), mixer.local.weight, mixer.local.bias, padding=2, groups=width)
    return mixer(x), mixer.out(attended.to(dtype) + channels_last(local))


for _reduction, _published in ((1, 16_640), (2, 33_216), (4, 82_368), (8, 278_976)):
    count("mixer", "spatial_reduction_attention", f"PVT attention (64), reduction {_reduction}", _published)(
        functools.partial(params, "mixer", "spatial_reduction_attention", 64, reduction=_reduction)
    )


@count("mixer", "spatial_reduction_attention", "PVT-Tiny", 13_229_288)
def pvt():
    widths, ratios, side = (64, 128, 320, 512), (8.0, 8.0, 4.0, 4.0), (56, 28, 14, 7)
    total = 0
    for i, width in enumerate(widths):
        before, patch = (3, 4) if i == 0 else (widths[i - 1], 2)
        total += patch * patch * before * width + width + 2 * width
        total += (side[i] ** 2 + (i == 3)) * width + (width if i == 3 else 0)  # positions; a class token in the last
        mixer = params("mixer", "spatial_reduction_attention", width, heads=1, reduction=(8, 4, 2, 1)[i])
        total += 2 * (mixer + params("channel_mixer", "mlp", width, expansion=ratios[i]) + 4 * width)
    return total + 2 * 512 + 512 * 1000 + 1000


@count("mixer", "halo_attention", "HaloAttn(64), 4 heads, block 8, halo 3", 13_152)
def halo():
    return params("mixer", "halo_attention", 64)


@count("mixer", "single_head_attention", "SHSA(64), 16 channels attended", 5_120)
def shsa():
    return params("mixer", "single_head_attention", 64, ratio=0.25)


@count(
    "mixer",
    "window_attention",
    "L2ViT's window attention (96), 3 heads: 4 C^2 + 4 C + heads 13^2",
    4 * 96**2 + 4 * 96 + 3 * 169,
)
def window():
    return params("mixer", "window_attention", 96, heads=3)


@count("mixer", "retention_2d", "RMT-T", 14_334_216)
def rmt():
    widths, heads, total = (64, 128, 256, 512), (4, 4, 8, 16), 0
    half = 32
    total += 27 * half + half + 2 * half + 9 * half * half + half + 2 * half
    total += 9 * half * 64 + 64 + 2 * 64 + 9 * 64 * 64 + 64 + 2 * 64
    for i, (width, depth) in enumerate(zip(widths, (2, 2, 8, 2), strict=True)):
        if i:
            total += 9 * widths[i - 1] * width + width + 2 * width
        mixer = params("mixer", "retention_2d", width, heads=heads[i], form="decomposed" if i < 2 else "whole")
        hidden = 3 * width
        feed_forward = 2 * width * hidden + hidden + width + 10 * hidden
        total += depth * (mixer + feed_forward + 4 * width + 10 * width)  # two norms, a depthwise position encoding
    return total + 512 * 1024 + 1024 + 2 * 1024 + 1024 * 1000 + 1000


@proof("mixer", "gpsa", "timm 1.0.31 GPSA, fingerprint of catalogue b")
def gpsa(dtype):
    query, key = filled(32, 16).chunk(2)
    state = {"query.weight": query, "key.weight": key, "value.weight": filled(16, 16), "gate": filled(4)}
    state |= {"out.weight": filled(16, 16), "out.bias": filled(16, bias=True)}
    state |= {"place": filled(4, 3), "bias": filled(4, bias=True)}
    mixer = loaded(make("mixer", "gpsa", 16, (8, 8)), state, dtype)
    expected = [-139.74864958, 27.57910687, 0.60965736, 0.55879029, -0.30402599]
    return fingerprints(mixer(drawn(2, 64, 16).view(2, 8, 8, 16).to(dtype)), expected)


@proof("mixer", "gpsa", "its first places, catalogue b, 9: a window of 3 x 3 heads")
def gpsa_first(dtype):
    mixer = make("mixer", "gpsa", 18, (4, 4), heads=9).to(dtype)
    rows = [[2.0 * (p // 3 - 1), 2.0 * (p % 3 - 1), -1.0] for p in range(9)]
    return mixer.place, torch.tensor(rows)


@proof("mixer", "focused_local_linear", "authors' LinearAttention(16, heads 2), fingerprint of catalogue b")
def focused_local_linear(dtype):
    query, key, value = filled(48, 16).chunk(3)
    query_bias, key_bias, value_bias = filled(48, bias=True).chunk(3)
    state = {"query.weight": query, "key.weight": key, "value.weight": value, "out.weight": filled(16, 16)}
    state |= {"query.bias": query_bias, "key.bias": key_bias, "value.bias": value_bias}
    state |= {"out.bias": filled(16, bias=True), "temperature": filled(2, 1, 1).flatten()}
    mixer = loaded(make("mixer", "focused_local_linear", 16, (8, 8), heads=2), state, dtype)
    expected = [-90.69106510, 6.77383225, -0.12596721, -0.11238530, 0.08265667]
    return fingerprints(mixer(drawn(2, 64, 16).view(2, 8, 8, 16).to(dtype)), expected)


@proof("mixer", "simplified_linear_attention", "formula of catalogue c, D17, over all pairs of tokens")
def simplified_linear_attention(dtype):
    width, heads, size = 12, 3, (5, 7)
    mixer = make("mixer", "simplified_linear_attention", width, size, heads=heads, kernel_size=3).to(dtype)
    mixer.position.copy_(_drawn(35, width, dtype=dtype, seed=1))
    x = _drawn(2, *size, width, dtype=dtype)
    tokens = x.flatten(1, 2)
    q, k, v = mixer.query(tokens).relu(), (mixer.key(tokens) + mixer.position).relu(), mixer.value(tokens)
    outputs = []
    for a, b, c in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True):
        weights = torch.einsum("bqd,bkd->bqk", a, b)
        image = channels_first(c.unflatten(1, size))
        local = F.conv2d(image, mixer.window.weight, mixer.window.bias, padding=1, groups=4)
        outputs.append(weights @ c / (weights.sum(-1, keepdim=True) + 1e-6) + channels_last(local).flatten(1, 2))
    return mixer(x).flatten(1, 2), mixer.out(torch.cat(outputs, dim=-1))


@proof("mixer", "conv_projection_attention", "formula of catalogue c, C8, from torch's layers")
def conv_projection_attention(dtype):
    width, heads = 12, 3
    mixer = make("mixer", "conv_projection_attention", width, (5, 7), heads=heads).to(dtype)
    windows = (mixer.query_window, mixer.key_window, mixer.value_window)
    generator = torch.Generator().manual_seed(0)
    for window in windows:
        for tensor in (window.norm.weight, window.norm.bias, window.norm.running_mean, window.norm.running_var):
            tensor.add_(torch.rand(tensor.shape, generator=generator).to(dtype))
    x = torch.randn(2, width, 5, 7, generator=generator).to(dtype)
    projected = []
    for window, projection, stride in zip(windows, (mixer.query, mixer.key, mixer.value), (1, 2, 2), strict=True):
        n = window.norm
        y = F.conv2d(x, window.weight, stride=stride, padding=1, groups=width)
        y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias)
        projected.append(
            F.conv2d(y, projection.weight[..., None, None], projection.bias).flatten(2).chunk(heads, dim=1)
        )
    outputs = [c @ torch.softmax(a.mT @ b / width**0.5, dim=-1).mT for a, b, c in zip(*projected, strict=True)]
    expected = F.linear(torch.cat(outputs, dim=1).mT, mixer.out.weight, mixer.out.bias)
    return mixer(channels_last(x)).flatten(1, 2), expected


@proof("mixer", "relative_attention", "definition over all pairs of tokens")
def relative_attention(dtype):
    size = (4, 6)
    mixer = make("mixer", "relative_attention", 12, size, heads=3).to(dtype)
    x = _drawn(2, *size, 12, dtype=dtype)
    y, z = (t.flatten() for t in torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"))
    bias = mixer.bias[:, y[None, :] - y[:, None] + 3, z[None, :] - z[:, None] + 5]
    tokens = x.flatten(1, 2)
    q, k, v = (p(tokens) for p in (mixer.query, mixer.key, mixer.value))
    everywhere = torch.ones(24, 24, dtype=torch.bool)
    return mixer(x).flatten(1, 2), mixer.out(_each_head(mixer, q, k, v, everywhere, bias))


@count("mixer", "gpsa", "GPSA(64), 4 heads", 16_468)
def gpsa_64():
    return params("mixer", "gpsa", 64)


def _convit(width: int, heads: int) -> int:
    mixer, mlp = params("mixer", "gpsa", width, heads=heads), params("channel_mixer", "mlp", width)
    attention = params("mixer", "attention", width, heads=heads) - 3 * width  # no bias of queries, keys and values
    blocks = 10 * mixer + 2 * attention + 12 * (mlp + 4 * width)
    return 768 * width + width + 196 * width + width + blocks + 2 * width + 1000 * width + 1000


count("mixer", "gpsa", "ConViT-Ti", 5_710_512)(functools.partial(_convit, 192, 4))
count("mixer", "gpsa", "ConViT-B", 86_540_040)(functools.partial(_convit, 768, 16))


@count("mixer", "simplified_linear_attention", "SLA(64), 2 heads, 14 x 14", 30_016)
def sla():
    return params("mixer", "simplified_linear_attention", 64, (14, 14), heads=2)


@count("mixer", "conv_projection_attention", "CvT attention (64), stride 2", 18_752)
def cvt_attention():
    return params("mixer", "conv_projection_attention", 64)


@count("mixer", "conv_projection_attention", "CvT-13", 19_997_480)
def cvt():
    total = 384  # the class token
    for before, width, kernel, depth in ((3, 64, 7, 1), (64, 192, 3, 2), (192, 384, 3, 10)):
        total += kernel * kernel * before * width + width + 2 * width
        mixer = params("mixer", "conv_projection_attention", width, heads=width // 64)
        total += depth * (mixer + params("channel_mixer", "mlp", width) + 4 * width)
    return total + 2 * 384 + 384 * 1000 + 1000
