"""The kernels of the depthwise convolutions, 2-D and 1-D, on channels-last tensors: bias, activation and gate fused.

    out[b, y, x, c] = act(bias[c] + sum_ij weight[c, 0, i, j] * in[b, y + i - top, x + j - left, c]) * gate[b, y, x, c]

Stride 1, zero padding. Shapes: B batch, H height, W width, C channels, I taps down, J taps across; a sequence is an
image one row high. The public functions are in `depthwise_conv2d.py` and `depthwise_conv1d.py`.

A program of the forward kernel owns a strip of columns (of several images when they are narrow), one or two rows high:
each input row is read once for both output rows. The loop over input rows stays a loop and only the taps within a row
are unrolled: unrolling both needs every register there is and spills. The weight gradient reduces over positions in
two passes, per split and then over splits, without atomics, so that it is deterministic.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from mixnas.kernels import configs, depthwise_banded
from mixnas.kernels.dispatch import cdiv, launch, tl, triton
from mixnas.kernels.epilogue import activate, epilogue_backward
from mixnas.kernels.fast_math import widen
from mixnas.kernels.tools.aot import Example


@triton.jit(do_not_specialize=["columns"])
def depthwise_forward_kernel(
    x_ptr,  # (B, H, W, C)
    weight_ptr,  # (I*J, C)
    bias_ptr,  # (C,) or None
    gate_ptr,  # (B, H, W, C) or None
    out_ptr,  # (B, H, W, C)
    pre_ptr,  # (B, H, W, C) or None: what the activation is applied to, for the backward
    columns,  # B*W
    height,
    width,
    channels,
    FIRST: tl.constexpr,  # the first tap that is used
    PITCH: tl.constexpr,  # taps from one row of the kernel to the next
    DOWN: tl.constexpr,  # taps down, of those that are used
    ACROSS: tl.constexpr,  # taps across
    TOP: tl.constexpr,  # rows of padding above
    LEFT: tl.constexpr,  # columns of padding on the left
    FLIP: tl.constexpr,  # read the taps backwards: the gradient of the input
    ACTIVATION: tl.constexpr,
    INNER: tl.constexpr,  # taps of a row that are unrolled
    EVEN_C: tl.constexpr,  # channels % BLOCK_C == 0
    ROWS: tl.constexpr,  # 1 or 2
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    STEP: tl.constexpr = -1 if FLIP else 1
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
    column_ok = (column < columns)[:, None]
    first = (b.to(tl.int64) * height + y0) * width + x0
    # Only rows inside the image: of a kernel larger than the map most are not.
    low = tl.maximum(TOP - y0, 0)
    high = tl.minimum(ROWS + DOWN - 1, height + TOP - y0)
    in_ptrs = x_ptr + (first + (low - TOP) * width - LEFT)[:, None] * channels + c
    tap_ptrs = weight_ptr + (FIRST + STEP * PITCH * low) * channels + c
    col = tl.where(column_ok, (x0 - LEFT)[:, None], -ACROSS - INNER)
    acc0 = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)
    for row in range(low, high):
        for j0 in range(0, ACROSS, INNER):
            for inner in tl.static_range(INNER):
                j = j0 + inner
                ok = (col + j >= 0) & (col + j < width)
                if not EVEN_C:
                    ok = ok & c_ok
                value = widen(tl.load(in_ptrs + j * channels, mask=ok, other=0.0))
                tap_ok = c_ok & (zero_c + row < DOWN)
                if ACROSS % INNER != 0:
                    tap_ok = tap_ok & (zero_c + j < ACROSS)
                tap = tl.load(tap_ptrs + STEP * j * channels, mask=tap_ok, other=0.0).to(tl.float32)
                acc0 += value * tap
                if ROWS == 2:
                    tap_ok = c_ok & (zero_c + row > 0)
                    if ACROSS % INNER != 0:
                        tap_ok = tap_ok & (zero_c + j < ACROSS)
                    tap = tl.load(tap_ptrs + STEP * (j - PITCH) * channels, mask=tap_ok, other=0.0).to(tl.float32)
                    acc1 += value * tap
        in_ptrs += width * channels
        tap_ptrs += STEP * PITCH * channels
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


@triton.jit(do_not_specialize=["strips", "strips_each"])
def depthwise_weight_kernel(
    grad_ptr,  # (B, H, W, C)
    x_ptr,  # (B, H, W, C)
    partial_ptr,  # (splits, ROWS, (I + ROWS - 1)*J + 1, C) float32; the last is the bias's
    strips,  # B * cdiv(H, ROWS)
    strips_each,  # that a program goes through
    height,
    width,
    channels,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    ROWS: tl.constexpr,  # rows of the gradient in a strip, 1 or 2: what is read of x serves as many
    UNROLL: tl.constexpr,
    BLOCK_K: tl.constexpr,  # offsets between a strip and a row of x, times taps across
    BLOCK_C: tl.constexpr,
):
    OFFSETS: tl.constexpr = (DOWN + ROWS - 1) * ACROSS
    pid = tl.program_id(0)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_k = tl.cdiv(OFFSETS + 1, BLOCK_K)
    c = ((pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    offset = (((pid // blocks_c) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    split = pid // (blocks_c * blocks_k)
    c_ok = c < channels
    # The offset after the last multiplies by one: its sum is the bias's gradient.
    other = tl.where(offset + c * 0 == OFFSETS, 1.0, 0.0).to(x_ptr.dtype.element_ty)
    i = offset // ACROSS - TOP
    j = offset % ACROSS - LEFT
    pairs = tl.cdiv(height, ROWS)
    acc0 = tl.zeros([BLOCK_K, BLOCK_C], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_K, BLOCK_C], dtype=tl.float32)
    for step in range(strips_each):
        strip = split * strips_each + step
        y = (strip % pairs) * ROWS
        start = ((strip // pairs).to(tl.int64) * height + y) * width * channels
        grad_ptrs = grad_ptr + start + c
        x_ptrs = x_ptr + start + (i * width + j) * channels + c
        here = c_ok & (c * 0 + strip < strips)
        row_ok = (offset < OFFSETS) & here & ((i + y).to(tl.uint32, bitcast=True) < (i * 0 + height).to(tl.uint32))
        for x0 in range(0, width, UNROLL):
            for inner in tl.static_range(UNROLL):
                column = x0 + inner
                ok = here & (c * 0 + column < width)
                inside = row_ok & ((j + column).to(tl.uint32, bitcast=True) < (j * 0 + width).to(tl.uint32))
                value = widen(tl.load(x_ptrs, mask=inside, other=other))
                acc0 += widen(tl.load(grad_ptrs, mask=ok, other=0.0)) * value
                if ROWS == 2:
                    below = ok & (c * 0 + (y + 1) < height)
                    acc1 += widen(tl.load(grad_ptrs + width * channels, mask=below, other=0.0)) * value
                grad_ptrs += channels
                x_ptrs += channels
    target = partial_ptr + (split * ROWS * (OFFSETS + 1) + offset).to(tl.int64) * channels + c
    stored = (offset <= OFFSETS) & c_ok
    tl.store(target, acc0, mask=stored)
    if ROWS == 2:
        tl.store(target + (OFFSETS + 1) * channels, acc1, mask=stored)


def taps_of(weight_C1IJ: torch.Tensor) -> torch.Tensor:
    """Return the weight as (I*J, C), contiguous: free when it is laid out so in memory, else a small copy.

    A copy is in float32, whatever the weight is in: it saves the kernel a conversion of each tap for each position.
    """
    taps = weight_C1IJ.permute(2, 3, 1, 0).flatten(0, 2)
    if taps.is_contiguous():
        return taps
    return taps.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def laid_out(weight_C1IJ: torch.Tensor) -> torch.Tensor:
    """Return the weight with the memory order that the kernels read, so that `taps_of` copies nothing."""
    return weight_C1IJ.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def reached(size: int, taps: int, before: int) -> tuple[int, int]:
    """Return the first and the end of the taps that fall inside a dimension for at least one of its positions.

    Args:
        size: Positions along the dimension.
        taps: Of the kernel along it.
        before: Padding before the first position.
    """
    first = max(0, before - size + 1)
    return first, max(min(taps, before + size), first)


def cropped(
    shape: Sequence[int], geometry: tuple[int, int, int, int]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the first tap that is used, the number of taps and the padding, down and across (see `reached`)."""
    down, across, top, left = geometry
    i0, i1 = reached(shape[1], down, top)
    j0, j1 = reached(shape[2], across, left)
    return (i0, i1 - i0, top - i0), (j0, j1 - j0, left - j0)


