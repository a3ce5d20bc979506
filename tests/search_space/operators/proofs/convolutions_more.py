"""Convolutional mixers whose kernels differ from image to image, from place to place, or pass along an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixnas.search_space.operators.mixers.fd_conv import bands_of
from mixnas.search_space.operators.mixers.gnconv import GlobalLocalFilter
from mixnas.search_space.registry import Context

from . import channels_first, channels_last, count, loaded, make, params, proof
from .catalogue import drawn, filled, fingerprints, load


def _image() -> torch.Tensor:
    return channels_last(drawn(2, 16, 8, 8))


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _batch_norm(prefix: str, weights: dict[str, torch.Tensor], theirs: str) -> dict[str, torch.Tensor]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{name}": weights[f"{theirs}.{name}"] for name in names}


@proof("mixer", "dynamic_dwconv", "authors' IDConv, fixture of the catalogue")
def dynamic_dwconv(dtype):
    config, x, y, weights = load("idconv")
    width, kernels = config["C"], config["G"]
    state = {"taps": weights["weight"], "bias": weights["bias"], "squeeze.weight": weights["proj.0.conv.weight"]}
    state["squeeze.weight"] = state["squeeze.weight"].flatten(1)
    state |= _batch_norm("norm", weights, "proj.0.bn")
    for g in range(kernels):
        rows = slice(g * width, (g + 1) * width)
        state[f"scales.{g}.weight"] = weights["proj.1.weight"][rows].flatten(1)
        state[f"scales.{g}.bias"] = weights["proj.1.bias"][rows]
    mixer = make("mixer", "dynamic_dwconv", width, x.shape[2:], kernel_size=config["k"], kernels=kernels)
    return channels_first(loaded(mixer, state, dtype)(channels_last(x).to(dtype))), y


@proof("mixer", "dynamic_dwconv", "torch's convolution, an own kernel for each sequence")
def dynamic_dwconv_sequence(dtype):
    mixer = make("mixer", "dynamic_dwconv", 8, (11,), kernel_size=5).to(dtype)
    torch.nn.init.normal_(mixer.taps, generator=torch.Generator().manual_seed(1))
    x = _random(3, 8, 11, dtype=dtype)
    parts = torch.cat([F.adaptive_avg_pool1d(x, 5), x.mean(dim=2, keepdim=True)], dim=2).transpose(1, 2)
    z = F.gelu(mixer.squeeze(parts) / (1 + mixer.norm.eps) ** 0.5)
    scales = torch.stack([scale(z) for scale in mixer.scales]).softmax(dim=0)  # (kernels, B, taps + 1, C)
    taps = torch.einsum("gbtc,gct->bct", scales[:, :, :-1], mixer.taps)
    bias = torch.einsum("gbc,gc->bc", scales[:, :, -1], mixer.bias)
    each = [F.conv1d(x[i : i + 1], taps[i].unsqueeze(1), bias[i], padding=2, groups=8) for i in range(3)]
    return mixer(channels_last(x)), channels_last(torch.cat(each))


@proof("mixer", "large_kernel", "its own branches on a sequence, each with its norm in evaluation")
def large_kernel_sequence(dtype):
    mixer, x = make("mixer", "large_kernel", 8, (19,)).to(dtype), _random(2, 19, 8, dtype=dtype)
    return mixer(x), mixer.large(x) + sum(branch(x) for branch in mixer.branches.values())


@proof("mixer", "ffnified_attention", "authors' Token_Mixer(16, 7, 7), fingerprint of catalogue b, merged here")
def ffnified_attention(dtype):
    state = {"mix.weight": filled(16, 16)}
    norms = ["norm"]
    for part in ("keys.size7", "values.size7"):
        for branch, extent in (("large", 7), ("branches.3x1", 3)):
            state[f"{part}.{branch}.conv.weight"] = filled(16, 1, extent, extent)
            norms.append(f"{part}.{branch}.norm")
    for norm in norms:
        state |= {f"{norm}.weight": filled(16), f"{norm}.bias": filled(16, bias=True)}
    mixer = loaded(make("mixer", "ffnified_attention", 16, (8, 8)), state, dtype)
    expected = [-251.86430281, 49.94266799, -0.20602824, -0.41096736, -0.14231687]
    return fingerprints(channels_first(mixer(_image().to(dtype))), expected)


@proof("mixer", "ffnified_attention", "its own branches on a sequence, each with its norm in evaluation")
def ffnified_attention_sequence(dtype):
    mixer, x = make("mixer", "ffnified_attention", 8, (13,)).to(dtype), _random(2, 13, 8, dtype=dtype)
    y = mixer.norm(mixer.mix(x))
    for window, activation in ((mixer.keys["size7"], F.gelu), (mixer.values["size7"], lambda z: z)):
        y = activation(window.large(y) + window.branches["3x1"](y))
    return mixer(x), y


@count("mixer", "ffnified_attention", "FFNet-1", 13_775_656)
def ffnet():
    widths, total = (80, 160, 320, 640), 9 * 3 * 64 + 2 * 64 + 9 * 64 * 80 + 2 * 80
    for i, (width, depth) in enumerate(zip(widths, (2, 2, 8, 2), strict=True)):
        if i:  # a window of 7 beside one of 3, and a layer behind a norm
            total += (49 + 2 + 9 + 2) * width + 2 * width + width * width
        size = 3 if i < 2 else 7
        token = params("mixer", "ffnified_attention", width, key_size=size, value_size=size)
        channel = (9 + 2) * width + params("channel_mixer", "mlp", width, expansion=3.0)
        total += depth * (token + channel)
    return total + 2 * 640 + 640 * 1000 + 1000


@proof("mixer", "scnn", "formula of catalogue b, 34, by a loop of torch's convolutions")
def scnn(dtype):
    mixer = make("mixer", "scnn", 6, (5, 7), kernel_size=3).to(dtype)
    for conv in mixer.passes.values():
        torch.nn.init.normal_(conv.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    x = _random(2, 6, 5, 7, dtype=dtype)
    y = x.clone()
    for name, dim, order in (
        ("down", 2, range(1, 5)),
        ("up", 2, range(3, -1, -1)),
        ("right", 3, range(1, 7)),
        ("left", 3, range(5, -1, -1)),
    ):
        step = -1 if name in ("down", "right") else 1
        for i in order:
            before = F.conv1d(y.select(dim, i + step), mixer.passes[name].weight[:, :, 0], padding=1).relu()
            y.select(dim, i).add_(before)
    return mixer(channels_last(x)), channels_last(y)


@count("mixer", "scnn", "SCNN (128), 9 taps, four directions", 589_824)
def scnn_128():
    return params("mixer", "scnn", 128)


@proof("mixer", "tv_conv", "authors' TVConv(16, 8 x 8), fingerprint of catalogue b")
def tv_conv(dtype):
    state = {"places": filled(1, 4, 8, 8)[0], "last": filled(16 * 9, 16, 3, 3).view(16, 3, 3, 16, 3, 3)}
    for i, before in enumerate((4, 16)):
        state[f"convs.{i}"] = filled(16, before, 3, 3)
        state |= {f"norms.{i}.{name}": filled(16, 8, 8) for name in ("weight", "bias")}
    mixer = loaded(make("mixer", "tv_conv", 16, (8, 8)), state, dtype)
    expected = [34.82752625, 14.05557435, -0.01610795, -0.17826739, 0.27827526]
    return fingerprints(channels_first(mixer(_image().to(dtype))), expected)


@proof("mixer", "tv_conv", "its own window at one place, by torch's convolution with the taps of that place")
def tv_conv_sequence(dtype):
    mixer = make("mixer", "tv_conv", 6, (11,), kernel_size=5).to(dtype)
    x = _random(2, 11, 6, dtype=dtype)
    taps = mixer._taps()[:, 4]  # (5, C)
    return mixer(x)[:, 4], F.conv1d(x.transpose(1, 2), taps.T.unsqueeze(1), padding=2, groups=6)[..., 4]


@count("mixer", "tv_conv", "TVConv (96, 12 x 12), 64 hidden, 3 layers", 684_864)
def tv_conv_96():
    return params("mixer", "tv_conv", 96, (12, 12), hidden=64, layers=3)


@count("mixer", "tv_conv", "TVConv (32, 12 x 12)", 54_144)
def tv_conv_32():
    return params("mixer", "tv_conv", 32, (12, 12))


@proof("mixer", "cross_d_conv", "authors' CrossDConv, fixture of the catalogue, in float32", double=1e-5)
def cross_d_conv(dtype):
    """Their outputs are more than their inputs: the operator has the wider, and zeros for the rest."""
    config, x, y, weights = load("crossd")
    wide, more = config["O"], config["O"] - config["I"]
    state = {"weight": F.pad(weights["weights_3d"], (0, 0) * 3 + (0, more))}
    state["read.weight"] = F.pad(weights["rotation_params.0.weight"].flatten(1), (0, more))
    state["squeeze.weight"] = weights["rotation_params.3.weight"].flatten(1)
    for own, theirs in (("read", "0"), ("squeeze", "3")):
        state[f"{own}.bias"] = weights[f"rotation_params.{theirs}.bias"]
    state |= _batch_norm("norm", weights, "rotation_params.1")
    mixer = loaded(make("mixer", "cross_d_conv", wide, x.shape[2:], kernel_size=config["k"]), state, dtype)
    return channels_first(mixer(F.pad(channels_last(x), (0, more)).to(dtype))), y


@proof("mixer", "cross_d_conv", "its formula by torch.fft, 5 taps")
def cross_d_conv_by_transform(dtype):
    mixer = make("mixer", "cross_d_conv", 5, (6, 7), kernel_size=5).to(dtype)
    x = _random(3, 6, 7, 5, dtype=dtype)
    moves = mixer._moves(x)
    frequencies = torch.fft.fftfreq(5, dtype=dtype)
    grid = torch.stack(torch.meshgrid(frequencies, frequencies, frequencies, indexing="ij"))
    phase = torch.exp(-2j * torch.pi * torch.einsum("bj,jxyz->bxyz", moves, grid))
    spectrum = torch.fft.fftn(mixer.weight, dim=(2, 3, 4)) * phase[:, None, None]
    kernels = torch.fft.ifftn(spectrum, dim=(3, 4, 5)).real[:, :, :, 2]
    each = [F.conv2d(one[None], kernel, padding=2) for one, kernel in zip(channels_first(x), kernels, strict=True)]
    return mixer(x), channels_last(torch.cat(each))


@count("mixer", "cross_d_conv", "ResNet-18 with it in place of every convolution", 33_780_712)
def cross_d_resnet():
    def layer(inputs: int, outputs: int, extent: int) -> int:
        own = params("mixer", "cross_d_conv", inputs) - 27 * inputs**2  # what finds axis and angle
        return own + extent**3 * inputs * outputs + 2 * outputs

    total = layer(3, 64, 7)
    for before, after in ((64, 64), (64, 128), (128, 256), (256, 512)):
        total += layer(before, after, 3) + 3 * layer(after, after, 3)
        total += layer(before, after, 1) if before != after else 0
    return total + 512 * 1000 + 1000


@proof("mixer", "global_dynamic_conv", "authors' SABlock(14, 16), fingerprint of catalogue b")
def global_dynamic_conv(dtype):
    """The authors' block adds its input."""
    bias = filled(16, bias=True)
    state = {"patch": filled(16, 1, 7, 7), "patch_bias": bias, "places": filled(16, 2, 2)}
    state |= {"norm.weight": filled(16), "norm.bias": bias, "bias": filled(1, bias=True)}
    state |= {"window.weight": filled(16, 1, 7, 7), "window.bias": bias}
    state |= {"out.weight": filled(16, 4), "out.bias": bias}
    mixer = loaded(make("mixer", "global_dynamic_conv", 16, (14, 14)), state, dtype)
    x = channels_last(drawn(2, 16, 14, 14)).to(dtype)
    expected = [-55.17518686, 173.52957510, -1.35678376, 0.31462837, 0.08076789]
    return fingerprints(channels_first(x + mixer(x)), expected)


