"""The ConvNeXt block as a mixer: one kernel on a GPU where the block is small."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.dispatch import use_triton
from mixnas.kernels.fused_block import fused_conv_block
from mixnas.kernels.norm import layer_norm
from mixnas.search_space.operators.layers import KERNEL_SIZES, DepthwiseConv, Linear, is_plain
from mixnas.search_space.registry import Context, Knob, register


@register(
    "mixer",
    "convnext",
    paper="Liu et al. 2022, A ConvNet for the 2020s (arXiv 2201.03545), section 2 and figure 4",
    knobs={
        "kernel_size": Knob(7, choices=KERNEL_SIZES, doc="extent of the depthwise window"),
        "expansion": Knob(4.0, low=0.25, high=16, doc="hidden width over width"),
    },
)
class ConvNeXt(nn.Module):
    """W2 gelu(W1 norm(depthwise(x))), with biases, layer norm of eps 1e-6; the residual is the block's.

    With channel mixer "none" the block is ConvNeXt's own, after a norm; its layer scale is a factor of W2's rows.
    Causal tasks see only earlier tokens.
    """

    def __init__(self, context: Context, *, kernel_size: int, expansion: float) -> None:
        super().__init__()
        hidden = max(1, int(context.width * expansion))
        self.conv = DepthwiseConv(context, kernel_size)
        self.norm = nn.LayerNorm(context.width, eps=1e-6)
        self.up = Linear(context.width, hidden)
        self.down = Linear(hidden, context.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        norm, up, down = self.norm, self.up, self.down
        # One kernel where the layers are plain; a policy that takes their place runs them itself.
        if x.dim() == 4 and is_plain(up, down) and (up.compute is None or use_triton(x)):

            def cast(tensor: Tensor) -> Tensor:
                return tensor if up.compute is None else tensor.to(up.compute)

            assert self.conv.bias is not None
            operands = (self.conv.weight, self.conv.bias, norm.weight, norm.bias)
            products = (cast(up.weight), cast(up.bias), cast(down.weight), cast(down.bias))
            return fused_conv_block(cast(x), *operands, *products, eps=norm.eps, skip=False)
        z = self.conv(x).to(norm.weight.dtype)
        y: Tensor = down(F.gelu(up(layer_norm(z, norm.weight, norm.bias, norm.eps))))
        return y
