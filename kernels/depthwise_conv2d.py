"""Depthwise convolution 2-D on channels-last images, with bias, activation and gate fused.

    out[b, y, x, c] = act(bias[c] + sum_ij weight[c, 0, i, j] * in[b, y + i - K/2, x + j - K/2, c]) * gate[b, y, x, c]

stride 1, zero padding, odd K. Shapes: B batch, H height, W width, C channels, K kernel size.

A program of the forward kernel owns a strip of columns (of several images when they are narrow), two rows high: each
input row is read once for both output rows. The loop over input rows stays a loop and only the taps within a row are
unrolled: unrolling both needs every register there is and spills. The weight gradient reduces over positions in two
passes, per split and then over splits, without atomics, so that it is deterministic.
"""

import functools
import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from mixnas.kernels import configs
from mixnas.kernels.aot import Example
from mixnas.kernels.dispatch import cdiv, choose, launch, tl, triton
from mixnas.kernels.epilogue import (
    ACTIVATIONS,
    activate,
    activation_function,
    epilogue_backward,
    epilogue_reference,
)

MAX_KERNEL_SIZE = 31


@triton.jit
def depthwise_conv2d_forward_kernel(
    x_ptr,  # (B, H, W, C)
    weight_ptr,  # (K*K, C)
    bias_ptr,  # (C,) or None
    gate_ptr,  # (B, H, W, C) or None
    out_ptr,  # (B, H, W, C)
    pre_ptr,  # (B, H, W, C) or None: what the activation is applied to, for the backward
    batch,
    height,
    width,
    channels,
    K: tl.constexpr,
    FLIP: tl.constexpr,  # read the taps backwards: the gradient of the input
    ACTIVATION: tl.constexpr,
    INNER: tl.constexpr,  # taps of a row that are unrolled
    EVEN_C: tl.constexpr,  # channels % BLOCK_C == 0
    ROWS: tl.constexpr,  # 1 or 2
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    STEP: tl.constexpr = -1 if FLIP else 1
    FIRST: tl.constexpr = K * K - 1 if FLIP else 0
    pid = tl.program_id(0)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_h = tl.cdiv(height, ROWS)
    c = ((pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    c_ok = c < channels
    zero_c = c * 0
    y0 = ((pid // blocks_c) % blocks_h) * ROWS
    column = (pid // (blocks_c * blocks_h)) * BLOCK_W + tl.arange(0, BLOCK_W)  # over (B, W)
    b = column // width
    x0 = column % width
    column_ok = (column < batch * width)[:, None]
    first = (b.to(tl.int64) * height + y0) * width + x0
    in_ptrs = x_ptr + (first - PAD * width - PAD)[:, None] * channels + c
    tap_ptrs = weight_ptr + FIRST * channels + c
    left = tl.where(column_ok, (x0 - PAD)[:, None], -K - INNER)
    acc0 = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)
    for row in range(ROWS + K - 1):
        y = y0 + row - PAD
        # A row outside the image puts every column out of range.
        col = tl.where((left * 0 + y >= 0) & (left * 0 + y < height), left, -K - INNER)
        for j0 in range(0, K, INNER):
            for inner in tl.static_range(INNER):
                j = j0 + inner
                ok = (col + j >= 0) & (col + j < width)
                if not EVEN_C:
                    ok = ok & c_ok
                value = tl.load(in_ptrs + j * channels, mask=ok, other=0.0).to(tl.float32)
                tap_ok = c_ok & (zero_c + row < K)
                if K % INNER != 0:
                    tap_ok = tap_ok & (zero_c + j < K)
                tap = tl.load(tap_ptrs + STEP * j * channels, mask=tap_ok, other=0.0).to(tl.float32)
                acc0 += value * tap
                if ROWS == 2:
                    tap_ok = c_ok & (zero_c + row > 0)
                    if K % INNER != 0:
                        tap_ok = tap_ok & (zero_c + j < K)
                    tap = tl.load(tap_ptrs + STEP * (j - K) * channels, mask=tap_ok, other=0.0).to(tl.float32)
                    acc1 += value * tap
        in_ptrs += width * channels
        tap_ptrs += STEP * K * channels
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
        acc0 += bias
        acc1 += bias
    offsets = first[:, None] * channels + c
    ok = column_ok & c_ok
    if pre_ptr is not None:
        tl.store(pre_ptr + offsets, acc0.to(pre_ptr.dtype.element_ty), mask=ok)
    acc0 = activate(acc0, ACTIVATION)
    if gate_ptr is not None:
        acc0 *= tl.load(gate_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, acc0.to(out_ptr.dtype.element_ty), mask=ok)
    if ROWS == 2:
        offsets += width * channels
        ok = ok & (zero_c + (y0 + 1) < height)
        if pre_ptr is not None:
            tl.store(pre_ptr + offsets, acc1.to(pre_ptr.dtype.element_ty), mask=ok)
        acc1 = activate(acc1, ACTIVATION)
        if gate_ptr is not None:
            acc1 *= tl.load(gate_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, acc1.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def depthwise_conv2d_weight_kernel(
    grad_ptr,  # (B, H, W, C)
    x_ptr,  # (B, H, W, C)
    partial_ptr,  # (splits, K*K + 1, C) float32; the last is the bias's
    positions,  # B*H*W
    height,
    width,
    channels,
    K: tl.constexpr,
    STEPS: tl.constexpr,  # a program goes through STEPS * UNROLL positions
    UNROLL: tl.constexpr,
    BLOCK_K: tl.constexpr,  # taps
    BLOCK_C: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    pid = tl.program_id(0)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_k = tl.cdiv(K * K, BLOCK_K)
    c = ((pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    tap = (((pid // blocks_c) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    split = pid // (blocks_c * blocks_k)
    c_ok = c < channels
    ok = (tap < K * K) & c_ok
    # The tap after the last multiplies by one: its sum is the bias's gradient. K*K is odd, so a block has room for it.
    other = tl.where(tap + c * 0 == K * K, 1.0, 0.0).to(x_ptr.dtype.element_ty)
    i = tap // K - PAD
    j = tap % K - PAD
    position = split * (STEPS * UNROLL)
    x = position % width
    y = (position // width) % height
    start = position.to(tl.int64) * channels
    grad_ptrs = grad_ptr + start + c
    x_ptrs = x_ptr + start + (i * width + j) * channels + c
    acc = tl.zeros([BLOCK_K, BLOCK_C], dtype=tl.float32)
    for _ in range(STEPS):
        for _ in tl.static_range(UNROLL):
            grad = tl.load(grad_ptrs, mask=c_ok & (c * 0 + position < positions), other=0.0).to(tl.float32)
            inside = (i + y >= 0) & (i + y < height) & (j + x >= 0) & (j + x < width) & (i * 0 + position < positions)
            acc += grad * tl.load(x_ptrs, mask=ok & inside, other=other).to(tl.float32)
            grad_ptrs += channels
            x_ptrs += channels
            position += 1
            x += 1
            y = tl.where(x == width, y + 1, y)
            y = tl.where(y == height, 0, y)
            x = tl.where(x == width, 0, x)
    target = partial_ptr + (split * (K * K + 1) + tap).to(tl.int64) * channels + c
    tl.store(target, acc, mask=(tap <= K * K) & c_ok)


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


def _taps(weight_C1KK: torch.Tensor) -> torch.Tensor:
    """Return the weight as (K*K, C), contiguous: free when it is laid out so in memory, else a small copy."""
    channels, _, size, _ = weight_C1KK.shape
    return weight_C1KK.permute(2, 3, 1, 0).reshape(size * size, channels).contiguous()


def _convolve(
    x: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    activation: str,
    keep_pre: bool,
    flip: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch, height, width, channels = x.shape
    size = int(taps.shape[0] ** 0.5 + 0.5)
    out = torch.empty_like(x)
    pre = torch.empty_like(x) if keep_pre else None
    config = dict(configs.pick("depthwise_conv2d_forward", x, kernel_size=size, channels=channels))
    blocks = cdiv(channels, config["BLOCK_C"]) * cdiv(height, config["ROWS"]) * cdiv(batch * width, config["BLOCK_W"])
    config["EVEN_C"] = channels % config["BLOCK_C"] == 0
    operands = (x, taps, bias, gate, out, pre, batch, height, width, channels)
    constants = {"K": size, "INNER": size if size <= 9 else 8, "FLIP": flip, "ACTIVATION": activation}
    launch(depthwise_conv2d_forward_kernel, (blocks,), *operands, **constants, **config)
    return out, pre


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    activation: str,
    keep_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    gate = None if gate is None else gate.contiguous()
    out, pre = _convolve(x.contiguous(), _taps(weight), bias, gate, activation, keep_pre, False)
    return out, x.new_empty(0) if pre is None else pre


_operator = torch.library.custom_op("mixnas::depthwise_conv2d", _forward, mutates_args=())


@_operator.register_fake
def _(x, weight, bias, gate, activation, keep_pre):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out) if keep_pre else x.new_empty(0)


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the weight and of the bias, in float32."""
    batch, height, width, channels = x.shape
    positions = batch * height * width
    config = configs.pick("depthwise_conv2d_weight", x, kernel_size=size, channels=channels)
    splits = cdiv(positions, config["STEPS"] * config["UNROLL"])
    sums = torch.empty(splits, size * size + 1, channels, dtype=torch.float32, device=x.device)
    operands = (grad, x, sums, positions, height, width, channels)
    grid = (cdiv(channels, config["BLOCK_C"]) * cdiv(size * size, config["BLOCK_K"]) * splits,)
    launch(depthwise_conv2d_weight_kernel, grid, *operands, K=size, **config)
    total = sums.sum(0)
    return total[:-1].t().reshape(channels, 1, size, size), total[-1]


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    pre: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, taps = x.contiguous(), _taps(weight)
    gate = None if gate is None else gate.contiguous()
    if pre.shape != x.shape and (gate is not None or activation != "none"):  # the forward was told not to keep it
        pre = _convolve(x, taps, bias, None, "none", False, False)[0]
    grad_pre, grad_gate = epilogue_backward(grad.contiguous(), pre, gate, activation)
    grad_x, _ = _convolve(grad_pre, taps, None, None, "none", False, True)
    grad_weight, grad_bias = _weight_gradient(grad_pre, x, weight.shape[-1])
    return (
        grad_x,
        grad_weight.to(weight.dtype),
        x.new_empty(0) if bias is None else grad_bias.to(bias.dtype, copy=True),
        x.new_empty(0) if grad_gate is None else grad_gate,
    )


_backward_operator = torch.library.custom_op("mixnas::depthwise_conv2d_backward", _backward, mutates_args=())


@_backward_operator.register_fake
def _(grad, x, weight, bias, gate, pre, activation):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(weight, memory_format=contiguous),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
        x.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=contiguous),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, gate, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weight, bias, gate, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    x, weight, bias, gate, pre = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_gate = _backward_operator(grad, x, weight, bias, gate, pre, ctx.activation)
    bias_and_gate = (None if bias is None else grad_bias, None if gate is None else grad_gate)
    return grad_x, grad_weight, *bias_and_gate, None, None


_operator.register_autograd(_differentiate, setup_context=_setup_context)


def _spans(size: int, largest: int) -> list[tuple[int, int]]:
    """Cut range(size) into the fewest spans no longer than `largest`, as even as can be."""
    parts = cdiv(size, largest)
    edges = [part * size // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


@functools.cache
def _tap_of_pair(height: int, width: int, size: int) -> torch.Tensor:
    """Return (H*W * H*W,): which tap joins an output position to an input position; `size**2` where none does."""
    y, x = torch.arange(height), torch.arange(width)
    i = y[None, :] - y[:, None] + size // 2
    j = x[None, :] - x[:, None] + size // 2
    i, j = i[:, None, :, None], j[None, :, None, :]
    return torch.where((i >= 0) & (i < size) & (j >= 0) & (j < size), i * size + j, size * size).reshape(-1)


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
        sums = sums.index_add(1, _tap_of_pair(height, width, size).to(sums.device), pairs.reshape(channels, -1))
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
    """Convolve with ATen: the permuted view is torch's channels_last format and copies nothing."""
    z = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight_C1KK, bias, padding="same", groups=weight_C1KK.shape[0])
    return z.permute(0, 2, 3, 1)


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
        operands = [tensor for tensor in (x_BHWC, weight_C1KK, bias, gate) if tensor is not None]
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
        keep_pre = needs_grad and (gate is not None or activation != "none")
        return _operator(x_BHWC, weight_C1KK, bias, gate, activation, keep_pre)[0]
    if backend == "reference":
        return depthwise_conv2d_reference(x_BHWC, weight_C1KK, bias, gate, activation)
    # Up to 3 taps oneDNN's own backward is fast.
    needs_grad = torch.is_grad_enabled() and (x_BHWC.requires_grad or weight_C1KK.requires_grad)
    if size > 3 and needs_grad and x_BHWC.device.type == "cpu":
        z = _CpuDepthwise.apply(x_BHWC, weight_C1KK, bias)
    else:
        z = _aten(x_BHWC, weight_C1KK, bias)
    z = activation_function(z, activation)
    return z if gate is None else z * gate


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    size, channels = bounds.get("kernel_size", MAX_KERNEL_SIZE), bounds.get("channels", 256)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x = torch.empty(32, 56, 56, channels, dtype=dtype, device="meta")
        taps = torch.empty(size * size, channels, dtype=dtype, device="meta")
        label = f"{name} 32x56x56x{channels} k{size}"
        if kernel == "depthwise_conv2d_forward":
            call = partial(_convolve, x, taps, taps[0], x, "silu", True, False)
            moved = 4 * x.numel() + taps.numel()
        else:
            call = partial(_weight_gradient, x, x, size)
            moved = 2 * x.numel() + taps.numel()
        operations = 2 * x.numel() * size * size
        yield Example(label=label, call=call, bytes=moved * x.element_size(), operations=operations)
