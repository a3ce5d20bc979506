"""Attention mixers that read something coarser than the grid, or less than all of it."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F

from . import channels_first, channels_last, count, loaded, make, params, proof
from .catalogue import drawn, filled, fingerprints


def _drawn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _randomised(module, dtype, seed=0):
    """Every tensor away from where it starts, so that what starts at zero or one counts."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return module.to(dtype)


def _softmax_attention(module, q, k, v):
    """(B, tokens, C) and (B, keys, C), head by head."""
    outputs = []
    for a, b, c in zip(*(t.chunk(module.heads, dim=-1) for t in (q, k, v)), strict=True):
        outputs.append(torch.softmax(a @ b.mT / a.shape[-1] ** 0.5, dim=-1) @ c)
    return torch.cat(outputs, dim=-1)


def _low_res(dtype, *, fused, stride):
    """From torch's own layers, by channels first; an odd grid, which the way back cuts."""
    width, size = 64, (7, 6)
    mixer = make("mixer", "low_res_attention", width, size, stride=stride, fused=fused)
    mixer = _randomised(mixer, dtype)
    x = _drawn(2, width, *size, dtype=dtype)
    extent = mixer.reduce.weight.shape[-1]
    coarse = F.conv2d(x, mixer.reduce.weight, stride=stride, padding=extent // 2, groups=width)
    n = mixer.norm
    coarse = F.batch_norm(coarse, n.running_mean, n.running_var, n.weight, n.bias)
    tokens = coarse.flatten(2).mT
    y = _softmax_attention(mixer, *(tokens @ p.weight.T for p in (mixer.query, mixer.key, mixer.value)))
    y = y if fused else F.linear(y, mixer.out.weight, mixer.out.bias)
    y = y.mT.unflatten(2, coarse.shape[2:])
    back = torch.nn.ConvTranspose2d(
        y.shape[1], width, 2 * stride if stride > 1 else 3, stride, max(1, stride // 2), groups=1 if fused else width
    )
    back.to(dtype).load_state_dict(mixer.restore.state_dict())
    return mixer(channels_last(x)), channels_last(back(y)[:, :, : size[0], : size[1]])


@proof("mixer", "low_res_attention", "timm 1.0.31 ConvAttention, fingerprint (benchmarks/operator_oracles.py)")
def low_res_timm(dtype):
    """Two heads; there queries, keys and values of a head lie together."""
    parts = filled(192, 128).view(2, 3, 32, 128).transpose(0, 1).flatten(1, 2)
    state = {f"{name}.weight": part for name, part in zip(("query", "key", "value"), parts, strict=True)}
    state |= {"reduce.weight": filled(128, 1, 5, 5), "norm.weight": filled(128), "norm.bias": filled(128, bias=True)}
    state |= {"out.weight": filled(128, 64), "out.bias": filled(128, bias=True)}
    state |= {"restore.weight": filled(128, 1, 4, 4), "restore.bias": filled(128, bias=True)}
    mixer = loaded(make("mixer", "low_res_attention", 128, (7, 6)), state, dtype)
    expected = [-58.4493851620, 11.8652295003, -0.0476478575, -0.1090442967, 0.0040396946]
    return fingerprints(channels_first(mixer(channels_last(drawn(2, 128, 7, 6)).to(dtype))), expected)


for _fused, _stride in ((False, 2), (True, 2), (False, 1), (False, 4)):
    proof("mixer", "low_res_attention", "formula of catalogue c, D21, from torch's layers")(
        functools.partial(_low_res, fused=_fused, stride=_stride)
    )

for _what, _published, _knobs in (
    ("stride 2", 11_072, {"stride": 2}),
    ("stride 1", 9_600, {"stride": 1}),
    ("stride 2, fused", 40_704, {"stride": 2, "fused": True}),
):
    count("mixer", "low_res_attention", f"LowFormer ConvAttention(64), {_what}", _published)(
        functools.partial(params, "mixer", "low_res_attention", 64, **_knobs)
    )


def _super_tokens(dtype, *, size, rounds):
    """Over all pairs of a token and a cell; the cells outside the grid by their count, each e^0."""
    width, cell = 12, 2
    mixer = make("mixer", "super_token_attention", width, size, heads=3, cell=cell, rounds=rounds).to(dtype)
    x = _drawn(2, *size, width, dtype=dtype)
    full = F.pad(x, (0, 0, 0, -size[1] % cell, 0, -size[0] % cell))
    rows, columns = full.shape[1] // cell, full.shape[2] // cell
    tokens = full.flatten(1, 2)
    y, z = (
        t.flatten() for t in torch.meshgrid(torch.arange(full.shape[1]), torch.arange(full.shape[2]), indexing="ij")
    )
    a, b = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    near = ((y[:, None] // cell - a).abs() <= 1) & ((z[:, None] // cell - b).abs() <= 1)
    mine = ((y[:, None] // cell == a) & (z[:, None] // cell == b)).to(dtype)
    cells = torch.einsum("nm,bnc->bmc", mine / cell**2, tokens)
    for _ in range(rounds):
        weights = torch.where(near, (tokens @ cells.mT / width**0.5).exp(), 0)
        weights = weights / (weights.sum(-1) + 9 - near.sum(-1)).unsqueeze(-1)
        cells = weights.mT @ tokens / (weights.sum(1).unsqueeze(-1) + 1e-12)
    updated = mixer.out(_softmax_attention(mixer, *(p(cells) for p in (mixer.query, mixer.key, mixer.value))))
    expected = (weights @ updated).unflatten(1, (full.shape[1], full.shape[2]))[:, : size[0], : size[1]]
    return mixer(x), expected


for _size, _rounds in (((6, 8), 1), ((5, 7), 2)):
    proof("mixer", "super_token_attention", "formula of catalogue c, C35, over all pairs of tokens and cells")(
        functools.partial(_super_tokens, size=_size, rounds=_rounds)
    )


@count("mixer", "super_token_attention", "STA(64), 2 heads", 16_640)
def super_tokens_64():
    return params("mixer", "super_token_attention", 64, heads=2)


@count("mixer", "super_token_attention", "STViT-S, what is trained", 25_495_624)
def stvit():
    def conv(before, width):  # of 3, with a bias and a batch norm
        return 9 * before * width + width + 2 * width

    widths, total = (64, 128, 320, 512), conv(3, 32) + conv(32, 32) + conv(32, 64) + conv(64, 64)
    for i, (width, depth, heads) in enumerate(zip(widths, (3, 5, 9, 3), (1, 2, 5, 8), strict=True)):
        mixer = params("mixer", "super_token_attention", width, heads=heads)
        feed_forward = params("channel_mixer", "mlp", width) + 10 * 4 * width  # a depthwise window inside
        total += depth * (mixer + feed_forward + 10 * width + 4 * width)
        total += conv(width, widths[i + 1]) if i < 3 else 0
    return total + 512 * 1024 + 1024 + 2 * 1024 + 1024 * 1000 + 1000


def _transnext_state(width, heads):
    key, value = filled(2 * width, width).chunk(2)
    key_bias, value_bias = filled(2 * width, bias=True).chunk(2)
    part = width // heads
    state = {"key.weight": key, "key.bias": key_bias, "value.weight": value, "value.bias": value_bias}
    for name in ("query", "out"):
        state |= {f"{name}.weight": filled(width, width), f"{name}.bias": filled(width, bias=True)}
    state |= {"temperature": filled(heads, 1, 1).flatten(), "embedding": filled(heads, 1, part).flatten(1)}
    state |= {"distance_in.weight": filled(512, 2), "distance_in.bias": filled(512, bias=True)}
    state |= {"distance_out.weight": filled(heads, 512), "distance_out.bias": filled(heads, bias=True)}
    return state


@proof("mixer", "aggregated_attention", "authors' AggregatedAttention, fingerprint of catalogue b", double=3e-7)
def aggregated(dtype):
    """The authors' module computes its distances in float32."""
    state = _transnext_state(16, 2)
    state |= {"mix.weight": filled(16, 16), "mix.bias": filled(16, bias=True)}
    state |= {"norm.weight": filled(16), "norm.bias": filled(16, bias=True)}
    state |= {"bias": filled(2, 9).unflatten(1, (3, 3)), "tokens": filled(2, 8, 9).unflatten(2, (3, 3))}
    state |= {"token_bias": filled(2, 1, 9).view(2, 3, 3)}
    mixer = loaded(make("mixer", "aggregated_attention", 16, (8, 8), heads=2, reduction=2), state, dtype)
    expected = [-76.36569911, 41.99145517, -0.62104438, -0.78349999, -0.86965168]
    return fingerprints(mixer(drawn(2, 64, 16).view(2, 8, 8, 16).to(dtype)), expected)


@proof("mixer", "aggregated_attention", "authors' last stage, Attention, fingerprint of catalogue b", double=3e-7)
def aggregated_last(dtype):
    state = _transnext_state(16, 2)
    for name, weight, bias in zip(
        ("query", "key", "value"), filled(48, 16).chunk(3), filled(48, bias=True).chunk(3), strict=True
    ):
        state |= {f"{name}.weight": weight, f"{name}.bias": bias}
    mixer = loaded(make("mixer", "aggregated_attention", 16, (4, 4), heads=2, reduction=1), state, dtype)
    expected = [-57.46998254, 7.11594356, -0.53453928, -0.22718329, 0.03092876]
    return fingerprints(mixer(drawn(2, 16, 16).view(2, 4, 4, 16).to(dtype)), expected)


@count("mixer", "aggregated_attention", "AggregatedAttention(64), 4 heads, 8 x 8, reduction 2", 25_232)
def aggregated_64():
    return params("mixer", "aggregated_attention", 64, (8, 8), reduction=2)


@count("mixer", "aggregated_attention", "AggregatedAttention(96), 4 heads, 28 x 28, reduction 4", 51_376)
def aggregated_96():
    return params("mixer", "aggregated_attention", 96, (28, 28))


@count("mixer", "aggregated_attention", "TransNeXt-Micro", 12_809_304)
def transnext():
    widths, before, total = (48, 96, 192, 384), 3, 0
    for i, (width, depth) in enumerate(zip(widths, (2, 2, 15, 2), strict=True)):
        kernel, reduction, expansion = (7, 3, 3, 3)[i], (8, 4, 2, 1)[i], (8.0, 8.0, 4.0, 4.0)[i]
        total += kernel**2 * before * width + width + 2 * width
        size = (56 >> i, 56 >> i)
        mixer = params("mixer", "aggregated_attention", width, size, heads=width // 24, reduction=reduction)
        feed_forward = params("channel_mixer", "conv_glu", width, size, expansion=expansion)
        total += depth * (mixer + feed_forward + 4 * width) + 2 * width
        before = width
    return total + 384 * 1000 + 1000


def _circle(size, radius):
    y, z = (t.flatten() for t in torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij"))
    return (y[:, None] - y).square() + (z[:, None] - z).square() < radius**2


@proof("mixer", "circular_attention", "torch's flex_attention with the circle as its mask")
def circular(dtype):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size, radius, heads = (11, 13), 4, 3
    mixer = make("mixer", "circular_attention", 12, size, heads=heads, radius=radius).to(dtype)
    x = _drawn(2, *size, 12, dtype=dtype)

    def near(batch, head, query, key):
        (y, z), (a, b) = (query // size[1], query % size[1]), (key // size[1], key % size[1])
        return (y - a) * (y - a) + (z - b) * (z - b) < radius**2

    tokens = x.flatten(1, 2)
    q, k, v = (p(tokens).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (mixer.query, mixer.key, mixer.value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is not compiled
        mask = create_block_mask(near, B=None, H=None, Q_LEN=143, KV_LEN=143, device="cpu")
        y = flex_attention(q, k, v, block_mask=mask)
    return mixer(x).flatten(1, 2), mixer.out(y.transpose(1, 2).flatten(2))


@proof("mixer", "circular_attention", "formula of catalogue b, 50, over all pairs of tokens, with a pooled grid")
def circular_pooled(dtype):
    size, radius, cell = (9, 10), 3, 2
    mixer = make("mixer", "circular_attention", 12, size, heads=3, radius=radius, reduction=cell)
    mixer = _randomised(mixer, dtype)
    x = _drawn(2, *size, 12, dtype=dtype)
    tokens = x.flatten(1, 2)

    def pooled(t):
        t = F.pad(channels_first(t.unflatten(1, size)), (0, 0, 0, 1))
        return F.conv2d(t, mixer.pool.expand(12, 1, cell, cell), stride=cell, groups=12).flatten(2).mT

    k, v = (torch.cat([p(tokens), pooled(p(tokens))], dim=1) for p in (mixer.key, mixer.value))
    seen = torch.cat([_circle(size, radius), torch.ones(90, 25, dtype=torch.bool)], dim=1)
    outputs = []
    for a, b, c in zip(*(t.chunk(3, dim=-1) for t in (mixer.query(tokens), k, v)), strict=True):
        logits = (a @ b.mT / 2).masked_fill(~seen, float("-inf"))
        outputs.append(logits.softmax(-1) @ c)
    return mixer(x).flatten(1, 2), mixer.out(torch.cat(outputs, dim=-1))


for _radius, _keys in ((8, 193), (16, 793)):
    count("mixer", "circular_attention", f"CLEAR, keys of a query inside, radius {_radius}", _keys)(
        functools.partial(
            lambda radius: int(
                make("mixer", "circular_attention", 4, (2 * radius, 2 * radius), heads=1, radius=radius)
                .seen.sum(-1)
                .max()
            ),
            _radius,
        )
    )


def _chunked(dtype, *, kind, size):
    """One chunk after the other, and in it one pair after the other's distance."""
    width, chunk, keys = 10, 16, 16
    mixer = make("mixer", "chunked_attention", width, size, kind, chunk=chunk, key_width=keys)
    mixer = _randomised(mixer, dtype)
    x = _drawn(2, *size, width, dtype=dtype)
    tokens, outputs = x.flatten(1, -2), []
    for part in tokens.split(chunk, dim=1):
        shared = F.silu(mixer.shared(part))
        q, k = shared * mixer.query_scale + mixer.query_shift, shared * mixer.key_scale + mixer.key_shift
        logits = torch.einsum("bqz,bkz->bqk", q, k) / keys**0.5
        for i in range(part.shape[1]):
            for j in range(part.shape[1]):
                logits[:, i, j] += mixer.bias[j - i + chunk - 1]
                if kind == "causal" and j > i:
                    logits[:, i, j] = float("-inf")
        y = torch.softmax(logits, dim=-1) @ F.silu(mixer.value(part))
        h = F.silu(mixer.candidate(part) + mixer.out(y * F.silu(mixer.reset(part))))
        outputs.append(torch.sigmoid(mixer.update(part)) * (h - part))
    return mixer(x).flatten(1, -2), torch.cat(outputs, dim=1)


for _kind, _size in (("causal", (37,)), ("sequence", (37,)), ("image", (5, 9))):
    proof("mixer", "chunked_attention", "formula of Mega's gated attention, chunk by chunk")(
        functools.partial(_chunked, kind=_kind, size=_size)
    )


@proof("mixer", "global_context_attention", "timm 1.0.31 WindowAttentionGlobal, fingerprint of catalogue b")
def global_context(dtype):
    """The queries are given: 4 windows each of two images."""
    mixer = make("mixer", "global_context_attention", 16, (8, 8), heads=2, window=4).to(dtype)
    key, value = filled(32, 16).chunk(2)
    key_bias, value_bias = filled(32, bias=True).chunk(2)
    # There a row for each distance from the key to the query, here from the query to the key.
    state = {"bias": filled(49, 2).T.reshape(2, 7, 7).flip(1, 2), "key.weight": key, "value.weight": value}
    state |= {"key.bias": key_bias, "value.bias": value_bias}
    state |= {"out.weight": filled(16, 16), "out.bias": filled(16, bias=True)}
    mixer.load_state_dict(state, strict=False)

    def windows(grid):
        return grid.unflatten(2, (2, 4)).unflatten(1, (2, 4)).transpose(2, 3).reshape(8, 16, -1)

    tiles = drawn(8, 16, 16).view(2, 2, 2, 4, 4, 16).transpose(2, 3).reshape(2, 8, 8, 16).to(dtype)
    answer = windows(mixer.attended(tiles, 0.5 * drawn(2, 16, 16).to(dtype)))
    expected = [5.84278447, 13.74670536, -0.07874221, -0.06256236, 0.44722885]
    return fingerprints(answer, expected)


@proof("mixer", "global_context_attention", "timm 1.0.31 FeatureBlock, fingerprint of catalogue b", double=2e-7)
def global_queries(dtype):
    mixer = make("mixer", "global_context_attention", 64, (8, 8), window=4, levels=1)
    weights = {"window": (64, 1, 3, 3), "squeeze": (16, 64), "excite": (64, 16), "project": (64, 64)}
    state = {f"generator.0.{name}.weight": filled(*shape) for name, shape in weights.items()}
    mixer.to(dtype).load_state_dict(state, strict=False)
    queries = mixer.queries(channels_last(drawn(2, 64, 8, 8)).to(dtype)).mT.contiguous()
    return fingerprints(queries, [2502.19032227, 57.98173070, 0.82820142, 1.30493908, 1.29343828])


@count("mixer", "global_context_attention", "GC ViT-XXT, a generator for each stage", 11_995_428)
def gcvit():
    def features(width):
        return 9 * width + width**2 + 2 * width * (width // 4)

    def reduced(width, after):  # norm, features, convolution, norm
        return 2 * width + features(width) + 9 * width * after + 2 * after

    total, width = 27 * 64 + 64 + reduced(64, 64), 64
    for i, (depth, window, steps) in enumerate(zip((2, 2, 6, 2), (7, 7, 14, 7), (3, 2, 1, 1), strict=True)):
        size, options = (56 >> i, 56 >> i), {"heads": 2 << i, "window": window}
        everywhere = params("mixer", "global_context_attention", width, size, levels=1, **options) - features(width)
        local = params("mixer", "window_attention", width, size, **options)
        blocks = depth // 2 * (everywhere + local) + depth * (params("channel_mixer", "mlp", width, expansion=3.0))
        total += steps * features(width) + blocks + depth * 4 * width
        total += reduced(width, 2 * width) if i < 3 else 2 * width
        width *= 2 if i < 3 else 1
    return total + width * 1000 + 1000


@proof("mixer", "glmix", "authors' GLMixBlock, fingerprint of catalogue b, its other parts by torch's functions")
def glmix(dtype):
    """Slots of what the block reads: the mixer's own parts, given them."""
    state = {}
    for name, weight, bias in zip(
        ("query", "key", "value"), filled(48, 16).chunk(3), filled(48, bias=True).chunk(3), strict=True
    ):
        state |= {f"{name}.weight": weight, f"{name}.bias": bias}
    for name in ("out", "local_in", "local_out"):
        state |= {f"{name}.weight": filled(16, 16), f"{name}.bias": filled(16, bias=True)}
    state |= {"window.weight": filled(16, 1, 5, 5), "window.bias": filled(16, bias=True)}
    state["scale"] = torch.tensor(16**-0.5)
    mixer = make("mixer", "glmix", 16, (8, 8), heads=2, slots=16)
    mixer.cells = (2, 2)
    mixer = loaded(mixer, state, dtype)
    x = drawn(2, 16, 8, 8).to(dtype)
    bias, hidden = filled(16, bias=True).to(dtype), filled(48, bias=True).to(dtype)

    def normed(t):
        weight = filled(16).to(dtype)
        return F.batch_norm(t, torch.zeros(16, dtype=dtype), torch.ones(16, dtype=dtype), weight, bias)

    placed = x + F.conv2d(x, filled(16, 1, 3, 3).to(dtype), bias, padding=1, groups=16)
    mixed = mixer.mixed(channels_last(normed(placed)), mixer.pooled(channels_last(x)))
    y = placed + channels_first(mixed)
    h = F.conv2d(normed(y), filled(48, 16, 1, 1).to(dtype), hidden)
    h = F.gelu(h + F.conv2d(h, filled(48, 1, 3, 3).to(dtype), hidden, padding=1, groups=48))
    y = y + F.conv2d(h, filled(16, 48, 1, 1).to(dtype), bias)
    return fingerprints(y, [-117.90188493, 88.23438402, -1.39552124, -1.44424854, -1.44383794])


@proof("mixer", "glmix", "formula of catalogue a, B19, learned slots, from torch's functions")
def glmix_learned(dtype):
    size, width = (5, 7), 12
    mixer = _randomised(make("mixer", "glmix", width, size, heads=3, slots=16, initial="learned"), dtype)
    x = _drawn(2, *size, width, dtype=dtype)
    tokens = x.flatten(1, 2)
    cosine = F.cosine_similarity(mixer.slots[None, :, None], tokens[:, None], dim=-1) * mixer.scale
    slots = torch.softmax(cosine, dim=2) @ tokens
    attention = torch.nn.MultiheadAttention(width, 3, batch_first=True).to(dtype)
    projections = (mixer.query, mixer.key, mixer.value)
    attention.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
    attention.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    attention.out_proj.load_state_dict(mixer.out.state_dict())
    slots = attention(slots, slots, slots, need_weights=False)[0]
    spread = (torch.softmax(cosine, dim=1).mT @ slots).view(x.shape)
    local = channels_first(mixer.local_in(x))
    local = F.conv2d(local, mixer.window.weight, mixer.window.bias, padding=2, groups=width)
    return mixer(x), spread + mixer.local_out(channels_last(local))


@count("mixer", "glmix", "GLMix(64) without the block's other parts, 64 slots", 26_625)
def glmix_64():
    return params("mixer", "glmix", 64)


@count("mixer", "glmix", "GLNet-4g", 27_001_593)
def glnet():
    widths, total = (64, 128, 256, 512), 27 * 32 + 32 + 2 * 32 + 9 * 32 * 64 + 64 + 2 * 64
    for i, (width, depth, attended) in enumerate(zip(widths, (4, 4, 18, 4), (0, 0, 9, 4), strict=True)):
        total += 9 * widths[i - 1] * width + width + 2 * width if i else 0
        mixed = (depth - attended) * params("mixer", "glmix", width) + attended * params("mixer", "attention", width)
        # Beside them a position window, two norms, and a window inside the feed-forward layer.
        total += mixed + depth * (params("channel_mixer", "mlp", width, expansion=3.0) + (10 + 4 + 30) * width)
    return total + 2 * 512 + 512 * 1000 + 1000


@count("mixer", "glmix", "GLNet-STL with learned slots", 30_481_106)
def glnet_learned():
    widths, total = (96, 192, 384, 768), 48 * 96 + 96 + 2 * 96
    for i, (width, depth) in enumerate(zip(widths, (2, 2, 6, 2), strict=True)):
        total += 2 * widths[i - 1] + 4 * widths[i - 1] * width + width if i else 0
        name, knobs = ("glmix", {"initial": "learned"}) if i < 3 else ("attention", {})
        mixer = params("mixer", name, width, **knobs)
        total += depth * (mixer + params("channel_mixer", "mlp", width) + 4 * width)
    return total + 2 * 768 + 768 * 1000 + 1000


def _mha(module, x, read):
    """torch's own, with the module's weights."""
    width = x.shape[-1]
    attention = torch.nn.MultiheadAttention(width, module.heads, batch_first=True).to(x.dtype)
    projections = (module.query, module.key, module.value)
    attention.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
    attention.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    attention.out_proj.load_state_dict(module.out.state_dict())
    return attention(x, read, read, need_weights=False)[0]


@proof("mixer", "fit", "formula of catalogue c, D10, group by group, from torch's layers")
def fit(dtype):
    size, width, group, latents = (4, 6), 12, 2, 3
    mixer = _randomised(make("mixer", "fit", width, size, heads=3, group=group, latents=latents, layers=2), dtype)
    x = _drawn(2, *size, width, dtype=dtype)
    groups = [x[:, i : i + 2, j : j + 2].flatten(1, 2) for i in range(0, 4, 2) for j in range(0, 6, 2)]
    written = []
    for own, tokens in zip(mixer.latents.split(latents), groups, strict=True):
        own = own.expand(2, -1, -1)
        written.append(own + _mha(mixer.write, mixer.write.norm(own), mixer.write.read_norm(tokens)))
    z = torch.cat(written, dim=1)
    for layer in mixer.encoder:
        encoder = torch.nn.TransformerEncoderLayer(
            width, 3, 4 * width, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).to(dtype)
        parts = (layer.attention.query, layer.attention.key, layer.attention.value)
        encoder.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        encoder.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        encoder.self_attn.out_proj.load_state_dict(layer.attention.out.state_dict())
        encoder.linear1.load_state_dict(layer.up.state_dict())
        encoder.linear2.load_state_dict(layer.down.state_dict())
        encoder.norm1.load_state_dict(layer.attention.norm.state_dict())
        encoder.norm2.load_state_dict(layer.norm.state_dict())
        z = encoder(z)
    expected = torch.zeros_like(x)
    for g, (own, tokens) in enumerate(zip(z.split(latents, dim=1), groups, strict=True)):
        i, j = 2 * (g // 3), 2 * (g % 3)
        answer = _mha(mixer.read, mixer.read.norm(tokens), mixer.read.read_norm(own))
        expected[:, i : i + 2, j : j + 2] = answer.unflatten(1, (2, 2))
    return mixer(x), expected
