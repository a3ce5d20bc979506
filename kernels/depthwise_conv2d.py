"""Depthwise convolution 2-D on channels-last images, with bias, activation and gate fused.

On a GPU the kernels of `depthwise.py`; on a CPU oneDNN's convolution, with our own backward where oneDNN's is slow.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

from mixnas.kernels.depthwise import depthwise_conv
from mixnas.kernels.dispatch import as_autocast, cdiv, choose, tracing
from mixnas.kernels.epilogue import ACTIVATIONS, activation_function, epilogue_reference
from mixnas.kernels.work import counted

MAX_KERNEL_SIZE = 31


def depthwise_conv2d_reference(
    x_BHWC: torch.Tensor,
    weight_C1KK: torch.Tensor,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """Compute the operator tap by tap from its definition, in the dtype given."""
    height, width = x_BHWC.shape[1:3]
    size = weight_C1KK.shape[-1]
    pad = size // 2
    padded = F.pad(x_BHWC, (0, 0, pad, pad, pad, pad))
    z = torch.zeros_like(x_BHWC)
    for i in range(size):
        for j in range(size):
            z = z + padded[:, i : i + height, j : j + width] * weight_C1KK[:, 0, i, j]
    return epilogue_reference(z if bias is None else z + bias, gate, activation)


def _spans(size: int, largest: int) -> list[tuple[int, int]]:
    """Cut range(size) into the fewest spans no longer than `largest`, as even as can be."""
    parts = cdiv(size, largest)
    edges = [part * size // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


def _tap_of_pair(height: int, width: int, size: int) -> torch.Tensor:
    """Return (H*W * H*W,): which tap joins an output position to an input position; `size**2` where none does."""
    y, x = torch.arange(height), torch.arange(width)
    i = y[None, :] - y[:, None] + size // 2
    j = x[None, :] - x[:, None] + size // 2
    i, j = i[:, None, :, None], j[None, :, None, :]
    return torch.where((i >= 0) & (i < size) & (j >= 0) & (j < size), i * size + j, size * size).reshape(-1)


@functools.lru_cache(maxsize=64)
def _kept_tap_of_pair(height: int, width: int, size: int) -> torch.Tensor:
    with torch.inference_mode(False):  # may be saved for a second derivative
        return _tap_of_pair(height, width, size)


def _cpu_weight_gradient(grad_BHWC: torch.Tensor, x_BHWC: torch.Tensor, size: int) -> torch.Tensor:
    """Return the weight's gradient (C, 1, K, K), in the form that is fastest on a CPU.

    oneDNN has a depthwise kernel for it only up to 3 taps wide, and falls back on dense 16x16 blocks of channels beyond
    (10 times slower at K = 7); and the gradient of a wide kernel is that of narrow ones on shifted inputs. Where
    the map is tiny, all pairs of positions in one batched matrix product are cheaper still.
    """
    batch, height, width, channels = x_BHWC.shape
    pad, area = size // 2, height * width
    if area <= 16 or (area <= 64 and size >= 9):
        pairs = torch.bmm(
            grad_BHWC.reshape(batch, area, channels).permute(2, 1, 0),
            x_BHWC.reshape(batch, area, channels).permute(2, 0, 1),
        )
        sums = grad_BHWC.new_zeros(channels, size * size + 1)
        tap = _tap_of_pair(height, width, size) if tracing() else _kept_tap_of_pair(height, width, size)
        sums = sums.index_add(1, tap, pairs.reshape(channels, -1))
        return sums[:, :-1].reshape(channels, 1, size, size)
    grad, columns = grad_BHWC.permute(0, 3, 1, 2), []
    for j0, j1 in _spans(size, 3):
        if j0 - pad >= width or j1 - 1 - pad <= -width:
            columns.append(grad.new_zeros(channels, 1, size, j1 - j0))
            continue
        shifted = F.pad(x_BHWC, (0, 0, pad - j0, j1 - 1 - pad))
        parts = []
        for i0, i1 in _spans(size, 7):
            shape = (channels, 1, i1 - i0, j1 - j0)
            if i0 - pad >= height or i1 - 1 - pad <= -height:
                parts.append(grad.new_zeros(shape))
                continue
            strip = F.pad(shifted, (0, 0, 0, 0, pad - i0, i1 - 1 - pad)).permute(0, 3, 1, 2)
            options = ([1, 1], [0, 0], [1, 1], False, [0, 0], channels, [False, True, False])
            parts.append(torch.ops.aten.convolution_backward(grad, strip, grad.new_empty(shape), None, *options)[1])
        columns.append(torch.cat(parts, 2))
    return torch.cat(columns, 3)


class _CpuDepthwise(torch.autograd.Function):
    """ATen's convolution with a backward that stays on its fast paths.

    The gradient of the input is taken as a forward convolution, with the taps reversed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x_BHWC, weight_C1KK, bias):
        return _aten(x_BHWC, weight_C1KK, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _aten(grad, weight.flip(-1, -2), None) if wants_x else None,
            _cpu_weight_gradient(grad, x, weight.shape[-1]) if wants_weight else None,
            grad.sum((0, 1, 2)) if ctx.with_bias and wants_bias else None,
        )