BELOW = {0: {(17, 21), (21, 17), (69, 1), (75, 17)}, 1: {(59, 10), (86, 37), (91, 38)}}
"""Of the cells of one radius that two bands share, those that the authors' sort put into the lower one where the
fingerprint was taken. It is the only one of 3,920 choices with which all five numbers are those of the fingerprint; the
next one is 350 times as far from them."""


def _authors_bands() -> torch.Tensor:
    """Of 96 x 96 numbers, in 4 bands."""
    found, down = bands_of(96, 96, 4), torch.arange(96)
    radius = torch.minimum(down, 96 - down).square().unsqueeze(1) + torch.arange(49).square()
    for band, cells in BELOW.items():
        found[radius == radius[next(iter(cells))]] = band + 1
        for cell in cells:
            found[cell] = band
    return found


@proof("mixer", "fd_conv", "authors' FDConv(32, 32, 3), fingerprint of catalogue b, cells of equal radius in its order")
def fd_conv(dtype):
    state = {"spectrum": filled(1, 96, 49, 2)[0], "squeeze.weight": filled(16, 32)}
    state |= {"norm.weight": filled(16), "norm.bias": filled(16, bias=True)}
    state |= {"scale": filled(1), "bias": filled(1, bias=True)}
    for own, outputs in (("inputs", 32), ("outputs", 32), ("taps", 9), ("weights", 4)):
        state |= {f"{own}.weight": filled(outputs, 16), f"{own}.bias": filled(outputs, bias=True)}
    state |= {"mean_norm.weight": filled(32), "mean_norm.bias": filled(32, bias=True)}
    state["along"] = filled(32 * 9, 1, 3).view(32, 3, 3, 3)
    state["modulation"] = filled(1, 32, 3, 3).expand(3, -1, -1, -1)
    state["modulation_bias"] = filled(1, bias=True).expand(3)
    mixer = loaded(make("mixer", "fd_conv", 32, (8, 8)), state, dtype)
    mixer.bands = _authors_bands()
    x = channels_last(drawn(2, 32, 8, 8)).to(dtype)
    expected = [-1.02121789, 2.44597244, -0.05045309, -0.03746421, 0.04707337]
    return fingerprints(channels_first(mixer(x)), expected)


