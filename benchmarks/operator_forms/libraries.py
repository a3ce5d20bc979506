"""Modules of libraries, of the same sizes and with weights of their own: what they answer is what the proofs compare.

timm is not needed elsewhere: where it is not installed the compositions alone are timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version

from . import FORMS, Form


def library(
    name: str, what: str, *, package: str = "timm", axis: str = "mixer", first: bool = True, kinds: str = "image"
) -> Callable:
    """Register a library's module, where there is one; see `Form`."""

    def decorate(build):
        if importlib.util.find_spec(package) is not None:
            source = f"{package} {version(package)} {what}"
            every = (kinds,) if kinds else ("image", "sequence")
            FORMS.append(Form(axis, name, source, first, build=build, kinds=every))
        return build

    return decorate


def grid_last(module):
    """For a module of tokens (B, N, C)."""
    return lambda x: module(x.flatten(1, -2))


@library("gpsa", "convit GPSA", first=False)
def gpsa(m, x):
    from timm.models.convit import GPSA

    return grid_last(GPSA(x.shape[-1], num_heads=m.heads).eval())


@library("halo_attention", "HaloAttn")
def halo_attention(m, x):
    from timm.layers.halo_attn import HaloAttn

    return HaloAttn(x.shape[1], num_heads=m.heads, block_size=m.block, halo_size=m.halo).eval()


@library("single_head_attention", "shvit SHSA")
def single_head_attention(m, x):
    from timm.models.shvit import SHSA

    return SHSA(x.shape[1], m.query.weight.shape[0], m.split[0]).eval()


@library("low_res_attention", "lowformer ConvAttention")
def low_res_attention(m, x):
    from timm.models.lowformer import ConvAttention

    return ConvAttention(x.shape[1], 0.5, 2, 5).eval()


@library("spatial_reduction_attention", "pvt_v2 Attention", first=False)
def spatial_reduction_attention(m, x):
    from timm.models.pvt_v2 import Attention

    module, size = Attention(x.shape[-1], num_heads=m.heads, sr_ratio=2).eval(), list(x.shape[1:3])
    return lambda t: module(t.flatten(1, 2), size)


@library("window_attention", "swin_transformer WindowAttention, with its partition", first=False)
def window_attention(m, x):
    from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse

    size = (m.window, m.window)
    module = WindowAttention(x.shape[-1], m.heads, window_size=size).eval()

    def run(t):
        parts = window_partition(t, size).view(-1, m.window**2, t.shape[-1])
        return window_reverse(module(parts).view(-1, *size, t.shape[-1]), size, *t.shape[1:3])

    return run


@library("uib", "UniversalInvertedResidual", axis="channel_mixer")
def uib(m, x):
    from timm.models._efficientnet_blocks import UniversalInvertedResidual

    options = {"exp_ratio": m.up.weight.shape[0] / x.shape[1], "noskip": True, "layer_scale_init_value": None}
    return UniversalInvertedResidual(x.shape[1], x.shape[1], 3, 3, **options).eval()


@library("mlp", "Mlp", axis="channel_mixer", first=False, kinds="")
def mlp(m, x):
    from timm.layers.mlp import Mlp

    return Mlp(x.shape[-1], m.up.weight.shape[0]).eval()


@library("swiglu", "SwiGLU", axis="channel_mixer", first=False, kinds="")
def swiglu(m, x):
    from timm.layers.mlp import SwiGLU

    return SwiGLU(x.shape[-1], m.up.weight.shape[0], bias=False).eval()


@library("star_mlp", "Mlp with StarReLU", axis="channel_mixer", first=False, kinds="")
def star_mlp(m, x):
    from timm.layers.mlp import Mlp
    from timm.models.metaformer import StarReLU

    return Mlp(x.shape[-1], m.up.weight.shape[0], act_layer=StarReLU, bias=False).eval()


@library("grn_mlp", "GlobalResponseNormMlp", axis="channel_mixer", first=False)
def grn_mlp(m, x):
    from timm.layers.mlp import GlobalResponseNormMlp

    return GlobalResponseNormMlp(x.shape[-1], m.up.weight.shape[0], use_conv=False).eval()


@library("convnext", "ConvNeXtBlock")
def convnext(m, x):
    from timm.models.convnext import ConvNeXtBlock

    return ConvNeXtBlock(x.shape[1], x.shape[1], kernel_size=7, mlp_ratio=4, ls_init_value=None).eval()


@library("inception_dwconv", "inception_next InceptionDWConv2d")
def inception_dwconv(m, x):
    from timm.models.inception_next import InceptionDWConv2d

    return InceptionDWConv2d(x.shape[1]).eval()


@library("pooling", "metaformer Pooling")
def pooling(m, x):
    from timm.models.metaformer import Pooling

    return Pooling(3).eval()


@library("eca", "EcaModule", axis="gate")
def eca(m, x):
    from timm.layers.eca import EcaModule

    return EcaModule(x.shape[1]).eval()


@library("se", "SEModule", axis="gate")
def se(m, x):
    from timm.layers.squeeze_excite import SEModule

    return SEModule(x.shape[1], rd_ratio=m.squeeze.weight.shape[0] / x.shape[1], rd_divisor=1).eval()
