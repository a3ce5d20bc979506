"""Compositions of the mixers that attend, that sum over all tokens, or that scan: tokens, channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import FORMS, Form, batch_norm, composition, conv, depthwise, heads, joined, layer_norm, mean, pointwise


def attend(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, **options)


def first(x):
    return x.movedim(-1, 1)


def last(x):
    return x.movedim(1, -1)


def _multi_head(m, x):
    module = nn.MultiheadAttention(x.shape[-1], m.heads, batch_first=True).eval()
    tokens = x.flatten(1, -2)
    return lambda _: module(tokens, tokens, tokens, need_weights=False)[0]


FORMS.append(Form("mixer", "attention", "torch.nn.MultiheadAttention", False, build=_multi_head))


def windows(x, k):
    """(B, N, k * k, C) of channels last, as the authors' unfold."""
    y = first(x) if x.dim() == 4 else first(x).unsqueeze(2)
    taps = (k, k) if x.dim() == 4 else (1, k)
    parts = F.unfold(y, taps, padding=tuple(t // 2 for t in taps))
    return parts.view(x.shape[0], x.shape[-1], -1, parts.shape[-1]).permute(0, 3, 2, 1)


def cells(x, extent):
    """(B, cells, tokens, C) of a grid that cells divide."""
    B, C = x.shape[0], x.shape[-1]
    if x.dim() == 3:
        return x.view(B, -1, extent, C)
    H, W = x.shape[1:3]
    y = x.view(B, H // extent, extent, W // extent, extent, C).permute(0, 1, 3, 2, 4, 5)
    return y.reshape(B, -1, extent * extent, C)


def uncelled(y, extent, shape):
    if len(shape) == 3:
        return y.reshape(shape)
    B, H, W, C = shape
    y = y.view(B, H // extent, W // extent, extent, extent, C).permute(0, 1, 3, 2, 4, 5)
    return y.reshape(shape)


@composition(
    "aggregated_attention", "the authors' unfold, one product for each part, two layers on all distances", first=False
)
def aggregated_attention(m, x):
    tokens, size, h = x.flatten(1, -2), x.shape[1:-1], m.heads
    q, k = (F.normalize(heads(tokens, p, h), dim=-1) for p in (m.query, m.key))
    v = m.value(tokens)
    axes = []
    for axis, n in enumerate(size):
        t = m.get_buffer(f"apart{axis}").to(x.dtype) * (4 / max(1, n - 1))
        axes.append(t.sign() * (t.abs() + 1).log2() / 3)
    table = m.distance_out(F.relu(m.distance_in(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1))))
    if len(size) == 2:
        table = table[m.places0[:, None, :, None], m.places1[None, :, None, :]].flatten(2, 3).flatten(0, 1)
    else:
        table = table[m.places0]
    bias = table.movedim(-1, 0)
    scale = F.softplus(m.temperature).view(-1, 1, 1) * (m.counts + bias.shape[-1]).to(x.dtype).log()
    scaled = (q + m.embedding.unsqueeze(1)) * scale
    mixed = first(F.gelu(m.mix(x)))
    pool = F.adaptive_avg_pool2d if x.dim() == 4 else F.adaptive_avg_pool1d
    pooled = pool(mixed, m._pooled if x.dim() == 4 else m._pooled[0])
    pooled = layer_norm(pooled.flatten(2).transpose(1, 2), m.norm)
    pooled_k, pooled_v = F.normalize(heads(pooled, m.key, h), dim=-1), heads(pooled, m.value, h)
    k_near = windows(joined(k).view(x.shape), m.window).unflatten(-1, (h, -1)).permute(0, 3, 1, 2, 4)
    v_near = windows(v.view(x.shape), m.window).unflatten(-1, (h, -1)).permute(0, 3, 1, 2, 4)
    near = (scaled.unsqueeze(-2) @ k_near.transpose(-2, -1)).squeeze(-2) + m.bias.flatten(1).unsqueeze(1)
    near = near.masked_fill(~m.valid, float("-inf"))
    far = scaled @ pooled_k.transpose(-2, -1) + bias
    near, far = torch.cat([near, far], dim=-1).softmax(-1).split([near.shape[-1], far.shape[-1]], dim=-1)
    near = near + q @ m.tokens.flatten(2) + m.token_bias.flatten(1).unsqueeze(1)
    y = (near.unsqueeze(-2) @ v_near).squeeze(-2) + far @ pooled_v
    return m.out(joined(y)).view(x.shape)


@composition("chunked_attention", "torch's layers, products and softmax", first=False)
def chunked_attention(m, x):
    tokens = x.flatten(1, -2)
    shared, v = F.silu(m.shared(tokens)), F.silu(m.value(tokens))
    q, k = shared * m.query_scale + m.query_shift, shared * m.key_scale + m.key_shift
    q, k, v = (t.unflatten(1, (-1, m.chunk)) for t in (q, k, v))
    place = torch.arange(m.chunk)
    bias = m.bias[place - place[:, None] + m.chunk - 1]
    y = ((q @ k.mT) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
    h = F.silu(m.candidate(tokens) + m.out(y.flatten(1, 2) * F.silu(m.reset(tokens))))
    return (torch.sigmoid(m.update(tokens)) * (h - tokens)).view(x.shape)


_MASKS: dict = {}


@composition(
    "circular_attention", "torch's attention of all tokens with the circle as its mask, made before", first=False
)
def circular_attention(m, x):
    tokens, size = x.flatten(1, -2), x.shape[1:-1]
    if size not in _MASKS:
        places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"), -1).flatten(0, -2)
        _MASKS[size] = (places[:, None] - places).square().sum(-1) < m.radius**2
    q, k, v = (heads(tokens, p, m.heads) for p in (m.query, m.key, m.value))
    return m.out(joined(attend(q, k, v, attn_mask=_MASKS[size]))).view(x.shape)


@composition("conv_projection_attention", "torch's convolutions, batch norm, layers and attention")
def conv_projection_attention(m, x):
    def projected(window, layer):
        y = conv(x, window.weight, None, stride=window.stride, padding=1, groups=x.shape[1])
        return heads(batch_norm(y, window.norm).flatten(2).transpose(1, 2), layer, m.heads)

    q, k, v = (projected(getattr(m, f"{n}_window"), getattr(m, n)) for n in ("query", "key", "value"))
    y = m.out(joined(attend(q, k, v, scale=float(x.shape[1]) ** -0.5)))
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


def _within(layer, t, read, h):
    n = layer_norm(t, layer.norm)
    r = n if read is None else layer_norm(read, layer.read_norm)
    q, k, v = heads(n, layer.query, h), heads(r, layer.key, h), heads(r, layer.value, h)
    return layer.out(joined(attend(q, k, v)))


@composition("fit", "torch's layers and attention, groups beside examples", first=False)
def fit(m, x):
    extent = m.extents[-1]
    groups = cells(x, extent)[0]
    z = m.latents.unflatten(0, (-1, m.count))
    z = (z + _within(m.write, z, groups, m.write.heads)).flatten(0, 1).unsqueeze(0)
    for layer in m.encoder:
        z = z + _within(layer.attention, z, None, layer.attention.heads)
        z = z + layer.down(F.gelu(layer.up(layer_norm(z, layer.norm))))
    y = _within(m.read, groups, z[0].unflatten(0, (len(groups), -1)), m.read.heads)
    return uncelled(y.unsqueeze(0), extent, x.shape)


def _summed(q, k, v):
    return q @ (k.mT @ v), q @ k.sum(dim=-2).unsqueeze(-1)


@composition("linear_attention", "torch's layers and products", first=False)
def linear_attention(m, x):
    tokens = x.flatten(1, -2)
    q, k = (F.elu(heads(tokens, p, m.heads)) + 1 for p in (m.query, m.key))
    y, norm = _summed(q, k, heads(tokens, m.value, m.heads))
    return m.out(joined(y / (norm + 1e-6))).view(x.shape)


@composition("focused_local_linear", "torch's layers and products", first=False)
def focused_local_linear(m, x):
    tokens = x.flatten(1, -2)
    q, k = (F.relu(heads(tokens, p, m.heads)) for p in (m.query, m.key))
    y, norm = _summed(q, k, heads(tokens, m.value, m.heads))
    return m.out(joined(y / norm.clamp(min=m.least) * m.temperature.view(-1, 1, 1))).view(x.shape)


@composition("simplified_linear_attention", "torch's layers, products and convolution", first=False)
def simplified_linear_attention(m, x):
    tokens, h = x.flatten(1, -2), m.heads
    q = F.relu(heads(tokens, m.query, h))
    k = F.relu((m.key(tokens) + m.position).view(*tokens.shape[:2], h, -1).transpose(1, 2))
    v = heads(tokens, m.value, h)
    y, norm = _summed(q, k, v)
    local = depthwise(v.flatten(0, 1).transpose(1, 2).unflatten(2, x.shape[1:-1]), m.window)
    y = y / (norm + 1e-6) + local.flatten(2).transpose(1, 2).unflatten(0, (-1, h))
    return m.out(joined(y)).view(x.shape)


@composition("kv_gated_linear", "torch's layers, products and convolution", first=False)
def kv_gated_linear(m, x):
    tokens, h = x.flatten(1, -2), m.heads
    q, k = (F.relu(heads(tokens, p, h)) + 1e-6 for p in (m.query, m.key))
    k, v = k * m.key_gate.unsqueeze(-1), heads(tokens, m.value, h) * m.value_gate.unsqueeze(-1)
    y = (q @ (k.mT @ v / k.shape[-2])) / (q @ k.mean(-2).unsqueeze(-1) + 1e-6)
    y = joined(y) + depthwise(first(x), m.window).flatten(2).transpose(1, 2)
    return m.out(y).view(x.shape)


@composition("glmix", "torch's pooling, products, attention and convolution", first=False)
def glmix(m, x):
    tokens = x.flatten(1, -2)
    grid = first(x) if x.dim() == 4 else first(x).unsqueeze(2)
    slots = F.adaptive_avg_pool2d(grid, m.cells).flatten(2).transpose(1, 2)
    logits = m.scale * F.normalize(slots, dim=-1) @ F.normalize(tokens, dim=-1).mT
    s = logits.softmax(-1) @ tokens
    q, k, v = (heads(s, p, m.heads) for p in (m.query, m.key, m.value))
    y = logits.softmax(-2).mT @ m.out(joined(attend(q, k, v)))
    return y.view(x.shape) + m.local_out(last(depthwise(first(m.local_in(x)), m.window)))


@composition("global_context_attention", "torch's convolutions, pooling and attention in windows", first=False)
def global_context_attention(m, x):
    y, image = first(x), x.dim() == 4
    for step in m.generator:
        z = F.gelu(depthwise(y, step.window))
        z = z * torch.sigmoid(pointwise(F.gelu(pointwise(mean(z), step.squeeze)), step.excite))
        y = y + pointwise(z, step.project)
        y = F.max_pool2d(y, 3, 2, 1) if image else F.max_pool1d(y, 3, 2, 1)
    tile = m._tile[-1]
    y = F.adaptive_avg_pool2d(y, (tile, tile)) if image else F.adaptive_avg_pool1d(y, tile)
    fill = -x.shape[1] % tile
    grid = F.pad(x, (0, 0, 0, fill)) if fill else x
    inside = cells(grid, tile)[0]
    q = y.flatten(2).transpose(1, 2).view(1, -1, m.heads, x.shape[-1] // m.heads).transpose(1, 2)
    k, v = heads(inside, m.key, m.heads), heads(inside, m.value, m.heads)
    mask = _bias(m)
    if fill:
        there = (torch.arange(grid.shape[1]) < x.shape[1]).view(-1, 1, 1, tile)
        mask = mask.unsqueeze(0).masked_fill(~there, float("-inf"))
    out = m.out(joined(attend(q.expand(k.shape), k, v, attn_mask=mask)))
    return uncelled(out.unsqueeze(0), tile, grid.shape)[:, : x.shape[1]]


_INDEX: dict = {}


def _bias(m):
    """The table of a window's distances, indexed for each pair, as Swin's code does it."""
    tile, table = m._tile, m.bias
    if tile not in _INDEX:
        rows, columns = (torch.arange(n) for n in tile)
        down = rows - rows[:, None] + tile[0] - 1
        across = columns - columns[:, None] + tile[1] - 1
        index = down[:, None, :, None] * (2 * tile[1] - 1) + across[None, :, None, :]
        _INDEX[tile] = index.flatten(2, 3).flatten(0, 1).flatten()
    index, tokens = _INDEX[tile], tile[0] * tile[1]
    return table.flatten(1).T[index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()


@composition("window_attention", "Swin's own: windows, torch's attention with the indexed table", first=False)
def window_attention(m, x):
    tile = m._tile[-1]
    fill = -x.shape[1] % tile
    grid = F.pad(x, (0, 0, 0, fill)) if fill else x
    inside = cells(grid, tile)[0]
    mask = _bias(m)
    if fill:
        there = (torch.arange(grid.shape[1]) < x.shape[1]).view(-1, 1, 1, tile)
        mask = mask.unsqueeze(0).masked_fill(~there, float("-inf"))
    q, k, v = (heads(inside, p, m.heads) for p in (m.query, m.key, m.value))
    out = m.out(joined(attend(q, k, v, attn_mask=mask)))
    return uncelled(out.unsqueeze(0), tile, grid.shape)[:, : x.shape[1]]


@composition("relative_attention", "torch's attention with the indexed table", first=False)
def relative_attention(m, x):
    tokens = x.flatten(1, -2)
    q, k, v = (heads(tokens, p, m.heads) for p in (m.query, m.key, m.value))
    return m.out(joined(attend(q, k, v, attn_mask=_bias(m)))).view(x.shape)


@composition("gpsa", "the authors' products and softmaxes, places kept", first=False)
def gpsa(m, x):
    tokens = x.flatten(1, -2)
    q, k, v = (heads(tokens, p, m.heads) for p in (m.query, m.key, m.value))
    placed = _INDEX.setdefault(("gpsa", x.shape), m.places.movedim(0, -1).contiguous())
    position = F.linear(placed, m.place, m.bias).movedim(-1, 0).softmax(-1)
    content = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)
    gate = m.gate.view(1, -1, 1, 1)
    weights = (1 - torch.sigmoid(gate)) * content + torch.sigmoid(gate) * position
    weights = weights / weights.sum(-1, keepdim=True)
    return m.out(joined(weights @ v)).view(x.shape)


@composition("msa_conv", "torch's unfold, products and softmax, torch's convolution", first=False)
def msa_conv(m, x):
    q = m.query(x).flatten(1, -2).unsqueeze(-2) * x.shape[-1] ** -0.5
    k, v = windows(m.key(x), m.kernel_size), windows(m.value(x), m.kernel_size)
    y = x + ((q @ k.mT).softmax(-1) @ v).squeeze(-2).view(x.shape)
    layer = m.conv.conv
    weight = layer.weight if x.dim() == 4 else layer.weight.squeeze(2)
    return last(F.relu(conv(first(y), weight, padding=m.kernel_size // 2)))


@composition("multi_axis_mlp", "torch's layers in blocks and in a grid's cells", first=False)
def multi_axis_mlp(m, x):
    size, image = x.shape[1:-1], x.dim() == 4

    def gelu(t):
        return F.gelu(t, approximate="tanh")

    def mlp(layer, t, dim):
        n = layer_norm(t, layer.norm)
        v = layer_norm(gelu(layer.gate(n)), layer.gate_norm)
        v = layer.mix(v.transpose(dim, -1)).transpose(dim, -1)
        return t + layer.out(gelu(layer.keep(n)) * (v + 1))

    cell = size[0] // m.grid[0]
    u, v = gelu(m.to_grid(x)), gelu(m.to_block(x))
    if image:
        u = u.view(1, m.grid[0], cell, m.grid[1], cell, -1).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        u = mlp(m.across, u, 1).unflatten(1, m.grid).unflatten(3, (cell, cell)).permute(0, 1, 3, 2, 4, 5)
    else:
        u = mlp(m.across, u.view(1, m.grid[0], cell, -1), 1)
    v = uncelled(mlp(m.inside, cells(v, m.block[0]), 2), m.block[0], x.shape)
    return m.from_grid(u.reshape(x.shape)) + m.from_block(v)


def _nearest(size, window):
    along = [(torch.arange(n) - window // 2).clamp(0, n - window)[:, None] + torch.arange(window) for n in size]
    if len(size) == 1:
        return along[0]
    rows, columns = along
    return (rows[:, None, :, None] * size[1] + columns[None, :, None, :]).flatten(2).flatten(0, 1)


@composition(
    "neighborhood_attention", "keys and values of each window picked, torch's products and softmax", first=False
)
def neighborhood_attention(m, x):
    tokens, size = x.flatten(1, -2), x.shape[1:-1]
    index = _INDEX.setdefault(("near", size, m.window), _nearest(size, m.window))
    q = m.query(tokens).unflatten(-1, (m.heads, 1, -1))
    k, v = (p(tokens)[:, index].unflatten(-1, (m.heads, -1)).transpose(2, 3) for p in (m.key, m.value))
    y = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    return m.out(y.flatten(2)).view(x.shape)


@composition("random_mixing", "one product", first=False)
def random_mixing(m, x):
    return (m.matrix @ x.flatten(1, -2)).view(x.shape)


@composition("retention_2d", "the authors' products and softmaxes, along rows and then columns", first=False)
def retention_2d(m, x):
    h, size = m.heads, x.shape[1:-1]
    q, k, v = (p(x).flatten(1, -2).unflatten(-1, (h, -1)) for p in (m.query, m.key, m.value))

    def turned(t):
        across = torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2)
        return t * m.cosines.unsqueeze(1) + across * m.sines.unsqueeze(1)

    q, k, scale = turned(q), turned(k), q.shape[-1] ** -0.5
    if len(size) == 2:
        q, k, v = (t.unflatten(1, size) for t in (q, k, v))  # (B, H, W, h, d)
        rows = (q.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2) * scale + m.mask).softmax(-1)
        v = (rows @ v.transpose(2, 3)).permute(0, 3, 2, 1, 4)  # (B, W, h, H, d)
        q, k = q.permute(0, 2, 3, 1, 4), k.permute(0, 2, 3, 4, 1)
        y = ((q @ k * scale + m.column_mask).softmax(-1) @ v).permute(0, 3, 1, 2, 4)
    else:
        y = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * scale + m.mask).softmax(-1) @ v.transpose(1, 2)
        y = y.transpose(1, 2)
    local = last(depthwise(first(m.value(x)), m.local))
    return m.out(y.flatten(-2).reshape(x.shape) + local)


@composition("super_token_attention", "the authors' products with nine cells, torch's unfold and fold", first=False)
def super_token_attention(m, x):
    image, tile, C = x.dim() == 4, m.cell, x.shape[-1]
    tokens = cells(x, tile)  # (B, cells, t, C)
    grid = (x.shape[1] // tile, x.shape[2] // tile) if image else (1, x.shape[1] // tile)
    kernel, padding = ((3, 3), (1, 1)) if image else ((1, 3), (0, 1))

    def around(s):
        parts = F.unfold(s.transpose(1, 2).unflatten(2, grid), kernel, padding=padding)
        return parts.view(1, C, -1, parts.shape[-1]).permute(0, 3, 1, 2)  # (B, cells, C, 9)

    def back(t):
        return F.fold(t.flatten(2).transpose(1, 2), grid, kernel, padding=padding).flatten(2).transpose(1, 2)

    a = (tokens @ around(tokens.mean(2)) * C**-0.5).softmax(-1)
    s = back(tokens.mT @ a) / (back(a.sum(2, keepdim=True)) + 1e-12)
    q, k, v = (heads(s, p, m.heads) for p in (m.query, m.key, m.value))
    return uncelled(a @ around(m.out(joined(attend(q, k, v)))).mT, tile, x.shape)


@composition("tcnca", "torch's convolutions, layers, products and softmax", first=False, kinds="sequence")
def tcnca(m, x):
    z = first(x)
    for i, window in enumerate(m.windows):
        d = m.dilation**i
        z = F.conv1d(z, window, padding=d * (window.shape[-1] // 2), dilation=d, groups=z.shape[1])
    z = F.silu(last(z) + m.skip * x)
    shared, v, c = F.silu(m.shared(z)), F.silu(m.value(x)), m.chunk
    q, k = shared * m.scales[0] + m.offsets[0], shared * m.scales[1] + m.offsets[1]
    place = torch.arange(c)
    bias = m.distance[place.unsqueeze(1) - place + len(m.distance) // 2]
    q, k, v = (t.unflatten(1, (-1, c)) for t in (q, k, v))
    y = ((q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v).flatten(1, 2)
    candidate = F.silu(m.carry(z) + m.out(F.silu(m.reset(z)) * y))
    return torch.sigmoid(m.update(z)) * (candidate - x)


@composition("transposed_attention", "the authors' convolutions, products and softmax")
def transposed_attention(m, x):
    def split(layer, window):
        return depthwise(pointwise(x, layer), window).flatten(2).unflatten(1, (m.heads, -1))

    q, k, v = (split(getattr(m, n), getattr(m, f"{n}_window")) for n in ("query", "key", "value"))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    y = ((q @ k.mT) * m.temperature.view(-1, 1, 1)).softmax(-1) @ v
    return pointwise(y.flatten(1, 2).unflatten(2, x.shape[2:]), m.out)


def _recurrent(q, k, v, decay):
    """fla's naive form: one token after the other. (B, L, heads, d), decays as logarithms."""
    state, answers = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = state * decay[:, t].exp().unsqueeze(-1) + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        answers.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(answers, dim=1) * q.shape[-1] ** -0.5


@composition("gla", "fla's naive form: the recurrence token by token, in each direction", first=False)
def gla(m, x):
    s = last(depthwise(first(x), m.local)).flatten(1, -2)
    q, k, v = (p(s).unflatten(-1, (m.heads, -1)) for p in (m.query, m.key, m.value))
    low = m.decay_low(s)
    g, r = ((F.logsigmoid(p(low)) / 16).unflatten(-1, (m.heads, -1)) for p in (m.decay, m.reverse_decay))
    back = _recurrent(*(t.flip(1) for t in (q, k, v, r))).flip(1)
    o = F.rms_norm((_recurrent(q, k, v, g) + back) / 2, m.norm.normalized_shape, m.norm.weight, m.norm.eps)
    local = F.rms_norm(s.unflatten(-1, (m.heads, -1)), m.norm.normalized_shape, m.local_norm.weight, m.norm.eps)
    gate = torch.sigmoid(m.gate(s))
    return m.out(gate * o.flatten(-2) + (1 - gate) * local.flatten(-2)).view(x.shape)


@composition("ssm", "transformers' slow form: the scan token by token, all directions at once", first=False)
def ssm(m, x):
    m = m.scan
    u = batch_norm(first(m.input(x)), m.input_norm)
    u = F.silu(depthwise(u, m.conv)).flatten(2).transpose(1, 2)
    scans, L = m.places.shape
    step = m.step(m.step_low(u)) + m.step.bias
    step = F.softplus(step).expand(scans, -1, -1)
    b = m.b(u) + m.direction[m.steps]
    c, a = m.c(u).expand(scans, -1, -1), -m.log_decay.exp()
    z = u[0, m.orders].view(scans, L, -1)
    decay, drive = (step.unsqueeze(-1) * a).exp(), (step * z).unsqueeze(-1) * b.unsqueeze(2)
    state, answers = z.new_zeros(scans, z.shape[-1], a.shape[-1]), []
    for t in range(L):
        state = decay[:, t] * state + drive[:, t]
        answers.append((state @ c[:, t].unsqueeze(-1)).squeeze(-1))
    y = torch.stack(answers, dim=1) + z * m.skip
    y = torch.stack([part[place] for part, place in zip(y, m.places, strict=True)]).sum(0, keepdim=True)
    y = m.out(F.relu(layer_norm(y, m.norm)))
    return batch_norm(y.transpose(1, 2), m.out_norm).transpose(1, 2).view(x.shape)


@composition("halo_attention", "its authors' blocks with borders, products and softmax", first=False)
def halo_attention(m, x):
    h, b, around = m.heads, m.block, m.block + 2 * m.halo
    image, B, C = x.dim() == 4, x.shape[0], x.shape[-1]
    q = cells(m.query(x), b)
    q = q.view(B, -1, q.shape[2], h, C // h).transpose(2, 3)  # (B, blocks, heads, tokens, d)

    def beside(p):
        y = first(p(x)) if image else first(p(x)).unsqueeze(2)
        taps = ((around, around), b, m.halo) if image else ((1, around), (1, b), (0, m.halo))
        parts = F.unfold(y, taps[0], padding=taps[2], stride=taps[1])
        return parts.view(B, h, C // h, -1, parts.shape[-1]).permute(0, 4, 1, 3, 2)

    k, v = beside(m.key), beside(m.value)
    place = torch.arange(around) - torch.arange(b)[:, None]

    def placed(table):
        return table[place + (len(table) - 1) // 2]  # (queries, keys, d)

    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    if image:
        grid = q.unflatten(3, (b, b))
        across = torch.einsum("nwhijd,jkd->nwhijk", grid, placed(m.columns)).unsqueeze(-2)
        down = torch.einsum("nwhijd,ikd->nwhijk", grid, placed(m.rows)).unsqueeze(-1)
        logits = logits + (across + down).flatten(-2).flatten(3, 4)
    else:
        logits = logits + torch.einsum("nwhid,ikd->nwhik", q, placed(m.columns))
    y = (logits.softmax(-1) @ v).transpose(2, 3).flatten(3)
    return uncelled(y, b, x.shape)


@composition("low_res_attention", "torch's convolutions, layers and attention")
def low_res_attention(m, x):
    y = batch_norm(conv(x, m.reduce.weight, None, stride=m.reduce.stride, padding=2, groups=x.shape[1]), m.norm)
    tokens = y.flatten(2).transpose(1, 2)
    q, k, v = (heads(tokens, p, m.heads) for p in (m.query, m.key, m.value))
    y = m.out(joined(attend(q, k, v))).transpose(1, 2).unflatten(2, y.shape[2:])
    grow = F.conv_transpose2d if x.dim() == 4 else F.conv_transpose1d
    return grow(y, m.restore.weight, m.restore.bias, m.restore.stride, m.restore.padding, 0, m.restore.groups)


@composition("single_head_attention", "torch's convolutions of one tap, norms and attention")
def single_head_attention(m, x):
    part, rest = x.split(m.split, dim=1)
    part = F.group_norm(part, 1, m.norm.weight, m.norm.bias, m.norm.eps).flatten(2)
    pairs = ((m.query, m.query_norm), (m.key, m.key_norm), (m.value, m.value_norm))
    q, k, v = (batch_norm(pointwise(part, layer), norm).transpose(1, 2).unsqueeze(1) for layer, norm in pairs)
    y = attend(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
    return batch_norm(pointwise(F.relu(torch.cat([y, rest], dim=1)), m.out), m.out_norm)


@composition("spatial_reduction_attention", "torch's convolution, norm, layers and attention", first=False)
def spatial_reduction_attention(m, x):
    layer, tokens = m.reduce, x.flatten(1, -2)
    weight, stride = (layer.weight, layer.stride) if x.dim() == 4 else (layer.weight.squeeze(2), layer.stride[1])
    coarse = conv(first(x), weight, layer.bias, stride=stride).flatten(2).transpose(1, 2)
    coarse = layer_norm(coarse, m.norm)
    q, k, v = heads(tokens, m.query, m.heads), heads(coarse, m.key, m.heads), heads(coarse, m.value, m.heads)
    return m.out(joined(attend(q, k, v))).view(x.shape)
