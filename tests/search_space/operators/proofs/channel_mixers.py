"""Channel mixers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import channels_first, channels_last, count, loaded, make, params, proof
from .catalogue import drawn, filled, fingerprints, load


@proof("channel_mixer", "conv_glu", "authors' ConvolutionalGLU, fingerprint of catalogue b")
def conv_glu(dtype):
    gate, up = filled(64, 16).chunk(2)
    gate_bias, up_bias = filled(64, bias=True).chunk(2)
    state = {
        "gate.weight": gate,
        "gate.bias": gate_bias,
        "up.weight": up,
        "up.bias": up_bias,
        "depthwise.weight": filled(32, 1, 3, 3),
        "depthwise.bias": filled(32, bias=True),
        "down.weight": filled(16, 32),
        "down.bias": filled(16, bias=True),
    }
    module = loaded(make("channel_mixer", "conv_glu", 16, (8, 8), expansion=3.0), state, dtype)
    expected = [-36.75591381, 20.24164359, 0.03075196, 0.02245415, 0.04851384]
    return fingerprints(module(drawn(2, 64, 16).view(2, 8, 8, 16).to(dtype)), expected)


@proof("channel_mixer", "gdfn", "authors' GDFN, fixture of the catalogue")
def gdfn(dtype):
    config, x, y, weights = load("gdfn")
    gate, up = weights["project_in.weight"].flatten(1).chunk(2)
    gate_window, up_window = weights["dwconv.weight"].chunk(2)
    state = {
        "gate.weight": gate,
        "up.weight": up,
        "gate_depthwise.weight": gate_window,
        "up_depthwise.weight": up_window,
        "down.weight": weights["project_out.weight"].flatten(1),
    }
    module = loaded(make("channel_mixer", "gdfn", config["C"], x.shape[2:], expansion=config["f"]), state, dtype)
    return channels_first(module(channels_last(x).to(dtype))), y


@proof("channel_mixer", "star_mlp", "formula of catalogue c, C36, from torch's own functions")
def star_mlp(dtype):
    module = make("channel_mixer", "star_mlp", 12, (5, 7)).to(dtype)
    module.scale.fill_(0.8944), module.bias.fill_(-0.4472)
    x = torch.randn(2, 5, 7, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden = torch.einsum("bhwc,dc->bhwd", x, module.up.weight)
    star = 0.8944 * torch.where(hidden > 0, hidden**2, 0.0) - 0.4472
    return module(x), torch.einsum("bhwd,cd->bhwc", star, module.down.weight)


@proof("channel_mixer", "uib", "formula of catalogue a, A14, from torch's layers, both windows")
def uib(dtype):
    width, generator = 12, torch.Generator().manual_seed(0)
    module = make("channel_mixer", "uib", width, (7, 5), expansion=3.0, start_kernel_size=5, kernel_size=3).to(dtype)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if "norm" in name and tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator).to(dtype))
    x = torch.randn(2, width, 7, 5, generator=generator).to(dtype)

    def norm(y, n):
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-5)

    y = norm(F.conv2d(x, module.start.weight, padding=2, groups=width), module.start_norm)
    y = norm(F.conv2d(y, module.up.weight[..., None, None]), module.up_norm).relu()
    y = norm(F.conv2d(y, module.depthwise.weight, padding=1, groups=3 * width), module.depthwise_norm).relu()
    y = norm(F.conv2d(y, module.down.weight[..., None, None]), module.down_norm)
    return module(channels_last(x)), channels_last(y)


@proof("channel_mixer", "uib", "timm 1.0.31 UniversalInvertedResidual, fingerprint (benchmarks/operator_oracles.py)")
def uib_timm(dtype):
    state = {"start.weight": filled(16, 1, 3, 3), "up.weight": filled(32, 16)}
    state |= {"depthwise.weight": filled(32, 1, 5, 5), "down.weight": filled(16, 32)}
    for norm, width in (("start_norm", 16), ("up_norm", 32), ("depthwise_norm", 32), ("down_norm", 16)):
        state |= {f"{norm}.weight": filled(width), f"{norm}.bias": filled(width, bias=True)}
    module = make("channel_mixer", "uib", 16, (8, 8), expansion=2.0, start_kernel_size=3, kernel_size=5)
    expected = [-138.2824495459, 13.1590714363, 0.2217216141, 0.0853983660, -0.5022941169]
    y = loaded(module, state, dtype)(channels_last(drawn(2, 16, 8, 8)).to(dtype))
    return fingerprints(channels_first(y), expected)


@proof("channel_mixer", "star_mlp", "timm 1.0.31 Mlp with StarReLU, fingerprint (benchmarks/operator_oracles.py)")
def star_mlp_timm(dtype):
    state = {"up.weight": filled(64, 16), "down.weight": filled(16, 64)}
    state |= {"scale": filled(1), "bias": filled(1, bias=True)}
    module = loaded(make("channel_mixer", "star_mlp", 16, (8, 8)), state, dtype)
    expected = [-166.5972985142, 37.6174597456, 0.1123204748, -1.0468982806, 0.3167092583]
    return fingerprints(module(drawn(2, 64, 16).view(2, 8, 8, 16).to(dtype)), expected)


@proof("channel_mixer", "grn_mlp", "timm 1.0.31 GlobalResponseNorm, fingerprint (benchmarks/operator_oracles.py)")
def response_norm(dtype):
    module = make("channel_mixer", "grn_mlp", 16, (8, 8), expansion=1.0).norm
    module = loaded(module, {"weight": filled(16), "bias": filled(16, bias=True)}, dtype)
    expected = [-57.2645433922, 75.6304674306, -1.2256760300, -2.2911553256, 0.2413205556]
    return fingerprints(module(drawn(2, 64, 16).view(2, 8, 8, 16).to(dtype)), expected)


def _unireplknet_block(dtype):
    """The block from three operators: the kernel, squeeze-and-excitation round it, and the channel mixer."""
    norm = {"weight": filled(16), "bias": filled(16, bias=True)}
    kernel = {"large.conv.weight": filled(16, 1, 7, 7)}
    for extent, dilation in ((5, 1), (3, 2), (3, 3)):
        kernel[f"branches.{extent}x{dilation}.conv.weight"] = filled(16, 1, extent, extent)
    for branch in ("large", "branches.5x1", "branches.3x2", "branches.3x3"):
        kernel |= {f"{branch}.norm.{name}": tensor for name, tensor in norm.items()}
    mixer = loaded(make("mixer", "large_kernel", 16, (8, 8), kernel_size=7), kernel, dtype)
    squeeze = {
        "squeeze.weight": filled(4, 16),
        "squeeze.bias": filled(4, bias=True),
        "excite.weight": filled(16, 4),
        "excite.bias": filled(16, bias=True),
    }
    gate = loaded(make("gate", "se", 16, (8, 8), reduction=4), squeeze, dtype)
    hidden = {
        "up.weight": filled(64, 16),
        "up.bias": filled(64, bias=True),
        "norm.weight": filled(1, 1, 1, 64).flatten(),
        "norm.bias": filled(1, 1, 1, 64).flatten(),
        "down.weight": filled(16, 64),
        "down.bias": torch.zeros(16),
    }
    channel_mixer = loaded(make("channel_mixer", "grn_mlp", 16, (8, 8)), hidden, dtype)
    norms = [loaded(make("norm", "batch", 16, (8, 8)), norm, dtype) for _ in range(2)]
    x = channels_last(drawn(2, 16, 8, 8)).to(dtype)
    y = norms[1](channel_mixer(gate(x, lambda z: norms[0](mixer(z)))))
    y = channels_first(x + filled(16).to(dtype) * y)
    return fingerprints(y, [61.21021627, 44.60305098, -0.02939217, -0.10443266, 0.13832973])


proof("channel_mixer", "grn_mlp", "authors' UniRepLKNetBlock (with large_kernel and se), fingerprint of catalogue b")(
    _unireplknet_block
)
proof("mixer", "large_kernel", "authors' UniRepLKNetBlock (with se and grn_mlp), fingerprint of catalogue b")(
    _unireplknet_block
)


@count("channel_mixer", "conv_glu", "ConvGLU(64), ratio 4", 34_744)
def conv_glu_64():
    return params("channel_mixer", "conv_glu", 64, expansion=4.0)


@count("channel_mixer", "conv_glu", "ConvGLU(96), hidden 384", 76_896)
def conv_glu_96():
    return params("channel_mixer", "conv_glu", 96, expansion=4.0)


def _restormer() -> int:
    """Bias-free norms; 48 channels, blocks 4-6-6-8, 4 of refinement, heads 1-2-4-8."""

    def block(width: int, heads: int) -> int:
        mixer = params("mixer", "transposed_attention", width, heads=heads)
        return 2 * width + mixer + params("channel_mixer", "gdfn", width, expansion=2.66)

    encoder = 4 * block(48, 1) + 6 * block(96, 2) + 6 * block(192, 4) + 8 * block(384, 8)
    decoder = 6 * block(192, 4) + 6 * block(96, 2) + (4 + 4) * block(96, 1)
    halved = sum(9 * width * width // 2 for width in (48, 96, 192))
    doubled = sum(9 * width * 2 * width for width in (384, 192, 96))
    reduced = 384 * 192 + 192 * 96
    return encoder + decoder + halved + doubled + reduced + 9 * 3 * 48 + 9 * 96 * 3


count("channel_mixer", "gdfn", "Restormer, bias-free norms", 26_111_668)(_restormer)
count("mixer", "transposed_attention", "Restormer, bias-free norms", 26_111_668)(_restormer)


@count("channel_mixer", "star_mlp", "PoolFormerV2-S12", 11_891_712)
def poolformer():
    widths, depths = (64, 128, 320, 512), (2, 2, 6, 2)
    total = 3 * 64 * 49 + 64 + 64  # a convolution 7x7 and a norm without bias
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if i:
            total += widths[i - 1] + 9 * widths[i - 1] * width + width
        own = params("channel_mixer", "star_mlp", width) + params("mixer", "pooling", width)
        total += depth * (own + 2 * width + (2 * width if i >= 2 else 0))  # norms, scales of the residual
    return total + 2 * 512 + 512 * 1000 + 1000


def _unireplknet_a() -> int:
    """Deployed: norms are in the layers before them, and the response norm has no bias."""
    widths, depths = (40, 80, 160, 320), (2, 2, 6, 2)
    total = 27 * 20 + 20 + 2 * 20 + 9 * 20 * 40 + 40 + 2 * 40
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if i:
            total += 9 * widths[i - 1] * width + width + 2 * width
        kernel = 9 * width + width if i == 0 else 13 * 13 * width + width
        excitation = params("gate", "se", width, reduction=4)
        total += depth * (kernel + excitation + params("channel_mixer", "grn_mlp", width) - 4 * width)
    return total + 2 * 320 + 320 * 1000 + 1000


count("channel_mixer", "grn_mlp", "UniRepLKNet-A, deployed", 4_437_300)(_unireplknet_a)


@proof("channel_mixer", "activator", "authors' AGU, fixture of the catalogue")
def activator(dtype):
    config, x, y, weights = load("agu")
    names = {"gate": "proj_1", "up": "proj_2", "down": "proj_3", "norm": "norm"}
    state = {f"{own}.{n}": weights[f"{theirs}.{n}"] for own, theirs in names.items() for n in ("weight", "bias")}
    return loaded(make("channel_mixer", "activator", config["C"], (9,)), state, dtype)(x.to(dtype)), y


@count(
    "channel_mixer",
    "activator",
    "AGU(256, 512): 2 (C h + h) + h C + C + 2 h",
    2 * (256 * 512 + 512) + 512 * 256 + 256 + 1024,
)
def agu():
    return params("channel_mixer", "activator", 256)