def convolve(
    x: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    activation: str,
    geometry: tuple[int, int, int, int],
    keep_pre: bool = False,
    flip: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the forward kernel; return the output and what the activation was applied to (None unless kept).

    Args:
        x: (B, H, W, C), contiguous, as are the other operands.
        taps: (I*J, C).
        bias: (C,).
        gate: (B, H, W, C).
        activation: See `epilogue.ACTIVATIONS`.
        geometry: (I, J, top, left).
        keep_pre: Return what the activation is applied to.
        flip: Run the taps backwards: the gradient of the input of the convolution with this geometry.
    """
    batch, height, width, channels = x.shape
    pitch = geometry[1]
    (i0, down, top), (j0, across, left) = used = cropped(x.shape, geometry)
    if depthwise_banded.worth_it(x, down, across):
        return depthwise_banded.convolve(x, taps, bias, gate, activation, used, pitch, keep_pre, flip)
    out = torch.empty_like(x)
    pre = torch.empty_like(x) if keep_pre else None
    features = {"taps_down": down, "taps_across": across, "channels": channels, "positions": batch * height * width}
    config = configs.pick("depthwise_forward", x, **features)
    blocks = cdiv(channels, config["BLOCK_C"]) * cdiv(height, config["ROWS"]) * cdiv(batch * width, config["BLOCK_W"])
    operands = (x, taps, bias, gate, out, pre, batch * width, height, width, channels)
    constants = {
        "FIRST": (i0 + down - 1) * pitch + j0 + across - 1 if flip else i0 * pitch + j0,
        "PITCH": pitch,
        "DOWN": down,
        "ACROSS": across,
        "TOP": down - 1 - top if flip else top,
        "LEFT": across - 1 - left if flip else left,
        "FLIP": flip,
        "ACTIVATION": activation,
        # More than 9 taps in a row are unrolled in equal parts; those past the last are zeros.
        "INNER": across if across <= 9 else min((9, 8, 7), key=lambda part: cdiv(across, part) * part),
        "EVEN_C": channels % config["BLOCK_C"] == 0,
    }
    launch(depthwise_forward_kernel, (blocks,), *operands, **constants, **config)
    return out, pre


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    activation: str,
    top: int,
    left: int,
    keep_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    gate = None if gate is None else gate.contiguous()
    geometry = (*weight.shape[2:], top, left)
    out, pre = convolve(x.contiguous(), taps_of(weight), bias, gate, activation, geometry, keep_pre)
    return out, x.new_empty(0) if pre is None else pre


_operator = torch.library.custom_op("mixnas::depthwise_conv", _forward, mutates_args=())


@_operator.register_fake
def _(x, weight, bias, gate, activation, top, left, keep_pre):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out) if keep_pre else x.new_empty(0)


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, geometry: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the weight (C, 1, I, J) and of the bias (C,), in float32."""
    (i0, down, _), (j0, across, _) = used = cropped(x.shape, geometry)
    if depthwise_banded.worth_it(x, down, across, gradient=True):
        taps, bias = depthwise_banded.weight_gradient(grad, x, used), grad.sum((0, 1, 2), dtype=torch.float32)
    else:
        taps, bias = _tap_by_tap(grad, x, used)
    gradient = taps.unsqueeze(1)
    if (down, across) != geometry[:2]:  # taps that never meet the map
        after = (geometry[1] - j0 - across, geometry[0] - i0 - down)
        gradient = F.pad(gradient, (j0, after[0], i0, after[1]))
    return gradient, bias


def _tap_by_tap(
    grad: torch.Tensor, x: torch.Tensor, used: tuple[tuple[int, int, int], tuple[int, int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the taps that are used, (C, down, across), and of the bias."""
    (batch, height, width, channels), ((_, down, top), (_, across, left)) = x.shape, used
    positions, rows = batch * height * width, 1 if height == 1 else 2
    features = {"taps": down * across, "channels": channels, "positions": positions}
    config = dict(configs.pick("depthwise_weight", x, **features))
    strips, offsets = batch * cdiv(height, rows), (down + rows - 1) * across
    each = cdiv(config.pop("STEPS") * config["UNROLL"], width)
    splits = cdiv(strips, each)
    sums = torch.empty(splits, rows, offsets + 1, channels, dtype=torch.float32, device=x.device)
    operands = (grad, x, sums, strips, each, height, width, channels)
    grid = (cdiv(channels, config["BLOCK_C"]) * cdiv(offsets + 1, config["BLOCK_K"]) * splits,)
    shape = {"DOWN": down, "ACROSS": across, "TOP": top, "LEFT": left, "ROWS": rows}
    launch(depthwise_weight_kernel, grid, *operands, **shape, **config)
    total = sums.sum(0)
    by_row = total[:, :-1].view(rows, down + rows - 1, across, channels)
    taps = by_row[0, :down] if rows == 1 else by_row[0, :down] + by_row[1, 1:]  # a row below meets x one row earlier
    return taps.permute(2, 0, 1), total[:, -1].sum(0)


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    pre: torch.Tensor,
    activation: str,
    top: int,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, taps, geometry = x.contiguous(), taps_of(weight), (*weight.shape[2:], top, left)
    gate = None if gate is None else gate.contiguous()
    if pre.shape != x.shape and (gate is not None or activation != "none"):  # the forward was told not to keep it
        pre = convolve(x, taps, bias, None, "none", geometry)[0]
    grad_pre, grad_gate = epilogue_backward(grad.contiguous(), pre, gate, activation)
    grad_x, _ = convolve(grad_pre, taps, None, None, "none", geometry, flip=True)
    grad_weight, grad_bias = weight_gradient(grad_pre, x, geometry)
    return (
        grad_x,
        grad_weight.to(weight.dtype).contiguous(),
        x.new_empty(0) if bias is None else grad_bias.to(bias.dtype, copy=True),
        x.new_empty(0) if grad_gate is None else grad_gate,
    )


_backward_operator = torch.library.custom_op("mixnas::depthwise_conv_backward", _backward, mutates_args=())


@_backward_operator.register_fake
def _(grad, x, weight, bias, gate, pre, activation, top, left):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(weight, memory_format=contiguous),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
        x.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=contiguous),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, gate, ctx.activation, ctx.top, ctx.left, _ = inputs
    ctx.save_for_backward(x, weight, bias, gate, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    x, weight, bias, gate, pre = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_gate = _backward_operator(
        grad, x, weight, bias, gate, pre, ctx.activation, ctx.top, ctx.left
    )
    bias_and_gate = (None if bias is None else grad_bias, None if gate is None else grad_gate)
    return grad_x, grad_weight, *bias_and_gate, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_setup_context)


def depthwise_conv(
    x_BHWC: torch.Tensor,
    weight_C1IJ: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    activation: str,
    top: int,
    left: int,
) -> torch.Tensor:
    """Run the operator on Triton: stride 1, output of the input's size, `top` rows and `left` columns of padding."""
    operands = [tensor for tensor in (x_BHWC, weight_C1IJ, bias, gate) if tensor is not None]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
    keep_pre = needs_grad and (gate is not None or activation != "none")
    return _operator(x_BHWC, weight_C1IJ, bias, gate, activation, top, left, keep_pre)[0]


def valid_taps(size: int, taps: int, before: int) -> int:
    """Count the (position, tap) pairs along one dimension that fall inside it: what a convolution must compute."""
    return sum(min(size - 1, i - before + taps - 1) - max(0, i - before) + 1 for i in range(size))


SMALL = {"positions": 8192}


def _example(
    kernel: str, bounds: dict[str, int], dtype: torch.dtype
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Return the size of maps and the taps: in 16 bits of a call that is not done by products (`depthwise_banded`)."""
    channels = bounds.get("channels", 256)
    if kernel == "depthwise_forward":
        across = bounds.get("taps_across", 31)
        down = bounds.get("taps_down", across)
    else:
        down = across = int(bounds.get("taps", 31 * 31) ** 0.5)
    batch, side = (1, min(56, math.isqrt(bounds["positions"]))) if "positions" in bounds else (32, 56)
    if down == 1:
        return (batch, 1, side * side, channels), (down, across)
    if dtype != torch.float32 and across > 5:
        if kernel == "depthwise_weight":
            batch, channels, side = 1, min(channels, 64), 56 if across <= 9 else 14
        elif "positions" in bounds:
            down = across = 7
        elif across <= 9:
            down = across = 5
        else:
            batch, channels, down, across = 2, 16, 13, 13
    return (batch, side, side, channels), (down, across)


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        size, (down, across) = _example(kernel, bounds, dtype)
        channels, (top, left) = size[-1], (down // 2, across // 2)
        geometry = (down, across, top, left)
        x = torch.empty(size, dtype=dtype, device="meta")
        taps = torch.empty(down * across, channels, device="meta")
        call: Callable[[], object]
        if kernel == "depthwise_forward":
            call = partial(convolve, x, taps, taps[0], x, "silu", geometry, keep_pre=True)
            moved = 4 * x.numel() + taps.numel()
        else:
            call = partial(weight_gradient, x, x, geometry)
            moved = 2 * x.numel() + taps.numel()
        yield Example(
            label=f"{name} {'x'.join(map(str, size))} k{down}x{across}",
            call=call,
            bytes=moved * x.element_size(),
            operations=2 * size[0] * channels * valid_taps(size[1], down, top) * valid_taps(size[2], across, left),
        )
        if kernel == "depthwise_forward":
            yield Example(
                label=f"{name} {'x'.join(map(str, size))} k{down}x{across} plain",
                call=partial(convolve, x, taps, taps[0], None, "none", geometry),
                bytes=(2 * x.numel() + taps.numel()) * x.element_size(),
                operations=2 * size[0] * channels * valid_taps(size[1], down, top) * valid_taps(size[2], across, left),
                timed=False,
            )
