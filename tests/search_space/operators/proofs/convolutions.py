"""Convolutional mixers."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from . import channels_first, channels_last, count, loaded, make, params, proof
from .catalogue import drawn, filled, fingerprints, load


def _image() -> torch.Tensor:
    return channels_last(drawn(2, 16, 8, 8))


@proof("mixer", "pconv", "authors' PAT_ch, fixture of the catalogue")
def pconv(dtype):
    config, x, y, weights = load("pat_ch")
    both = weights["attn.cfc1.weight"]
    state = {"window.conv.weight": weights["partial_conv3.weight"]}
    state |= {"mean.weight": both[:, :, 0, 0], "std.weight": both[:, :, 0, 1]}
    for own, theirs in (("weight_norm", "attn.bn"), ("norm", "norm")):
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{own}.{name}"] = weights[f"{theirs}.{name}"]
    mixer = make("mixer", "pconv", config["C"], x.shape[2:], divisor=config["n_div"], attention="channel")
    return channels_first(loaded(mixer, state, dtype)(channels_last(x).to(dtype))), y


@proof("mixer", "gnconv", "authors' gnconv, fingerprint of catalogue b")
def gnconv(dtype):
    """The class's own scale is 1; in the models, and here, it is 1/3."""
    widths = (4, 8, 16)
    first, *features = filled(32, 16).split((4, *widths))
    first_bias, *biases = filled(32, bias=True).split((4, *widths))
    windows, window_biases = filled(28, 1, 7, 7).split(widths), filled(28, bias=True).split(widths)
    state = {"first.weight": first, "first.bias": first_bias}
    for i in range(3):
        j = 2 - i  # the widest comes first here
        state |= {f"features.{j}.weight": features[i], f"features.{j}.bias": biases[i]}
        state |= {f"windows.{j}.weight": windows[i], f"windows.{j}.bias": window_biases[i]}
    for i in range(2):
        state[f"steps.{1 - i}.weight"] = filled(widths[i + 1], widths[i])
        state[f"steps.{1 - i}.bias"] = filled(widths[i + 1], bias=True)
    state |= {"out.weight": filled(16, 16), "out.bias": filled(16, bias=True)}
    mixer = loaded(make("mixer", "gnconv", 16, (8, 8), order=3), state, dtype)
    expected = [-51.53316766, 2.96746928, -0.06896664, -0.05270768, -0.09476907]
    return fingerprints(channels_first(mixer(_image().to(dtype))), expected)


@proof("mixer", "focal_modulation", "authors' FocalModulation, fixture of the catalogue")
def focal_modulation(dtype):
    config, x, y, weights = load("focal")
    width, levels = config["C"], config["L"]
    query, context, gates, last = weights["f.weight"].split((width, width, levels, 1))
    query_bias, context_bias, gates_bias, last_bias = weights["f.bias"].split((width, width, levels, 1))
    state = {
        "query.weight": query,
        "query.bias": query_bias,
        "context.weight": context,
        "context.bias": context_bias,
        "gates.weight": gates,
        "gates.bias": gates_bias,
        "global_gate.weight": last,
        "global_gate.bias": last_bias,
        "mix.weight": weights["h.weight"].flatten(1),
        "mix.bias": weights["h.bias"],
        "out.weight": weights["proj.weight"],
        "out.bias": weights["proj.bias"],
    }
    state |= {f"windows.{i}.weight": weights[f"focal_layers.{i}.0.weight"] for i in range(levels)}
    mixer = make("mixer", "focal_modulation", width, x.shape[1:3], levels=levels, window=config["w0"])
    return loaded(mixer, state, dtype)(x.to(dtype)), y


def _large_kernel(dtype):
    kernels = {"large": (13, 1)} | {
        f"branches.{k}x{d}": (k, d) for k, d in ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
    }  # fmt: skip
    state = {}
    for branch, (extent, _) in kernels.items():
        state |= {f"{branch}.conv.weight": filled(16, 1, extent, extent)}
        state |= {f"{branch}.norm.weight": filled(16), f"{branch}.norm.bias": filled(16, bias=True)}
    return loaded(make("mixer", "large_kernel", 16, (8, 8)), state, dtype)


