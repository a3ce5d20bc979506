"""Compositions of the convolutional mixers, channels first as their authors have them."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F

from . import batch_norm, composition, conv, depthwise, layer_norm, mean, pointwise


@composition("pooling", "torch's average pooling, minus the input")
def pooling(m, x):
    pool = F.avg_pool2d if x.dim() == 4 else F.avg_pool1d
    return pool(x, m.pool_size, 1, m.pool_size // 2, count_include_pad=False) - x


@composition("dwconv", "torch's convolution, a group for each channel")
def dwconv(m, x):
    return depthwise(x, m)


@composition("inception_dwconv", "torch's convolutions of the parts")
def inception_dwconv(m, x):
    parts = x.split(m.split, dim=1)
    return torch.cat(
        [parts[0], *(depthwise(part, layer) for part, layer in zip(parts[1:], m.branches, strict=True))], 1
    )


@composition("central_difference", "the authors' two convolutions, one minus theta times the other")
def central_difference(m, x):
    weight = m.dense
    total = weight.sum(dim=tuple(range(2, weight.dim())), keepdim=True)
    return conv(x, weight, padding=weight.shape[-1] // 2) - m.theta * conv(x, total)


@composition("convnext", "torch's layers in the authors' order, channels last behind the window")
def convnext(m, x):
    y = layer_norm(depthwise(x, m.conv).movedim(1, -1), m.norm)
    return m.down(F.gelu(m.up(y))).movedim(-1, 1)


@composition(
    "cross_d_conv", "the authors' transforms of the whole kernel and its phase, then a convolution", kinds="image"
)
def cross_d_conv(m, x):
    moves = m._moves(x.movedim(1, -1))[0]
    k = m.weight.shape[-1]
    along = torch.fft.fftfreq(k)
    grid = torch.stack(torch.meshgrid(along, along, along, indexing="ij"))
    phase = torch.exp(-2j * math.pi * (moves.view(3, 1, 1, 1) * grid).sum(0))
    kernel = torch.fft.ifftn(torch.fft.fftn(m.weight, dim=(-3, -2, -1)) * phase, dim=(-3, -2, -1)).real
    return F.conv2d(x, kernel[:, :, k // 2], padding=k // 2)


@composition("dcls", "the authors' kernel, summed over all taps in all places, then a convolution")
def dcls(m, x):
    edge, axes = m.kernel_size // 2, x.dim() - 2
    along = torch.arange(-edge, edge + 1.0)
    apart = [along - place.clamp(-edge, edge).unsqueeze(-1) for place in m.place]
    scaled = [(a / (0.27 + w.abs()).unsqueeze(-1)).square() for a, w in zip(apart, m.width, strict=True)]
    grid = scaled[0] if axes == 1 else scaled[0].unsqueeze(-1) + scaled[1].unsqueeze(-2)
    spread = torch.exp(-0.5 * grid)
    spread = spread / (spread.flatten(2).sum(-1) + 1e-7).view(*spread.shape[:2], *(1,) * axes)
    kernel = (spread * m.weight.view(*m.weight.shape, *(1,) * axes)).sum(1, keepdim=True)
    return conv(x, kernel, m.bias, padding=edge, groups=x.shape[1])


@composition("deformable", "torch's grid_sample of each tap, one after the other", kinds="image")
def deformable(m, x):
    height, width = x.shape[2:]
    x = pointwise(x, m.mix)
    (told,) = (pointwise(x, layer) for layer in m.offsets.values())
    offset = told.clamp(0, m.bound)[0, 0]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y = torch.zeros_like(x)
    for i in range(3):
        for j in range(3):
            down = (2 * (rows + (1 + offset) * (i - 1)) + 1) / height - 1
            across = (2 * (columns + (1 + offset) * (j - 1)) + 1) / width - 1
            read = F.grid_sample(x, torch.stack([across, down], -1)[None], align_corners=False)
            y = y + read * m.kernel["depthwise"][:, :, i, j].view(1, -1, 1, 1)
    return y


@composition("dico", "torch's convolutions")
def dico(m, x):
    y = F.gelu(depthwise(pointwise(x, m.up), m.window))
    return pointwise(y * torch.sigmoid(pointwise(mean(y), m.attention.linear)), m.out)


@composition("dynamic_dwconv", "adaptive pooling, layers of one tap, a softmax, torch's convolution")
def dynamic_dwconv(m, x):
    k = m.taps.shape[-1]
    pool = F.adaptive_avg_pool2d if x.dim() == 4 else F.adaptive_avg_pool1d

    def scales(z):
        z = F.gelu(batch_norm(pointwise(z, m.squeeze), m.norm))
        return torch.stack([pointwise(z, scale) for scale in m.scales], 1).softmax(1)

    taps = (scales(pool(x, k)) * m.taps).sum(1)
    bias = (scales(mean(x)).flatten(2) * m.bias).sum(1)
    return conv(x, taps.flatten(0, 1).unsqueeze(1), bias.flatten(), padding=k // 2, groups=x.shape[1])


@composition("fd_conv", "the authors' loops over the bands of the kernel's and of the input's spectrum", kinds="image")
def fd_conv(m, x):
    gates = 2 * torch.sigmoid(conv(x, m.modulation, m.modulation_bias, padding=1))
    size, spectrum, above, y = x.shape[2:], torch.fft.rfft2(x, norm="ortho"), x, 0.0
    for i, low in enumerate(m.low):
        kept = torch.fft.irfft2(spectrum * low, s=size, norm="ortho")
        y, above = y + (above - kept) * gates[:, i : i + 1], kept
    pooled, C = mean(x).flatten(1), m.width
    z = F.relu(batch_norm(m.squeeze(pooled), m.norm)).square() * m.scale + m.bias
    inputs, outputs, taps, weights = (2 * torch.sigmoid(g(z)) for g in (m.inputs, m.outputs, m.taps, m.weights))
    whole = torch.view_as_complex(m.spectrum) * (C // 2)
    weighed = sum(whole * (m.bands == band) * weights[0, band] for band in range(m.count))
    kernel = torch.fft.irfft2(weighed, s=(3 * C, 3 * C)).view(C, 3, C, 3)
    rows = layer_norm(pooled, m.mean_norm).unsqueeze(1)
    local = F.conv1d(rows, m.along.flatten(0, 2).unsqueeze(1), padding=m.along.shape[-1] // 2).view(C, 3, 3, C)
    kernel = kernel.permute(0, 2, 1, 3) * (2 * torch.sigmoid(local)).permute(0, 3, 1, 2)
    kernel = kernel * outputs.view(-1, 1, 1, 1) * inputs.view(1, -1, 1, 1) * taps.view(1, 1, 3, 3)
    return F.conv2d(y + above, kernel, padding=1)


@composition("ffnified_attention", "torch's convolutions, the two windows of each merged before")
def ffnified_attention(m, x):
    (keys,), (values,) = m.keys.values(), m.values.values()
    y = batch_norm(pointwise(x, m.mix), m.norm)
    for window, activate in ((keys, F.gelu), (values, lambda t: t)):
        weight, bias = merged(window)
        y = activate(conv(y, weight, bias, padding=weight.shape[-1] // 2, groups=y.shape[1]))
    return y


_MERGED: dict[int, tuple] = {}


def merged(window):
    """Once for a module, as the authors deploy it."""
    if id(window) not in _MERGED:
        _MERGED[id(window)] = (*(t.clone() for t in window.merged()), window)
    return _MERGED[id(window)][:2]


@composition("large_kernel", "torch's convolution with the authors' deployed kernel, merged before")
def large_kernel(m, x):
    weight, bias = merged(m)
    return conv(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


@composition("focal_modulation", "the authors' loop over levels, torch's convolutions")
def focal_modulation(m, x):
    z, gates, context = pointwise(x, m.context), pointwise(x, m.gates), 0.0
    for i, window in enumerate(m.windows):
        z = F.gelu(depthwise(z, window))
        context = context + z * gates[:, i : i + 1]
    context = context + F.gelu(mean(z)) * pointwise(x, m.global_gate)
    return pointwise(pointwise(x, m.query) * pointwise(context, m.mix), m.out)


@composition("gnconv", "the authors' form: one window over all features, then the products")
def gnconv(m, x):
    features = list(m.features)[::-1]
    projected = torch.cat([pointwise(x, m.first), *(pointwise(x, f) for f in features)], dim=1)
    widths = [f.weight.shape[0] for f in features]
    p, rest = projected.split([widths[0], sum(widths)], dim=1)
    windows = list(m.windows)[::-1]
    weight, bias = torch.cat([w.weight for w in windows]), torch.cat([w.bias for w in windows])
    factors = (conv(rest, weight, bias, padding=windows[0].padding, groups=sum(widths)) / 3).split(widths, dim=1)
    p = p * factors[0]
    for step, factor in zip(reversed(m.steps), factors[1:], strict=True):
        p = pointwise(p, step) * factor
    return pointwise(p, m.out)


@composition("global_dynamic_conv", "torch's convolutions, and one product of patches and tokens")
def global_dynamic_conv(m, x):
    fill = [side for extent in reversed(x.shape[2:]) for side in (0, -extent % m.patch_size)]
    q = conv(F.pad(x, fill), m.patch, m.patch_bias, stride=m.patch_size, groups=x.shape[1]) + m.places
    q = F.gelu(layer_norm(q.flatten(2).transpose(1, 2), m.norm))
    answers = q @ depthwise(x, m.window).flatten(2) + m.bias
    return m.out(answers.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


@composition("hypercomplex_conv", "torch.kron of each part, summed, then a convolution")
def hypercomplex_conv(m, x):
    axes = x.dim() - 2
    weight = sum(torch.kron(a.view(*a.shape, *(1,) * axes), f) for a, f in zip(m.algebra, m.filters, strict=True))
    return conv(x, weight, m.bias, padding=weight.shape[-1] // 2)


@composition("hyperzzw", "its kernel by torch's layers, torch's convolution")
def hyperzzw(m, x):
    places = m.places / (m.extents[0] // 2)
    h = torch.sin(F.linear(places, m.sines[0]) + m.phases[0])
    for sine, phase, step, bias in zip(list(m.sines)[1:], list(m.phases)[1:], m.steps, m.biases, strict=True):
        h = torch.sin(F.linear(places, sine) + phase) * F.linear(h, step, bias)
    kernel = F.linear(h, m.last, m.last_bias).T.unsqueeze(1).unflatten(2, m.extents)
    y = conv(x, kernel, padding=m.extents[0] // 2, groups=x.shape[1]) * mean(x)
    return F.gelu(batch_norm(pointwise(y, m.mix), m.norm))


@composition("local_aggregator", "torch's convolutions")
def local_aggregator(m, x):
    return pointwise(depthwise(pointwise(x, m.value), m.window), m.out)


@composition("ls_conv", "torch's convolutions and unfold, a sum over the taps")
def ls_conv(m, x):
    u = F.relu(batch_norm(pointwise(x, m.narrow), m.narrow_norm))
    u = batch_norm(depthwise(u, m.window), m.window_norm)
    u = F.relu(batch_norm(pointwise(u, m.mix), m.mix_norm))
    norm = m.kernels_norm
    weight = F.group_norm(pointwise(u, m.kernels), norm.num_groups, norm.weight, norm.bias, norm.eps)
    weight = weight.flatten(2).unflatten(1, (m.groups, -1)).unsqueeze(1)  # (B, 1, groups, taps, N)
    B, C = x.shape[:2]
    taps = (3, 3) if x.dim() == 4 else (1, 3)
    windows = F.unfold(x if x.dim() == 4 else x.unsqueeze(2), taps, padding=tuple(t // 2 for t in taps))
    windows = windows.view(B, C // m.groups, m.groups, -1, weight.shape[-1])
    y = (windows * weight).sum(3).reshape(x.shape)
    return x + batch_norm(y, m.norm)


@composition("multi_order", "torch's convolutions")
def multi_order(m, x):
    v = pointwise(x, m.narrow)
    u = v + m.gamma.view(1, -1, *(1,) * (x.dim() - 2)) * (v - mean(v))
    near, first, second = m.windows.values()

    def window(t, w):
        return conv(t, w.weight, padding=w.dilation, dilation=w.dilation, groups=t.shape[1])

    def gated(t, gate):
        return t * torch.sigmoid(pointwise(F.relu(pointwise(mean(t), gate.squeeze)), gate.excite))

    a = gated(F.gelu(batch_norm(window(u, near), m.near_norm)), m.near_gate)
    b = gated(F.gelu(batch_norm(window(window(u, first), second), m.far_norm)), m.far_gate)
    return pointwise(torch.cat([a, b], dim=1), m.out)


@composition("parameter_free", "torch's convolutions of one tap and max pooling")
def parameter_free(m, x):
    pool = F.max_pool2d if x.dim() == 4 else F.max_pool1d
    return pointwise(F.gelu(pool(F.gelu(pointwise(x, m.up)), m.pool_size, 1, m.pool_size // 2)), m.out)


@composition("pconv", "torch's convolution of the first channels, and the others beside it")
def pconv(m, x):
    layer = m.window.conv
    part, rest = x.split(m.split, dim=1)
    weight = layer.weight if x.dim() == 4 else layer.weight.squeeze(2)
    return torch.cat([conv(part, weight, layer.bias, padding=weight.shape[-1] // 2), rest], dim=1)


@composition("pseudo_3d", "torch's convolutions", kinds="image")
def pseudo_3d(m, x):
    return depthwise(depthwise(x, m.across), m.down)


@composition("scnn", "the authors' loop of torch's convolutions over rows and columns", kinds="image")
def scnn(m, x):
    for dim, names in ((2, ("down", "up")), (3, ("right", "left"))):
        for name in names:
            layer, order = m.passes[name], range(x.shape[dim])
            weight = layer.weight if dim == 2 else layer.weight.transpose(2, 3)
            parts = list(x.split(1, dim=dim))
            order = order if name == names[0] else order[::-1]
            for before, now in itertools.pairwise(order):
                padding = (0, weight.shape[3] // 2) if dim == 2 else (weight.shape[2] // 2, 0)
                parts[now] = parts[now] + F.relu(F.conv2d(parts[before], weight, padding=padding))
            x = torch.cat(parts, dim=dim)
    return x


@composition("short_conv_gate", "torch's convolutions")
def short_conv_gate(m, x):
    y = depthwise(pointwise(x, m.before) * pointwise(x, m.value), m.conv)
    return pointwise(pointwise(x, m.after) * y, m.out)


@composition("tunable_conv", "the two kernels mixed, torch's convolution")
def tunable_conv(m, x):
    a, b = m.shares
    weight = a * m.kernels[0] + b * m.kernels[1]
    return conv(x, weight, a * m.biases[0] + b * m.biases[1], padding=weight.shape[-1] // 2)


@composition("tv_conv", "torch's unfold, and a sum over the taps that were made before")
def tv_conv(m, x):
    taps = m._taps()  # (taps, *size, C), kept
    k = (m.kernel_size,) * 2 if x.dim() == 4 else (1, m.kernel_size)
    windows = F.unfold(x if x.dim() == 4 else x.unsqueeze(2), k, padding=tuple(n // 2 for n in k))
    kernel = taps.flatten(1, -2).permute(2, 0, 1)
    return (windows.view(x.shape[0], *kernel.shape) * kernel).sum(2).view(x.shape)


@composition(
    "wavelet", "the Haar transform as torch's convolution of stride 2, and torch's convolutions", kinds="image"
)
def wavelet(m, x):
    (layer,) = m.levels
    u = pointwise(x, m.squeeze)
    C = u.shape[1]
    haar = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 2.0
    bands = F.conv2d(u, haar.unsqueeze(1).repeat(C, 1, 1, 1), stride=2, groups=C).unflatten(1, (C, 4))
    y = pointwise(bands[:, :, 0], layer.smooth) + pointwise(bands[:, :, 1:].flatten(1, 2), layer.detail)
    y = pointwise(F.gelu(y), layer.mix)
    return batch_norm(F.conv_transpose2d(y, layer.grow, layer.bias, stride=2, padding=1), layer.norm)


@composition("weighted_conv", "torch's convolution of the weighed taps")
def weighted_conv(m, x):
    return conv(x, m.weight * m.density, padding=1)


@composition("frequency_filter", "the authors' products of real and imaginary parts, torch's transforms", first=False)
def frequency_filter(m, x):
    dims = tuple(range(1, x.dim() - 1))
    spectrum = torch.fft.rfftn(x, dim=dims, norm="ortho")
    blocks = spectrum.unflatten(-1, (m.first.shape[1], -1))

    def product(t, w, b, activate):
        real = torch.einsum("...bi,bio->...bo", t.real, w[0]) - torch.einsum("...bi,bio->...bo", t.imag, w[1]) + b[0]
        imag = torch.einsum("...bi,bio->...bo", t.imag, w[0]) + torch.einsum("...bi,bio->...bo", t.real, w[1]) + b[1]
        return torch.complex(activate(real), activate(imag))

    hidden = product(blocks, m.first, m.first_bias, F.silu)
    mask = product(hidden, m.second, m.second_bias, lambda t: F.softshrink(t, m.threshold))
    y = torch.fft.irfftn(spectrum * mask.flatten(-2), s=x.shape[1:-1], dim=dims, norm="ortho")
    return y + x


def _filtered(u, forward, backward):
    """(B, C, L) by a causal kernel and one of what comes after, as the authors do."""
    length = u.shape[-1]
    kernel = F.pad(forward, (0, length)) + F.pad(backward.flip(-1), (length, 0))
    return torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length), n=2 * length)[
        ..., :length
    ]


@composition("long_conv", "torch's transforms, layers of one tap", kinds="sequence")
def long_conv(m, x):
    taps = F.softshrink(m.taps[0], m.threshold)
    y = F.gelu(_filtered(x, taps[0], taps[1]) + m.skip[0].unsqueeze(-1) * x)
    return pointwise(y, m.value[0]) * torch.sigmoid(pointwise(y, m.gate[0]))


@composition("sgconv", "the authors' scales by torch's interpolate, torch's transforms", kinds="sequence")
def sgconv(m, x):
    count = len(m.scales)
    parts = [
        F.interpolate(scale, scale_factor=2 ** max(0, i - 1), mode="linear") * m.decay ** (count - 1 - i)
        for i, scale in enumerate(m.scales)
    ]
    kernel = torch.cat(parts, dim=-1)[..., : x.shape[-1]] / m.length
    y = F.gelu(_filtered(x, kernel[0], kernel[1]) + m.skip.unsqueeze(-1) * x)
    return pointwise(y, m.out)
