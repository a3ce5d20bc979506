"""A whole block in one kernel: depthwise convolution, norm, pointwise, activation, pointwise, and the skip around them.

    out = x * skip + W2 act(W1 norm(depthwise(x) + bias) + b1) + b2

In the spirit of the waterline analysis of On the Efficiency of Convolutional Neural Networks: operator by operator, a
small block is bound by the bytes of its intermediates; fused, x is read and out written once, and its operational
intensity is that of the whole block. Fits where a tile of positions holds all channels in registers: C up to 128 and K
up to 9. Elsewhere the same block runs operator by operator.

Shapes: B, H, W, C; K kernel size; E hidden width; M positions of a tile. The backward recomputes the intermediates and
runs operator by operator, so that nothing but the operands is kept.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from mixnas.kernels import configs, depthwise, depthwise_banded, dispatch
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference
from mixnas.kernels.dispatch import cdiv, choose, launch, next_power_of_2, tl, triton
from mixnas.kernels.epilogue import (
    ACTIVATIONS,
    activate,
    activation_function,
    epilogue_backward,
)
from mixnas.kernels.fast_math import widen
from mixnas.kernels.norm import backward as norm_backward
from mixnas.kernels.norm import forward as norm_forward
from mixnas.kernels.norm import layer_norm, rms_norm
from mixnas.kernels.tools.aot import Example
from mixnas.kernels.work import counted

MAX_CHANNELS = 128
MAX_KERNEL_SIZE = 9
ENOUGH_POSITIONS = 6400  # a hundred tiles of 64: with fewer most of a large GPU would wait for a few blocks
NORMS = ("layer", "rms")


@triton.jit(do_not_specialize=["positions"])
def fused_block_forward_kernel(
    x_ptr,  # (B, H, W, C)
    z_ptr,  # (B, H, W, C) or None: the convolution with its bias, where it was done before
    taps_ptr,  # (K*K, C)
    conv_bias_ptr,  # (C,)
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,) or None
    up_ptr,  # (E, C)
    up_bias_ptr,  # (E,)
    down_ptr,  # (C, E)
    down_bias_ptr,  # (C,)
    out_ptr,  # (B, H, W, C)
    positions,  # B*H*W
    height,
    width,
    channels,
    eps,
    E: tl.constexpr,
    K: tl.constexpr,
    CENTRE: tl.constexpr,
    SKIP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # products in float32: the interpreter has none in bfloat16
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    p = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)[None, :]
    c_ok = c < channels
    p_ok = (p < positions)[:, None]
    here = p.to(tl.int64)[:, None] * channels + c
    if z_ptr is not None:
        z = tl.load(z_ptr + here, mask=p_ok & c_ok, other=0.0).to(tl.float32)
    else:
        x0 = (p % width)[:, None] - PAD
        y0 = ((p // width) % height)[:, None] - PAD
        in_ptrs = x_ptr + here - (PAD * width + PAD) * channels
        tap_ptrs = taps_ptr + c
        z = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
        for i in range(K):
            row_ok = p_ok & (y0 + i >= 0) & (y0 + i < height)
            for j in tl.static_range(K):
                ok = row_ok & (x0 + j >= 0) & (x0 + j < width) & c_ok
                value = widen(tl.load(in_ptrs + j * channels, mask=ok, other=0.0))
                z += value * tl.load(tap_ptrs + j * channels, mask=c_ok, other=0.0).to(tl.float32)
            in_ptrs += width * channels
            tap_ptrs += K * channels
        z += tl.load(conv_bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    if CENTRE:
        z = tl.where(c_ok, z - tl.sum(z, axis=1, keep_dims=True) / channels, 0.0)
    z *= 1.0 / tl.sqrt(tl.sum(z * z, axis=1, keep_dims=True) / channels + eps)
    z *= tl.load(norm_weight_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    if norm_bias_ptr is not None:
        z += tl.load(norm_bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    normed = z.to(up_ptr.dtype.element_ty)
    if WIDEN:
        normed = normed.to(tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    c_rows = tl.arange(0, BLOCK_C)[:, None]
    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        e_ok = e < E
        up = tl.load(up_ptr + e[None, :] * channels + c_rows, mask=e_ok[None, :] & (c_rows < channels), other=0.0)
        if WIDEN:
            up = up.to(tl.float32)
        hidden = tl.dot(normed, up, input_precision=PRECISION)
        hidden += tl.load(up_bias_ptr + e, mask=e_ok, other=0.0).to(tl.float32)[None, :]
        hidden = activate(hidden, ACTIVATION).to(down_ptr.dtype.element_ty)
        # Columns past E meet rows of zeros.
        down = tl.load(down_ptr + c * E + e[:, None], mask=c_ok & e_ok[:, None], other=0.0)
        if WIDEN:
            hidden = hidden.to(tl.float32)
            down = down.to(tl.float32)
        out = tl.dot(hidden, down, out, input_precision=PRECISION)
    out += tl.load(down_bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    ok = p_ok & c_ok
    if SKIP:
        out += tl.load(x_ptr + here, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=ok)


def fused_conv_block_reference(
    x_BHWC: torch.Tensor,
    weight_C1KK: torch.Tensor,
    conv_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    up_EC: torch.Tensor,
    up_bias: torch.Tensor,
    down_CE: torch.Tensor,
    down_bias: torch.Tensor,
    norm: str = "layer",
    activation: str = "gelu",
    eps: float = 1e-5,
    skip: bool = True,
) -> torch.Tensor:
    """Compute the block from its definition, in the dtype given."""
    z = depthwise_conv2d_reference(x_BHWC, weight_C1KK, conv_bias)
    z = z - z.mean(-1, keepdim=True) if norm == "layer" else z
    z = z / (z.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight
    z = z if norm_bias is None else z + norm_bias
    out = activation_function(z @ up_EC.t() + up_bias, activation) @ down_CE.t() + down_bias
    return x_BHWC + out if skip else out


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    conv_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    centre: bool,
    activation: str,
    eps: float,
    skip: bool,
) -> torch.Tensor:
    x, up, down = x.contiguous(), up.contiguous(), down.contiguous()
    batch, height, width, channels = x.shape
    positions, out = batch * height * width, torch.empty_like(x)
    # Where products are the faster convolution, it is done before by theirs.
    size, z, taps = weight.shape[-1], None, depthwise.taps_of(weight)
    if depthwise_banded.worth_it(x, size, size):
        z, _ = depthwise.convolve(x, taps, conv_bias, None, "none", (size, size, size // 2, size // 2))
    inside = size * size if z is None else 0
    features = {"channels": channels, "itemsize": x.element_size(), "positions": positions, "taps": inside}
    config = configs.pick("fused_block_forward", x, **features)
    operands = (x, z, taps, conv_bias, norm_weight, norm_bias, up, up_bias, down, down_bias, out)
    constants = {
        "E": up.shape[0],
        "K": size,
        "CENTRE": centre,
        "SKIP": skip,
        "ACTIVATION": activation,
        # Three passes of the tensor cores' tf32 are as exact as float32; other types ignore it.
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
        "WIDEN": dispatch.INTERPRETING,
        "BLOCK_C": max(16, next_power_of_2(channels)),
    }
    grid = (cdiv(positions, config["BLOCK_M"]),)
    sizes = (positions, height, width, channels, eps)
    launch(fused_block_forward_kernel, grid, *operands, *sizes, **constants, **config)
    return out


_operator = torch.library.custom_op("mixnas::fused_conv_block", _forward, mutates_args=())


@_operator.register_fake
def _(x, weight, conv_bias, norm_weight, norm_bias, up, up_bias, down, down_bias, centre, activation, eps, skip):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    conv_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    centre: bool,
    activation: str,
    eps: float,
    skip: bool,
) -> list[torch.Tensor]:
    """Return the gradients in the order of the operands; empty for a norm without bias."""
    grad, x = grad.contiguous(), x.contiguous()
    channels, size = x.shape[-1], weight.shape[-1]
    geometry = (size, size, size // 2, size // 2)
    taps = depthwise.taps_of(weight)
    z, _ = depthwise.convolve(x, taps, conv_bias, None, "none", geometry)
    normed, _, mean, rstd = norm_forward(z, None, norm_weight, norm_bias, eps, centre)
    normed_NC, grad_NC = normed.view(-1, channels), grad.view(-1, channels)
    hidden = F.linear(normed_NC, up, up_bias)
    active = activation_function(hidden, activation)
    grad_hidden, _ = epilogue_backward(grad_NC @ down, hidden, None, activation)
    grad_normed = (grad_hidden @ up).view_as(x)
    grad_z, grad_norm_weight, grad_norm_bias = norm_backward(
        grad_normed, None, z, norm_weight, mean, rstd, norm_bias is not None, centre
    )
    grad_x, _ = depthwise.convolve(grad_z, taps, None, None, "none", geometry, flip=True)
    grad_weight, grad_conv_bias = depthwise.weight_gradient(grad_z, x, geometry)
    return [
        grad_x + grad if skip else grad_x,
        grad_weight.to(weight.dtype).contiguous(),
        grad_conv_bias.to(conv_bias.dtype, copy=True),
        grad_norm_weight,
        grad_norm_bias,
        grad_hidden.t() @ normed_NC,
        grad_hidden.sum(0),
        grad_NC.t() @ active,
        grad_NC.sum(0),
    ]


_backward_operator = torch.library.custom_op("mixnas::fused_conv_block_backward", _backward, mutates_args=())


@_backward_operator.register_fake
def _(grad, x, weight, conv_bias, norm_weight, norm_bias, up, up_bias, down, down_bias, centre, activation, eps, skip):
    contiguous = torch.contiguous_format
    operands = (x, weight, conv_bias, norm_weight, norm_bias, up, up_bias, down, down_bias)
    return [
        x.new_empty(0) if operand is None else torch.empty_like(operand, memory_format=contiguous)
        for operand in operands
    ]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _differentiate(ctx, grad):
    gradients = _backward_operator(grad, *ctx.saved_tensors, *ctx.options)
    wanted = (None if operand is None else g for operand, g in zip(ctx.saved_tensors, gradients, strict=True))
    return *wanted, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_setup_context)


def worth_one_kernel(x_BHWC: torch.Tensor) -> bool:
    """Whether a GPU has enough to do with one kernel for the block, or is sooner done operator by operator."""
    on_gpu = x_BHWC.is_cuda or dispatch.is_recording()  # the interpreter always takes the kernel: it is for tests
    return not on_gpu or x_BHWC.shape[:-1].numel() >= ENOUGH_POSITIONS


def _macs(x, weight, conv_bias, norm_weight, norm_bias, up, *_, **__) -> int:
    """The convolution and the two pointwise layers."""
    return x.numel() * (weight.shape[-1] ** 2 + 2 * up.shape[0])


@counted(_macs)
def fused_conv_block(
    x_BHWC: torch.Tensor,
    weight_C1KK: torch.Tensor,
    conv_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    up_EC: torch.Tensor,
    up_bias: torch.Tensor,
    down_CE: torch.Tensor,
    down_bias: torch.Tensor,
    norm: str = "layer",
    activation: str = "gelu",
    eps: float = 1e-5,
    skip: bool = True,
) -> torch.Tensor:
    """Run depthwise convolution, norm, pointwise, activation and pointwise, with the input added (a ConvNeXt block).

    Under autocast the products are in autocast's dtype; where the block is one kernel, the convolution's input too.

    Args:
        x_BHWC: (B, H, W, C).
        weight_C1KK: (C, 1, K, K), K odd.
        conv_bias: (C,).
        norm_weight: (C,).
        norm_bias: (C,); None for "rms".
        up_EC: (E, C), as `nn.Linear(C, E)` has it.
        up_bias: (E,).
        down_CE: (C, E).
        down_bias: (C,).
        norm: "layer" or "rms".
        activation: Between the pointwise layers: "none", "relu", "silu", "gelu" (exact) or "sigmoid".
        eps: Of the norm.
        skip: Add x to the result.

    Raises:
        ValueError: An unknown norm or activation, or shapes that do not fit.
    """
    channels, hidden = x_BHWC.shape[-1], up_EC.shape[0]
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r}: expected one of {', '.join(NORMS)}")
    if norm == "rms" and norm_bias is not None:
        raise ValueError("an RMS norm has no bias")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    if tuple(up_EC.shape) != (hidden, channels) or tuple(down_CE.shape) != (channels, hidden):
        raise ValueError(f"up {tuple(up_EC.shape)} must be (E, {channels}) and down {tuple(down_CE.shape)} its mirror")
    tensors = (weight_C1KK, conv_bias, norm_weight, norm_bias, up_EC, up_bias, down_CE, down_bias)
    backend = choose(x_BHWC, *tensors)
    size = weight_C1KK.shape[-1]
    fits = channels <= MAX_CHANNELS and size <= MAX_KERNEL_SIZE and size % 2
    if backend == "triton" and fits and worth_one_kernel(x_BHWC):
        x, *products = dispatch.as_autocast(x_BHWC, *tensors[4:])
        if all(product.dtype == x.dtype for product in products):
            skip_inside = skip and x.dtype == x_BHWC.dtype  # the skip keeps the digits that x came with
            out = _operator(x, *tensors[:4], *products, norm == "layer", activation, eps, skip_inside)
            return x_BHWC + out if skip and not skip_inside else out
    if backend == "reference":
        return fused_conv_block_reference(x_BHWC, *tensors, norm, activation, eps, skip)
    z = depthwise_conv2d(x_BHWC, weight_C1KK, conv_bias)
    z = layer_norm(z, norm_weight, norm_bias, eps) if norm == "layer" else rms_norm(z, norm_weight, eps)
    out = F.linear(activation_function(F.linear(z, up_EC, up_bias), activation), down_CE, down_bias)
    return x_BHWC + out if skip else out


SMALL = {"positions": 8192}


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    channels = bounds.get("channels", MAX_CHANNELS)
    size = 3 if bounds.get("itemsize") == 2 and "taps" not in bounds else 7  # 7 x 7 taps of 16 bits: done before
    dtype, name = (torch.bfloat16, "bf16") if bounds.get("itemsize", 4) == 2 else (torch.float32, "fp32")
    hidden = 4 * channels
    batch, side = (1, min(56, math.isqrt(bounds["positions"]))) if "positions" in bounds else (32, 56)
    x = torch.empty(batch, side, side, channels, dtype=dtype, device="meta")
    weight = torch.empty(channels, 1, size, size, dtype=dtype, device="meta")
    up = torch.empty(hidden, channels, dtype=dtype, device="meta")
    operands = (x, weight, up[0], up[0], up[0], up, up[:, 0], up.t(), up[0])
    yield Example(
        label=f"{name} {batch}x{side}x{side}x{channels} k{size} expansion 4{', convolved' if 'taps' in bounds else ''}",
        call=partial(_forward, *operands, True, "gelu", 1e-5, True),
        bytes=2 * x.numel() * x.element_size(),
        operations=4 * x.numel() * hidden,
        unit="matrix",
    )