@proof("mixer", "fd_conv", "torch.nn.Conv2d, where all gates are neutral")
def fd_conv_neutral(dtype):
    mixer = make("mixer", "fd_conv", 6, (5, 7)).to(dtype)
    for gate in (mixer.inputs, mixer.outputs, mixer.taps, mixer.weights):
        gate.weight.zero_()
    for gate in (mixer.along, mixer.modulation):
        gate.zero_()
    x = _random(2, 6, 5, 7, dtype=dtype)
    spectrum = torch.view_as_complex(mixer.spectrum) * 3
    kernel = torch.fft.irfft2(spectrum, s=(18, 18)).view(6, 3, 6, 3).transpose(1, 2)
    return mixer(channels_last(x)), channels_last(F.conv2d(x, kernel, padding=1))


@proof("mixer", "fd_conv", "bands by sorted radii, whose sums know no order of equal ones")
def fd_conv_bands(dtype):
    places = torch.meshgrid(torch.fft.fftfreq(24, dtype=dtype), torch.fft.rfftfreq(24, dtype=dtype), indexing="ij")
    radius = torch.stack(places).norm(dim=0).view(-1)
    sums = torch.zeros(4, dtype=dtype).index_add(0, bands_of(24, 24, 4).view(-1), radius)
    return sums, radius.sort().values.view(4, -1).sum(dim=1)