@proof("mixer", "large_kernel", "authors' DilatedReparamBlock(16, 13), fingerprint of catalogue b, merged here")
def large_kernel(dtype):
    expected = [-274.37773594, 64.93385376, 0.97191221, 1.49424877, 0.55940777]
    return fingerprints(channels_first(_large_kernel(dtype)(_image().to(dtype))), expected)


@proof("mixer", "large_kernel", "its own branches, each with its norm in evaluation")
def large_kernel_in_branches(dtype):
    mixer, x = _large_kernel(dtype), _image().to(dtype)
    for norm in (mixer.large, *mixer.branches.values()):
        norm.norm.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        norm.norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    return mixer(x), mixer.large(x) + sum(branch(x) for branch in mixer.branches.values())


@proof("mixer", "central_difference", "authors' Conv2d_cd, fixture of the catalogue")
def central_difference(dtype):
    config, x, y, weights = load("cdc")
    outputs, inputs = weights["conv.weight"].shape[:2]  # the wider of both, the rest is zeros
    mixer = make("mixer", "central_difference", outputs, x.shape[2:], theta=config["theta"], form="dense")
    weight = F.pad(weights["conv.weight"], (0, 0, 0, 0, 0, outputs - inputs))
    x = F.pad(channels_last(x), (0, outputs - inputs)).to(dtype)
    return channels_first(loaded(mixer, {"dense": weight}, dtype)(x)), y


@proof("mixer", "central_difference", "its definition, channel by channel")
def central_difference_depthwise(dtype):
    mixer = make("mixer", "central_difference", 6, (5, 7), theta=0.3, kernel_size=5, form="depthwise").to(dtype)
    x = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    taps = mixer.depthwise.sum(dim=(1, 2, 3)).view(-1, 1, 1)
    expected = F.conv2d(x, mixer.depthwise, padding=2, groups=6) - 0.3 * x * taps
    return mixer(channels_last(x)), channels_last(expected)


@proof("mixer", "ls_conv", "authors' LSConv(16), fingerprint of catalogue b")
def ls_conv(dtype):
    state = {"narrow.weight": filled(8, 16), "window.weight": filled(8, 1, 7, 7), "mix.weight": filled(8, 8)}
    state |= {"kernels.weight": filled(18, 8), "kernels.bias": filled(18, bias=True)}
    for norm, width in (("narrow_norm", 8), ("window_norm", 8), ("mix_norm", 8), ("kernels_norm", 18), ("norm", 16)):
        state |= {f"{norm}.weight": filled(width), f"{norm}.bias": filled(width, bias=True)}
    mixer = loaded(make("mixer", "ls_conv", 16, (8, 8)), state, dtype)
    expected = [56.14517914, 110.94771072, -0.90611178, -0.56741494, -0.11096605]
    return fingerprints(channels_first(mixer(_image().to(dtype))), expected)


