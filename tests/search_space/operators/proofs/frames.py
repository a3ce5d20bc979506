"""Stems, downsamplings and heads: what stands between two contexts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space import registry
from mixnas.search_space.operators.layers import Conv
from mixnas.search_space.registry import Context

from . import channels_first, channels_last, count, loaded, make, params, proof
from .catalogue import drawn, filled, fingerprints


def between(
    axis: str, name: str, before: int, after: int, size: tuple[int, ...] = (224, 224), **knobs: Any
) -> nn.Module:
    """A stem, downsampling or head in evaluation mode, knobs at their defaults but for those given."""
    operator = registry.get(axis, name)
    kind = "image" if len(size) == 2 else "sequence"
    values = {knob: found.default for knob, found in operator.knobs.items()} | knobs
    context = Context(before, size, kind)
    assert operator.check is None or operator.check(context, values) is None
    grid = operator.build.out_size(size, **values)  # type: ignore[attr-defined]
    module: nn.Module = operator.build(context, Context(after, grid, kind), **values)
    return module.eval()


def numbers(*args: Any, **settings: Any) -> int:
    """Parameters of `between`."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in between(*args, **settings).parameters())


def _conv(name: str, after: int, before: int, kernel: int) -> dict[str, Tensor]:
    return {f"{name}.weight": filled(after, before, kernel, kernel), f"{name}.bias": filled(after, bias=True)}


def _norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": filled(width), f"{name}.bias": filled(width, bias=True)}


# -- stems ------------------------------------------------------------------------------------------------------------


def _patches(size: int, expected: list[float]):
    def answers(dtype):
        stem = loaded(between("stem", "patch", 3, 16, (32, 32), patch_size=size), _conv("conv", 16, 3, size), dtype)
        return fingerprints(channels_first(stem(channels_last(drawn(2, 3, 32, 32)).to(dtype))), expected)

    proof("stem", "patch", f"timm 1.0.31 PatchEmbed, patch {size}, fingerprint (benchmarks/operator_oracles.py)")(
        answers
    )


_patches(2, [-226.35586843, 78.13968518, -0.03973954, -1.74721554, -0.81709385])
_patches(4, [-53.50535907, 38.85003102, -0.92945958, 0.86085965, -1.43935138])
_patches(16, [8.73119134, 10.26477258, -1.97920005, 0.0705847, 0.36905214])


