"""A network as ONNX Runtime wants static whole numbers: every product between a quantizing and a dequantizing pair.

`w8a8_static` deployed is `round, clamp, product, scale, add` in torch. Written so, ONNX Runtime runs nine operations a
layer. The form that it fuses into two is QuantizeLinear, DequantizeLinear, and Gemm with weights and bias behind a
DequantizeLinear (QDQ), here with our own scales. `with_qdq` puts layers that say so in the place of the stored ones,
for the graph alone. They compute the same, to the last bit.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.search_space.operators.quantization.affine import dequantize, quantize
from mixnas.search_space.operators.quantization.integer import W8A8Static
from mixnas.search_space.operators.quantization.projected import Stored


@torch.library.custom_op("mixnas::qdq_linear", mutates_args=())
def qdq_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """A linear layer of what quantized inputs and weights stand for.

    Args:
        x: (M, K) float32.
        scale: Of the inputs, a scalar.
        zero_point: Of the inputs, int32, between 0 and 255.
        weight: (N, K) int8.
        weight_scale: (N,).
        bias: (N,), or None.

    Returns:
        (M, N) float32.
    """
    inputs = dequantize(quantize(x, scale, zero_point, 0, 255), scale, zero_point)
    return F.linear(inputs, dequantize(weight, weight_scale.unsqueeze(1)), bias)


@qdq_linear.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class _QDQ(nn.Module):
    """A stored layer by that operation, on the same tensors under the same names."""

    def __init__(self, layer: Stored) -> None:
        super().__init__()
        self._layer = (layer,)  # no submodule: names stay as they are
        for name, tensor in layer.named_buffers(recurse=False):
            self.register_buffer(name, tensor)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """See `Stored`."""
        (layer,) = self._layer
        rows = layer.rows(x).float()
        ranges = self.input_scale, self.input_zero_point
        y = torch.ops.mixnas.qdq_linear(rows, *ranges, self.weight, self.scale, self.bias)
        return layer.shaped(y.to(x.dtype), x)


def with_qdq(module: nn.Module) -> nn.Module:
    """A module to be traced for ONNX: a copy where it has layers under `w8a8_static`, else itself.

    Args:
        module: Deployed.
    """
    if not any(_is_static(layer) for layer in module.modules()):
        return module
    module = copy.deepcopy(module)
    for path, layer in list(module.named_modules()):
        if _is_static(layer):
            if not path:
                return _QDQ(layer)  # type: ignore[arg-type]
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, _QDQ(layer))  # type: ignore[arg-type]
    return module


def _is_static(layer: nn.Module) -> bool:
    return isinstance(layer, Stored) and isinstance(layer.policy, W8A8Static)