@count("mixer", "pconv", "FasterNet-T2", 14_982_888)
def fasternet():
    total = 16 * 3 * 96 + 2 * 96
    for i, (depth, width) in enumerate(zip((1, 2, 8, 2), (96, 192, 384, 768), strict=True)):
        if i:
            total += 4 * (width // 2) * width + 2 * width
        total += depth * (params("mixer", "pconv", width) + 2 * width * 2 * width + 2 * 2 * width)
    return total + 768 * 1280 + 1280 * 1000 + 1000


for _order, _published in ((2, 19_392), (3, 20_736), (4, 21_280), (5, 21_520)):
    count("mixer", "gnconv", f"gnconv(64), order {_order}", _published)(
        functools.partial(params, "mixer", "gnconv", 64, order=_order)
    )


@count("mixer", "gnconv", "HorNet-T 7x7", 22_409_512)
def hornet():
    total = 16 * 3 * 64 + 64 + 2 * 64
    widths = (64, 128, 256, 512)
    for i, (depth, width) in enumerate(zip((2, 3, 18, 2), widths, strict=True)):
        if i:
            total += 2 * widths[i - 1] + 4 * widths[i - 1] * width + width
        mlp = params("channel_mixer", "mlp", width)
        total += depth * (params("mixer", "gnconv", width, order=i + 2) + mlp + 4 * width + 2 * width)
    return total + 2 * 512 + 512 * 1000 + 1000


def _focalnet(levels: int) -> int:
    total = 16 * 3 * 96 + 96 + 2 * 96
    widths = (96, 192, 384, 768)
    for i, (depth, width) in enumerate(zip((2, 2, 6, 2), widths, strict=True)):
        if i:
            total += 4 * widths[i - 1] * width + width + 2 * width
        mixer = params("mixer", "focal_modulation", width, levels=levels)
        total += depth * (mixer + params("channel_mixer", "mlp", width) + 4 * width)
    return total + 2 * 768 + 768 * 1000 + 1000


count("mixer", "focal_modulation", "FocalNet-T, windows 3, 5", 28_427_116)(functools.partial(_focalnet, 2))
count("mixer", "focal_modulation", "FocalNet-T, windows 3, 5, 7", 28_647_928)(functools.partial(_focalnet, 3))

for _size, _trained in ((5, 3_136), (7, 6_400), (9, 10_176), (11, 13_440), (13, 18_048), (15, 21_632), (17, 27_776)):
    count("mixer", "large_kernel", f"DilatedReparamBlock(64, {_size}) as trained", _trained)(
        functools.partial(params, "mixer", "large_kernel", 64, kernel_size=_size)
    )


@count("mixer", "large_kernel", "DilatedReparamBlock(64, 13) merged", 10_880)
def merged():
    return sum(tensor.numel() for tensor in make("mixer", "large_kernel", 64, (8, 8)).merged())


@count("mixer", "central_difference", "CDCN", 2_245_016)
def cdcn():
    """Each layer's inputs and outputs differ there: the taps are those of the operator of the wider, over its width."""

    def layer(inputs: int, outputs: int) -> int:
        wide = max(inputs, outputs)
        return params("mixer", "central_difference", wide) // wide**2 * inputs * outputs + 2 * outputs

    block = layer(128, 196) + layer(196, 128)
    blocks = (layer(64, 128) + block) + 2 * (layer(128, 128) + block)
    return layer(3, 64) + blocks + layer(384, 128) + layer(128, 64) + 9 * 64


@count("mixer", "ls_conv", "LSConv(64)", 7_480)
def ls_conv_64():
    return params("mixer", "ls_conv", 64)


@proof("mixer", "weighted_conv", "authors' wConv2d, fingerprint of catalogue b")
def weighted_conv(dtype):
    mixer = loaded(make("mixer", "weighted_conv", 16, (8, 8)), {"weight": filled(16, 16, 3, 3)}, dtype)
    expected = [-22.28004446, 25.24468552, -0.42333062, 0.61988002, -0.19907559]
    return fingerprints(channels_first(mixer(_image().to(dtype))), expected)


@proof("mixer", "local_aggregator", "authors' UniFormer CBlock, fingerprint of catalogue b")
def local_aggregator(dtype):
    bias = filled(16, bias=True)
    position = {"weight": filled(16, 1, 3, 3), "bias": bias}
    norm = {"weight": filled(16), "bias": bias}
    aggregator = {"value.weight": filled(16, 16), "value.bias": bias, "out.weight": filled(16, 16), "out.bias": bias}
    aggregator |= {"window.weight": filled(16, 1, 5, 5), "window.bias": bias}
    feed = {
        "up.weight": filled(64, 16),
        "up.bias": filled(64, bias=True),
        "down.weight": filled(16, 64),
        "down.bias": bias,
    }
    parts = (("mixer", "dwconv", position, {"kernel_size": 3}), ("norm", "batch", norm, {}))
    parts += (("mixer", "local_aggregator", aggregator, {}), ("channel_mixer", "mlp", feed, {}))
    place, normed, mixer, mlp = (
        loaded(make(axis, name, 16, (8, 8), **knobs), state, dtype) for axis, name, state, knobs in parts
    )
    x = _image().to(dtype)
    x = x + place(x)
    x = x + mixer(normed(x))
    x = x + mlp(normed(x))
    expected = [-419.43565686, 76.99355397, -1.46520267, -0.62168240, -0.46357861]
    return fingerprints(channels_first(x), expected)


@proof("mixer", "multi_order", "authors' SMixer(16), dense, fingerprint of catalogue b")
def multi_order(dtype):
    state = {"narrow.weight": filled(8, 16), "narrow.bias": filled(8, bias=True), "gamma": filled(1, 8, 1, 1).flatten()}
    state |= {f"windows.dense_{name}.weight": filled(8, 8, 3, 3) for name in ("near", "far1", "far2")}
    for side in ("near", "far"):
        state |= {f"{side}_norm.weight": filled(8), f"{side}_norm.bias": filled(8, bias=True)}
        state |= {f"{side}_gate.squeeze.weight": filled(2, 8), f"{side}_gate.squeeze.bias": filled(2, bias=True)}
        state |= {f"{side}_gate.excite.weight": filled(8, 2), f"{side}_gate.excite.bias": filled(8, bias=True)}
    state |= {"out.weight": filled(16, 16), "out.bias": filled(16, bias=True)}
    mixer = loaded(make("mixer", "multi_order", 16, (8, 8), form="dense"), state, dtype)
    expected = [-72.73430434, 7.23447397, -0.00574057, -0.12526653, -0.17898846]
    return fingerprints(channels_first(mixer(_image().to(dtype))), expected)


def _dcls(dtype, form, expected):
    # The package's first axis is the width.
    state = {"weight": filled(16, 1, 5)[:, 0], "bias": filled(16, bias=True)}
    drawn_places = filled(2, 16, 1, 5) / (12 * 2 / 160) ** 0.5  # u
    state["place"] = 5 * drawn_places[:, :, 0].flip(0)
    if form == "gauss":
        state["width"] = filled(2, 16, 1, 5)[:, :, 0].flip(0)
    mixer = loaded(make("mixer", "dcls", 16, (8, 8), kernel_size=7, taps=5, form=form), state, dtype)
    return fingerprints(channels_first(mixer(_image().to(dtype))), expected)


@proof("mixer", "dcls", "package dcls 0.1.1, Dcls2d v1, fingerprint of catalogue b")
def dcls_triangle(dtype):
    expected = [-24.51778718, 21.55292816, -0.06113804, 0.18580371, 0.14696221]
    return _dcls(dtype, "triangle", expected)


@proof("mixer", "dcls", "package dcls 0.1.1, Dcls2d gauss, fingerprint of catalogue b")
def dcls_gauss(dtype):
    return _dcls(dtype, "gauss", [-24.50164262, 22.92060925, -0.05184132, 0.11024113, 0.19817370])


@proof("mixer", "pseudo_3d", "formula of catalogue a, A24, three forms, from torch's convolutions")
def pseudo_3d(dtype):
    x = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, expected = [], []
    for form in ("a", "b", "c"):
        mixer = make("mixer", "pseudo_3d", 6, (5, 7), form=form, kernel_size=3).to(dtype)
        s = F.conv2d(x, mixer.across.weight, mixer.across.bias, padding=(0, 1), groups=6)
        t = F.conv2d(x if form == "b" else s, mixer.down.weight, mixer.down.bias, padding=(1, 0), groups=6)
        found.append(mixer(channels_last(x)))
        expected.append(channels_last(t if form == "a" else s + t))
    return torch.stack(found), torch.stack(expected)


@proof("mixer", "hypercomplex_conv", "formula of catalogue c, C9, by torch.kron")
def hypercomplex_conv(dtype):
    mixer = make("mixer", "hypercomplex_conv", 12, (5, 7), parts=3).to(dtype)
    x = torch.randn(2, 12, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    kernel = sum(
        torch.kron(algebra.contiguous()[..., None, None], filters)
        for algebra, filters in zip(mixer.algebra, mixer.filters, strict=True)
    )
    return mixer(channels_last(x)), channels_last(F.conv2d(x, kernel, mixer.bias, padding=1))


def _hypercomplex(parts: int) -> int:
    """Half of the inputs of the operator of width 192."""
    whole = params("mixer", "hypercomplex_conv", 192, parts=parts)
    return (whole - parts**3 - 192) // 2 + parts**3 + 192


for _parts, _published in ((2, 83_144), (3, 55_515), (4, 41_728)):
    count("mixer", "hypercomplex_conv", f"PHConv2d 96 to 192, {_parts} parts", _published)(
        functools.partial(_hypercomplex, _parts)
    )


@count("mixer", "dcls", "Dcls2d(96, depthwise, 17, 34 taps, gauss)", 16_416)
def dcls_96():
    return params("mixer", "dcls", 96)


for _form, _published in (("dense", 35_152), ("depthwise", 8_368)):
    count("mixer", "multi_order", f"SMixer(64), {_form}", _published)(
        functools.partial(params, "mixer", "multi_order", 64, form=_form)
    )
