#!/usr/bin/env python3
"""Fingerprints of timm's modules, with the fill of the operator catalogue: what the proofs of operators compare with.

    pip install timm; python benchmarks/operator_oracles.py

The tests do not need timm: they hold the numbers that this prints (`tests/search_space/operators/proofs`). Each row is
the sum, the L2 norm, and the first, middle and last entry of what the module answers in float64, in evaluation.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import torch
from _checkout import ROOT, use_checkout
from torch import Tensor, nn

use_checkout()
sys.path.insert(0, str(ROOT))

from tests.search_space.operators.proofs.catalogue import drawn, filled, fingerprint  # noqa: E402


def fill(module: nn.Module) -> nn.Module:
    """All parameters, as the catalogue's appendix A fills them."""
    module.double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim():
                parameter.copy_(filled(*parameter.shape, bias="bias" in name.rpartition(".")[2]))
    return module


def modules() -> dict[str, Callable[[], Tensor]]:
    """What to run, by name."""
    from timm.layers.grn import GlobalResponseNorm
    from timm.layers.halo_attn import HaloAttn
    from timm.layers.mlp import Mlp
    from timm.layers.patch_embed import PatchEmbed
    from timm.models._efficientnet_blocks import UniversalInvertedResidual
    from timm.models.gcvit import Downsample2d
    from timm.models.lowformer import ConvAttention
    from timm.models.metaformer import StarReLU
    from timm.models.pvt_v2 import OverlapPatchEmbed
    from timm.models.shvit import SHSA
    from timm.models.swin_transformer import SwinTransformerBlock

    picture, image, tokens = drawn(2, 3, 32, 32), drawn(2, 16, 8, 8), drawn(2, 64, 16).view(2, 8, 8, 16)

    def swin(shift: int) -> Tensor:
        block = SwinTransformerBlock(16, (8, 8), num_heads=2, window_size=4, shift_size=shift, dynamic_mask=False)
        fill(block)
        if block.attn_mask is not None:
            block.attn_mask.copy_(block.get_attn_mask().double())
        return block._attn(tokens)

    def uib() -> Tensor:
        options = {"exp_ratio": 2.0, "noskip": True, "layer_scale_init_value": None}
        return fill(UniversalInvertedResidual(16, 16, 3, 5, **options))(image)

    def patches(size: int) -> Tensor:
        return fill(PatchEmbed(32, size, 3, 16, flatten=False))(picture)

    def overlapping(size: int, stride: int, x: Tensor, width: int) -> Tensor:
        return fill(OverlapPatchEmbed(size, stride, x.shape[1], width))(x).movedim(-1, 1)

    return {
        **{f"PatchEmbed(patch {size})": functools.partial(patches, size) for size in (2, 4, 16)},
        "OverlapPatchEmbed(7, 4)": lambda: overlapping(7, 4, picture, 16),
        "OverlapPatchEmbed(3, 2)": lambda: overlapping(3, 2, image, 24),
        "gcvit Downsample2d(32, 48)": lambda: fill(Downsample2d(32, 48))(drawn(2, 32, 8, 8)),
        "HaloAttn(16, heads 2, block 4, halo 1)": lambda: fill(HaloAttn(16, num_heads=2, block_size=4, halo_size=1))(
            image
        ),
        "SHSA(16, qk 8, p 6)": lambda: fill(SHSA(16, 8, 6))(image),
        "Swin window 4, heads 2": lambda: swin(0),
        "Swin window 4, heads 2, shifted by 2": lambda: swin(2),
        "UIB(16, start 3, mid 5, expansion 2)": uib,
        "LowFormer ConvAttention(128, stride 2), 7 x 6": lambda: fill(ConvAttention(128, 0.5, 2, 5))(
            drawn(2, 128, 7, 6)
        ),
        "GlobalResponseNorm(16)": lambda: fill(GlobalResponseNorm(16))(tokens),
        "metaformer Mlp(16, 64, StarReLU)": lambda: fill(Mlp(16, 64, act_layer=StarReLU, bias=False))(tokens),
    }


def main() -> int:
    """Run all and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        import timm
    except ImportError as error:
        print(f"This needs timm and what it imports: pip install timm ({error}).", file=sys.stderr)
        return 2
    print(f"timm {timm.__version__}, torch {torch.__version__}")
    for name, answer in modules().items():
        with torch.no_grad():
            print(f"{name}: [{', '.join(f'{value:.10f}' for value in fingerprint(answer()))}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