@proof("stem", "patch", "each patch as one row of numbers, times the weights")
def patch_rows(dtype):
    stem = between("stem", "patch", 3, 8, (8, 12), patch_size=4).to(dtype)
    x = torch.randn(2, 8, 12, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = x.view(2, 2, 4, 3, 4, 3).permute(0, 1, 3, 5, 2, 4).flatten(3)
    return stem(x), rows @ stem.conv.weight.flatten(1).T + stem.conv.bias


@proof(
    "stem", "overlap_patch", "timm 1.0.31 pvt_v2 OverlapPatchEmbed(7, 4), fingerprint (benchmarks/operator_oracles.py)"
)
def overlap_stem(dtype):
    state = _conv("patches.conv", 16, 3, 7) | _norm("patches.norm", 16)
    stem = loaded(between("stem", "overlap_patch", 3, 16, (32, 32)), state, dtype)
    return fingerprints(
        channels_first(stem(channels_last(drawn(2, 3, 32, 32)).to(dtype))),
        [-27.49792934, 43.25378701, -0.45091286, 1.44784067, -0.66815703],
    )


@count("stem", "patch", "ViT-B/16 (timm vit_base_patch16_224)", 86_567_656)
def vit():
    stem = numbers("stem", "patch", 3, 768, patch_size=16, position="learned") + 2 * 768  # a class token, its position
    mixer, mlp = params("mixer", "attention", 768, heads=12), params("channel_mixer", "mlp", 768, expansion=4.0)
    return stem + 12 * (mixer + mlp + 4 * 768) + 2 * 768 + numbers("head", "pool", 768, 1000, (14, 14))


@count("stem", "overlap_patch", "PVT v2-B1 (timm pvt_v2_b1)", 14_009_000)
def pvt_v2():
    widths, ratios, side = (64, 128, 320, 512), (8.0, 8.0, 4.0, 4.0), (56, 28, 14, 7)
    total = numbers("stem", "overlap_patch", 3, 64)
    for i, (width, ratio) in enumerate(zip(widths, ratios, strict=True)):
        if i:
            total += numbers("downsample", "overlap_patch", widths[i - 1], width, (side[i - 1],) * 2)
        mixer = params("mixer", "spatial_reduction_attention", width, heads=1, reduction=(8, 4, 2, 1)[i])
        mlp = params("channel_mixer", "inverted_residual", width, expansion=ratio)
        total += 2 * (mixer + mlp + 4 * width) + 2 * width
    return total + numbers("head", "pool", 512, 1000, (7, 7))


# -- downsampling -----------------------------------------------------------------------------------------------------


@proof(
    "downsample",
    "overlap_patch",
    "timm 1.0.31 pvt_v2 OverlapPatchEmbed(3, 2), fingerprint (benchmarks/operator_oracles.py)",
)
def overlap(dtype):
    module = between("downsample", "overlap_patch", 16, 24, (8, 8))
    loaded(module, _conv("conv", 24, 16, 3) | _norm("norm", 24), dtype)
    return fingerprints(
        channels_first(module(channels_last(drawn(2, 16, 8, 8)).to(dtype))),
        [5.71464269, 27.75953371, -1.11281105, 1.27250808, 1.29513029],
    )


@proof(
    "downsample",
    "fused_inverted_residual",
    "timm 1.0.31 gcvit Downsample2d(32, 48), fingerprint (benchmarks/operator_oracles.py)",
)
def fused(dtype):
    state = _norm("norm", 32) | _norm("out_norm", 48)
    state |= {"depthwise.weight": filled(32, 1, 3, 3), "reduce.weight": filled(48, 32, 3, 3)}
    state |= {"squeeze.weight": filled(8, 32), "excite.weight": filled(32, 8), "project.weight": filled(32, 32)}
    module = loaded(between("downsample", "fused_inverted_residual", 32, 48, (8, 8)), state, dtype)
    module.norm.eps = module.out_norm.eps = 1e-6  # the class's own; timm's models give it 1e-5
    return fingerprints(
        channels_first(module(channels_last(drawn(2, 32, 8, 8)).to(dtype))),
        [5.73380622, 39.59019273, -0.27795391, -0.717702, -0.28143912],
    )


@count("downsample", "fused_inverted_residual", "stem and downsamplings of GC ViT-XXT (timm gcvit_xxtiny)", 1_729_664)
def gcvit():
    total = numbers("stem", "conv", 3, 64, stride=2)
    total += numbers("downsample", "fused_inverted_residual", 64, 64, (112, 112))
    return total + sum(numbers("downsample", "fused_inverted_residual", c, 2 * c, (8, 8)) for c in (64, 128, 256))


@proof("downsample", "patch", "torch.nn.Conv2d, kernel and stride 2")
def patch_down(dtype):
    return _strided("patch", 0, dtype)


@proof("downsample", "conv", "torch.nn.Conv2d, kernel 3, stride 2, padding 1")
def conv_down(dtype):
    return _strided("conv", 1, dtype)


def _strided(name: str, padding: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    module = between("downsample", name, 6, 9, (4, 10)).to(dtype)
    x = torch.randn(2, 6, 4, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = F.conv2d(x, module.conv.weight, module.conv.bias, stride=2, padding=padding)
    return channels_first(module(channels_last(x))), expected


# -- heads ------------------------------------------------------------------------------------------------------------


@proof("head", "sub_pixel", "torch.nn.Conv2d and torch.nn.PixelShuffle(3)")
def sub_pixel(dtype):
    head = between("head", "sub_pixel", 6, 2, (4, 5), scale=3).to(dtype)
    x = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    convolved = F.conv2d(x, head.conv.conv.weight, head.conv.conv.bias, padding=1)
    return channels_first(head(channels_last(x))), nn.PixelShuffle(3)(convolved)


@proof("head", "sub_pixel", "on sequences: torch.nn.Conv1d, answer 2 t + a of output o being channel 2 o + a")
def sub_pixel_sequence(dtype):
    head = between("head", "sub_pixel", 6, 3, (7,), kernel_size=5).to(dtype)
    x = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    convolved = F.conv1d(x, head.conv.conv.weight[:, :, 0], head.conv.conv.bias, padding=2)
    expected = torch.stack([convolved[:, [2 * o + t % 2 for o in range(3)], t // 2] for t in range(14)], dim=1)
    return head(channels_last(x)), expected


@proof("head", "lr_aspp", "torch.nn: AvgPool2d, Conv2d of 1 x 1, AdaptiveAvgPool2d, Upsample, PixelShuffle(2)")
def lr_aspp(dtype):
    head = between("head", "lr_aspp", 6, 3, (4, 6), scale=2).to(dtype)
    x = torch.randn(2, 6, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)

    def conv(layer: nn.Module, y: Tensor) -> Tensor:
        return F.conv2d(y, layer.weight[:, :, None, None], layer.bias)

    inside = conv(head.inside, nn.AvgPool2d(2)(x)).relu() * conv(head.gate, nn.AdaptiveAvgPool2d(1)(x)).sigmoid()
    finer = nn.Upsample(scale_factor=2, mode="bilinear")(conv(head.coarse, inside))
    return channels_first(head(channels_last(x))), nn.PixelShuffle(2)(conv(head.fine, x) + finer)


for _scale, _published in ((2, 21_284), (3, 22_729), (4, 24_752)):

    @count("head", "sub_pixel", f"ESPCN, scale {_scale}", _published)
    def espcn(scale: int = _scale) -> int:
        first = numbers("stem", "conv", 1, 64, kernel_size=5)
        with torch.device("meta"):
            middle = sum(p.numel() for p in Conv(64, 32, 3, padding=1).parameters())
        return first + middle + numbers("head", "sub_pixel", 32, 1, scale=scale)


# -- a depth rule -----------------------------------------------------------------------------------------------------


@proof(
    "channel_mixer", "mlp", "formula of catalogue a, B8: layers side by side are one of their hidden widths together"
)
def shallow(dtype):
    parts = [make("channel_mixer", "mlp", 6, (5,), expansion=e).to(dtype) for e in (1.0, 2.0, 3.0)]
    whole = make("channel_mixer", "mlp", 6, (5,), expansion=6.0).to(dtype)
    whole.up.weight.copy_(torch.cat([part.up.weight for part in parts]))
    whole.up.bias.copy_(torch.cat([part.up.bias for part in parts]))
    whole.down.weight.copy_(torch.cat([part.down.weight for part in parts], dim=1))
    whole.down.bias.copy_(torch.stack([part.down.bias for part in parts]).sum(0))
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    return whole(x), torch.stack([part(x) for part in parts]).sum(0)


@proof("head", "offset_learning", "formula of catalogue c, D27, token by token and class by class")
def offset_learning(dtype):
    head = between("head", "offset_learning", 6, 4, (3, 5)).to(dtype)
    torch.nn.init.normal_(head.classes, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    answers = []
    for tokens in x.flatten(1, 2):
        like = torch.einsum("ne,ke->nk", tokens, head.classes).exp()
        seen = torch.stack([(like[:, k, None] * tokens).sum(0) / like[:, k].sum() for k in range(4)])
        named = torch.stack([(like[n, :, None] * head.classes).sum(0) / like[n].sum() for n in range(15)])
        classes = head.classes + seen @ head.class_offset.weight.T
        moved = tokens + named @ head.token_offset.weight.T
        answers.append(F.layer_norm(torch.einsum("ne,ke->nk", moved, classes), (4,)))
    return head(x).flatten(1, 2), torch.stack(answers)


@count("head", "offset_learning", "what the head has beyond a 1 x 1 convolution, 256 to 150: 0.13 M", 131_222)
def offset_learning_150():
    return numbers("head", "offset_learning", 256, 150) - numbers("head", "token", 256, 150)