def _aten(x_BHWC: torch.Tensor, weight_C1KK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Convolve with ATen: the permuted view is torch's channels_last format and copies nothing.

    oneDNN's kernel for 13 taps in float32 is 2 to 3 times slower than its other one, which begins at 15: two rows and
    columns of nought cost less.
    """
    if weight_C1KK.shape[-1] == 13 and weight_C1KK.dtype == torch.float32 and not tracing():
        weight_C1KK = F.pad(weight_C1KK, (1, 1, 1, 1))
    z = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight_C1KK, bias, padding="same", groups=weight_C1KK.shape[0])
    return z.permute(0, 2, 3, 1)


@counted(lambda x, weight, *_, **__: x.numel() * weight.shape[-1] ** 2)
def depthwise_conv2d(
    x_BHWC: torch.Tensor,
    weight_C1KK: torch.Tensor,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """Convolve each channel with its own odd square kernel: act(conv(x) + bias) * gate, stride 1, zero padding.

    Args:
        x_BHWC: (B, H, W, C).
        weight_C1KK: (C, 1, K, K) as `nn.Conv2d(C, C, K, groups=C)` has it, K odd. On a GPU a weight whose memory is
            ordered (K, K, C) is read as it is, any other is copied into that order first.
        bias: (C,).
        gate: (B, H, W, C), multiplied elementwise after the activation.
        activation: "none", "relu", "silu", "gelu" (exact) or "sigmoid".

    Raises:
        ValueError: Shapes that do not fit, an even or oblong kernel, or an unknown activation.
    """
    channels, size = x_BHWC.shape[-1], weight_C1KK.shape[-1]
    if x_BHWC.dim() != 4 or tuple(weight_C1KK.shape) != (channels, 1, size, size) or size % 2 == 0:
        raise ValueError(
            f"x {tuple(x_BHWC.shape)} must be (B, H, W, C) and weight {tuple(weight_C1KK.shape)} (C, 1, K, K), K odd"
        )
    if gate is not None and gate.shape != x_BHWC.shape:
        raise ValueError(f"gate {tuple(gate.shape)} must have the shape of x {tuple(x_BHWC.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    backend = choose(x_BHWC, weight_C1KK, bias, gate)
    if backend == "triton" and size <= MAX_KERNEL_SIZE:
        # Taps and bias are read as they are and multiplied in float32.
        (x_BHWC,), (gate,) = as_autocast(x_BHWC), as_autocast(gate)
        return depthwise_conv(x_BHWC, weight_C1KK, bias, gate, activation, size // 2, size // 2)
    if backend == "reference":
        return depthwise_conv2d_reference(x_BHWC, weight_C1KK, bias, gate, activation)
    # Up to 3 taps oneDNN's own backward is fast.
    needs_grad = torch.is_grad_enabled() and (x_BHWC.requires_grad or weight_C1KK.requires_grad)
    # Under autocast the dtypes are ATen's to settle.
    if size > 3 and needs_grad and x_BHWC.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        z = _CpuDepthwise.apply(x_BHWC, weight_C1KK, bias)
    else:
        z = _aten(x_BHWC, weight_C1KK, bias)
    z = activation_function(z, activation)
    return z if gate is None else z * gate