@count("mixer", "fd_conv", "FDConv(64, 64, 3), 64 bands", 46_462)
def fd_conv_64():
    return params("mixer", "fd_conv", 64, bands=64)


def _sampled(x: torch.Tensor, down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """x (H, W) between its points, zeros outside, at places (...), each by itself."""
    found = torch.zeros_like(down)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            found += x[i, j] * (1 - (down - i).abs()).clamp(min=0) * (1 - (across - j).abs()).clamp(min=0)
    return found


@proof("mixer", "deformable", "its definition, point by point, in all forms")
def deformable(dtype):
    generator = torch.Generator().manual_seed(1)
    x, found, expected = _random(1, 4, 5, 3, dtype=dtype), [], []
    for form in ("original", "bound", "square"):
        for taps in ("dense", "depthwise"):
            mixer = make("mixer", "deformable", 3, (4, 5), form=form, taps=taps, bound=2).to(dtype)
            for parameter in mixer.offsets.parameters():
                parameter.normal_(std=0.8, generator=generator)
            found.append(mixer(x))
            z = x if mixer.mix is None else mixer.mix(x)
            (told,) = (layer(z)[0] for layer in mixer.offsets.values())  # (H, W, 1 or 18)
            told = told if form == "original" else told.clamp(0 if form == "square" else -2, 2)
            y = torch.zeros(3, 4, 5, dtype=dtype)
            (kernel,) = mixer.kernel.values()
            for j in range(9):
                step = (j // 3 - 1, j % 3 - 1)
                pair = told[..., :1] * torch.tensor(step) if form == "square" else told[..., 2 * j : 2 * j + 2]
                moved = pair.unbind(-1)
                down = torch.arange(4).view(-1, 1) + step[0] + moved[0]
                across = torch.arange(5) + step[1] + moved[1]
                read = torch.stack([_sampled(z[0, :, :, c], down, across) for c in range(3)])
                tap = kernel[:, :, j // 3, j % 3]
                y += torch.einsum("oc,chw->ohw", tap, read) if taps == "dense" else tap.view(3, 1, 1) * read
            expected.append(y.permute(1, 2, 0).unsqueeze(0))
    return torch.stack(found), torch.stack(expected)


@proof("mixer", "deformable", "torch's convolution of dilation 1 + s, where every token tells the same s; also rounded")
def deformable_square(dtype):
    found, expected = [], []
    x = _random(2, 4, 9, 8, dtype=dtype)
    for told, whole in ((0.0, False), (1.0, False), (2.0, False), (1.7, True)):
        mixer = make("mixer", "deformable", 4, (9, 8), taps="dense", whole=whole).to(dtype)
        mixer.offsets["square_dense"].conv.bias.fill_(told)
        reach = 1 + round(told)
        found.append(mixer(channels_last(x)))
        expected.append(channels_last(F.conv2d(x, mixer.kernel["dense"], padding=reach, dilation=reach)))
    return torch.stack(found), torch.stack(expected)


@proof("mixer", "msa_conv", "formula of catalogue b, 49, by torch's unfold")
def msa_conv(dtype):
    found, expected = [], []
    x = _random(2, 6, 5, 7, dtype=dtype)
    for dilation in (1, 2):
        mixer = make("mixer", "msa_conv", 6, (5, 7), dilation=dilation).to(dtype)
        q, k, v = (channels_first(p(channels_last(x))) for p in (mixer.query, mixer.key, mixer.value))
        options = {"kernel_size": 3, "padding": dilation, "dilation": dilation}
        k, v = (F.unfold(part, **options).view(2, 6, 9, 5, 7) for part in (k, v))
        weights = ((q.unsqueeze(2) * k).sum(dim=1) / 6**0.5).softmax(dim=1)
        y = (weights.unsqueeze(1) * v).sum(dim=2) + x
        found.append(mixer(channels_last(x)))
        expected.append(channels_last(F.conv2d(y, mixer.conv.conv.weight, padding=1).relu()))
    return torch.stack(found), torch.stack(expected)


@proof("mixer", "tunable_conv", "formula of catalogue c, C2: shares of two of torch's convolutions")
def tunable_conv(dtype):
    mixer = make("mixer", "tunable_conv", 6, (5, 7), control=0.25).to(dtype)
    for i, bias in enumerate(mixer.biases):
        bias.fill_(i + 1)
    x = _random(2, 6, 5, 7, dtype=dtype)
    first, second = (F.conv2d(x, k, b, padding=1) for k, b in zip(mixer.kernels, mixer.biases, strict=True))
    return mixer(channels_last(x)), channels_last(0.75 * first + 0.25 * second)


def _chunked(q, k, v, bias, chunk, causal):
    """Attention inside chunks, token by token."""
    found = []
    for i in range(v.shape[1]):
        begin = i // chunk * chunk
        end = i + 1 if causal else min(begin + chunk, v.shape[1])
        places = torch.arange(begin, end)
        logits = (q[:, i : i + 1] * k[:, begin:end]).sum(-1) / q.shape[-1] ** 0.5 + bias[i - places + chunk - 1]
        found.append((logits.softmax(-1).unsqueeze(-1) * v[:, begin:end]).sum(1))
    return torch.stack(found, dim=1)


@proof("mixer", "tcnca", "formula of catalogue c, C22 (a reading: no code is public) and MEGA's gates, token by token")
def tcnca(dtype):
    found, expected = [], []
    for kind in ("sequence", "causal"):
        mixer = make("mixer", "tcnca", 8, (11,), kind, chunk=4, kernel_size=3, depth=2).to(dtype)
        mixer.distance.normal_(generator=torch.Generator().manual_seed(1))
        mixer.scales.normal_(generator=torch.Generator().manual_seed(2))
        x = _random(2, 11, 8, dtype=dtype)
        z = x.transpose(1, 2)
        for i, taps in enumerate(mixer.windows):
            reach = 2 * 2**i
            padding = (reach, 0) if kind == "causal" else (reach // 2, reach // 2)
            z = F.conv1d(F.pad(z, padding), taps, dilation=2**i, groups=8)
        z = F.silu(z.transpose(1, 2) + mixer.skip * x)
        shared = F.silu(mixer.shared(z))
        q, k = (shared * mixer.scales[i] + mixer.offsets[i] for i in range(2))
        read = _chunked(q, k, F.silu(mixer.value(x)), mixer.distance, 4, kind == "causal")
        candidate = F.silu(mixer.carry(z) + mixer.out(F.silu(mixer.reset(z)) * read))
        update = mixer.update(z).sigmoid()
        found.append(x + mixer(x))
        expected.append(update * candidate + (1 - update) * x)
    return torch.stack(found), torch.stack(expected)


@proof("mixer", "gnconv", "authors' GlobalLocalFilter, fixture of the catalogue, in float32", double=1e-5)
def global_local_filter(dtype):
    config, x, y, weights = load("gf_filter")
    state = {f"{norm}.{n}": weights[f"{norm}.{n}"] for norm in ("pre_norm", "post_norm") for n in ("weight", "bias")}
    state |= {"window.weight": weights["dw.weight"], "spectrum": weights["complex_weight"]}
    part = loaded(GlobalLocalFilter(Context(config["C"], tuple(x.shape[2:]), "image")), state, dtype)
    return channels_first(part(channels_last(x).to(dtype))), y


@proof("mixer", "gnconv", "authors' GlobalLocalFilter(16, 8, 5), fingerprint of catalogue b, in float32", double=1e-6)
def global_local_filter_fingerprint(dtype):
    state = {f"{norm}.weight": filled(16) for norm in ("pre_norm", "post_norm")}
    state |= {f"{norm}.bias": filled(16, bias=True) for norm in ("pre_norm", "post_norm")}
    state |= {"window.weight": filled(8, 1, 3, 3), "spectrum": filled(8, 8, 5, 2)}
    part = loaded(GlobalLocalFilter(Context(16, (8, 8), "image")), state, dtype)
    expected = [-71.49026892, 42.63978510, -1.85943107, 0.63354511, -0.31453493]
    return fingerprints(channels_first(part(_image().to(dtype))), expected)


@count("mixer", "gnconv", "HorNet-T GF", 22_991_848)
def hornet_global():
    total = 16 * 3 * 64 + 64 + 2 * 64
    widths = (64, 128, 256, 512)
    for i, (depth, width, size) in enumerate(zip((2, 3, 18, 2), widths, (56, 28, 14, 7), strict=True)):
        if i:
            total += 2 * widths[i - 1] + 4 * widths[i - 1] * width + width
        mlp = params("channel_mixer", "mlp", width)
        mixer = params("mixer", "gnconv", width, (size, size), order=i + 2, filter="global" if i > 1 else "window")
        total += depth * (mixer + mlp + 4 * width + 2 * width)
    return total + 2 * 512 + 512 * 1000 + 1000


@proof("mixer", "hyperzzw", "formula of catalogue b, 29, local: an own kernel for each image, by torch's convolution")
def hyperzzw(dtype):
    mixer = make("mixer", "hyperzzw", 6, (5, 7), kernel_size=5).to(dtype)
    x = _random(3, 6, 5, 7, dtype=dtype)
    down, across = (torch.linspace(-1, 1, 5, dtype=dtype).view(shape).expand(5, 5) for shape in ((5, 1), (1, 5)))
    places = torch.stack([down, across], dim=-1)
    sines = [(places @ w.T + b).sin() for w, b in zip(mixer.sines, mixer.phases, strict=True)]
    h = sines[0]
    for sine, step, bias in zip(sines[1:], mixer.steps, mixer.biases, strict=True):
        h = sine * (h @ step.T + bias)
    kernel = (h @ mixer.last.T + mixer.last_bias).permute(2, 0, 1).unsqueeze(1)
    own = [one.mean((1, 2)).view(6, 1, 1, 1) * kernel for one in x]
    y = torch.cat([F.conv2d(one[None], k, padding=2, groups=6) for one, k in zip(x, own, strict=True)])
    y = F.conv2d(y, mixer.mix.weight[..., None, None])
    return mixer(channels_last(x)), channels_last(F.gelu(y / (1 + mixer.norm.eps) ** 0.5))


@proof("mixer", "hyperzzw", "torch's convolution on a sequence, with its own kernel")
def hyperzzw_sequence(dtype):
    mixer, x = make("mixer", "hyperzzw", 6, (11,)).to(dtype), _random(3, 6, 11, dtype=dtype)
    y = channels_last(F.conv1d(x, mixer._kernel().to(dtype), padding=3, groups=6)) * x.mean(dim=2).unsqueeze(1)
    return mixer(channels_last(x)), F.gelu(mixer.norm(mixer.mix(y)))
