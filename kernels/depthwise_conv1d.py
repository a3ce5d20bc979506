"""Depthwise convolution 1-D on channels-last sequences, causal or centred, with bias, activation and gate fused.

On a GPU the kernels of `depthwise.py`, for which a sequence is an image one row high; on a CPU oneDNN's convolution.
"""

import torch
import torch.nn.functional as F

from mixnas.kernels.depthwise import depthwise_conv
from mixnas.kernels.dispatch import as_autocast, choose
from mixnas.kernels.epilogue import ACTIVATIONS, activation_function, epilogue_reference
from mixnas.kernels.work import counted


def _padding(size: int, causal: bool) -> int:
    """Return how many positions before its own a kernel reaches back."""
    return size - 1 if causal else size // 2


def depthwise_conv1d_reference(
    x_BLC: torch.Tensor,
    weight_C1K: torch.Tensor,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    activation: str = "none",
    causal: bool = True,
) -> torch.Tensor:
    """Compute the operator tap by tap from its definition, in the dtype given."""
    length, size = x_BLC.shape[1], weight_C1K.shape[-1]
    before = _padding(size, causal)
    padded = F.pad(x_BLC, (0, 0, before, size - 1 - before))
    z = torch.zeros_like(x_BLC)
    for k in range(size):
        z = z + padded[:, k : k + length] * weight_C1K[:, 0, k]
    return epilogue_reference(z if bias is None else z + bias, gate, activation)


def _aten(x_BLC: torch.Tensor, weight_C1K: torch.Tensor, bias: torch.Tensor | None, before: int) -> torch.Tensor:
    """Convolve with ATen, as an image one column wide: oneDNN's depthwise kernels are fast up to 3 taps across."""
    channels, _, size = weight_C1K.shape
    padded = F.pad(x_BLC, (0, 0, before, size - 1 - before))
    image = padded.unsqueeze(2).permute(0, 3, 1, 2)
    z = F.conv2d(image, weight_C1K.unsqueeze(-1), bias, groups=channels)
    return z.permute(0, 2, 3, 1).squeeze(2)


@counted(lambda x, weight, *_, **__: x.numel() * weight.shape[-1])
def depthwise_conv1d(
    x_BLC: torch.Tensor,
    weight_C1K: torch.Tensor,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    activation: str = "none",
    causal: bool = True,
) -> torch.Tensor:
    """Convolve each channel with its own kernel: act(conv(x) + bias) * gate, stride 1, zero padding.

    Args:
        x_BLC: (B, L, C).
        weight_C1K: (C, 1, K) as `nn.Conv1d(C, C, K, groups=C)` has it; the last tap is the newest position's.
        bias: (C,).
        gate: (B, L, C), multiplied elementwise after the activation.
        activation: "none", "relu", "silu", "gelu" (exact) or "sigmoid".
        causal: Position l sees l - K + 1 to l; otherwise l - K // 2 to l + K // 2, for odd K.

    Raises:
        ValueError: Shapes that do not fit, an even K without `causal`, or an unknown activation.
    """
    channels, size = x_BLC.shape[-1], weight_C1K.shape[-1]
    if x_BLC.dim() != 3 or tuple(weight_C1K.shape) != (channels, 1, size):
        raise ValueError(f"x {tuple(x_BLC.shape)} must be (B, L, C) and weight {tuple(weight_C1K.shape)} (C, 1, K)")
    if not causal and size % 2 == 0:
        raise ValueError(f"a kernel that is not causal must be odd, to have a centre; K is {size}")
    if gate is not None and gate.shape != x_BLC.shape:
        raise ValueError(f"gate {tuple(gate.shape)} must have the shape of x {tuple(x_BLC.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    backend, before = choose(x_BLC, weight_C1K, bias, gate), _padding(size, causal)
    if backend == "triton":
        # Taps and bias are read as they are and multiplied in float32.
        (x_BLC,), (gate,) = as_autocast(x_BLC), as_autocast(gate)
        gate_B1LC = None if gate is None else gate.unsqueeze(1)
        out = depthwise_conv(x_BLC.unsqueeze(1), weight_C1K.unsqueeze(2), bias, gate_B1LC, activation, 0, before)
        return out.squeeze(1)
    if backend == "reference":
        return depthwise_conv1d_reference(x_BLC, weight_C1K, bias, gate, activation, causal)
    z = activation_function(_aten(x_BLC, weight_C1K, bias, before), activation)
    return z if gate is None else z * gate
