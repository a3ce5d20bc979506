"""Layer norm and RMS norm over the last dimension, fused with the residual add before them.

With a residual: s = x + residual, y = norm(s), and both are returned: the stream of residuals is read and written
once. Layer norm: Ba et al. 2016 (arXiv:1607.06450). RMS norm: Zhang and Sennrich 2019 (arXiv:1910.07467).

Shapes: N rows (all leading dimensions), C channels. Statistics in float32.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import overload

import torch
import torch.nn.functional as F

from mixnas.kernels import configs
from mixnas.kernels.dispatch import cdiv, choose, launch, next_power_of_2, tl, triton
from mixnas.kernels.tools.aot import Example

MAX_CHANNELS = 8192  # a row is held in the registers of one program


@triton.jit(do_not_specialize=["rows"])
def norm_forward_kernel(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    out_ptr,  # (N, C)
    sum_ptr,  # (N, C): x + residual; None without a residual
    mean_ptr,  # (N,) float32; None for RMS
    rstd_ptr,  # (N,) float32
    rows,
    channels,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    c_ok = c < channels
    ok = (row < rows) & c_ok
    offsets = row.to(tl.int64) * channels + c
    x = tl.load(x_ptr + offsets, mask=ok, other=0.0)
    if residual_ptr is not None:
        added = x.to(tl.float32) + tl.load(residual_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
        x = added.to(x.dtype)  # the norm is that of the sum which is stored
        tl.store(sum_ptr + offsets, x, mask=ok)
    x = x.to(tl.float32)
    if mean_ptr is not None:
        mean = tl.sum(x, axis=1, keep_dims=True) / channels
        tl.store(mean_ptr + row, mean, mask=row < rows)
        x = tl.where(c_ok, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / channels + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    out = x * rstd * tl.load(weight_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    grad_ptr,  # (N, C)
    grad_sum_ptr,  # (N, C): what reaches x + residual past the norm; or None
    x_ptr,  # (N, C): what was normed
    weight_ptr,  # (C,)
    mean_ptr,  # (N,) or None
    rstd_ptr,  # (N,)
    grad_x_ptr,  # (N, C)
    partial_weight_ptr,  # (splits, C) float32
    partial_bias_ptr,  # (splits, C) float32 or None
    rows,
    channels,
    STEPS: tl.constexpr,  # blocks of rows that a program goes through
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)[None, :]
    c_ok = c < channels
    weight = tl.load(weight_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    sum_bias = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for step in range(STEPS):
        row = ((split * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
        row_ok = row < rows
        ok = row_ok & c_ok
        offsets = row.to(tl.int64) * channels + c
        grad = tl.load(grad_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
        normed = tl.load(x_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row_ok, other=0.0)
        if mean_ptr is not None:
            normed = tl.where(ok, normed - tl.load(mean_ptr + row, mask=row_ok, other=0.0), 0.0)
        normed *= rstd
        sum_weight += grad * normed
        if partial_bias_ptr is not None:
            sum_bias += grad
        grad *= weight
        grad_x = grad - normed * (tl.sum(grad * normed, axis=1, keep_dims=True) / channels)
        if mean_ptr is not None:
            grad_x -= tl.sum(grad, axis=1, keep_dims=True) / channels
        grad_x *= rstd
        if grad_sum_ptr is not None:
            grad_x += tl.load(grad_sum_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=ok)
    target = split.to(tl.int64) * channels + tl.arange(0, BLOCK_C)
    in_row = tl.arange(0, BLOCK_C) < channels
    tl.store(partial_weight_ptr + target, tl.sum(sum_weight, axis=0), mask=in_row)
    if partial_bias_ptr is not None:
        tl.store(partial_bias_ptr + target, tl.sum(sum_bias, axis=0), mask=in_row)


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute layer norm from its definition, in the dtype given."""
    total = x if residual is None else x + residual
    centred = total - total.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    out = out if bias is None else out + bias
    return out if residual is None else (out, total)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute RMS norm from its definition, in the dtype given."""
    total = x if residual is None else x + residual
    out = total / (total.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return out if residual is None else (out, total)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the normed, the sum (empty without a residual), the mean (empty for RMS) and 1 / deviation of each row."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // channels
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device) if centre else None
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    config = configs.pick("norm_forward", x, channels=channels, positions=rows)
    grid = (cdiv(rows, config["BLOCK_R"]),)
    operands = (x, residual, weight, bias, out, total, mean, rstd, rows, channels, eps)
    launch(norm_forward_kernel, grid, *operands, BLOCK_C=next_power_of_2(channels), **config)
    return out, x.new_empty(0) if total is None else total, rstd.new_empty(0) if mean is None else mean, rstd


_operator = torch.library.custom_op("mixnas::norm", forward, mutates_args=())


@_operator.register_fake
def _(x, residual, weight, bias, eps, centre):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.numel() // x.shape[-1]
    return (
        out,
        x.new_empty(0) if residual is None else torch.empty_like(out),
        x.new_empty(rows if centre else 0, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


def backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    with_bias: bool,
    centre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of what was normed, of the weight and of the bias (empty without one)."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // channels
    config = configs.pick("norm_backward", x, channels=channels, positions=rows)
    splits = cdiv(rows, config["BLOCK_R"] * config["STEPS"])
    grad_x = torch.empty_like(x)
    weight_sums = torch.empty(splits, channels, dtype=torch.float32, device=x.device)
    bias_sums = torch.empty_like(weight_sums) if with_bias else None
    operands = (grad, grad_sum, x, weight, mean if centre else None, rstd, grad_x, weight_sums, bias_sums)
    launch(norm_backward_kernel, (splits,), *operands, rows, channels, BLOCK_C=next_power_of_2(channels), **config)
    grad_bias = weight.new_empty(0) if bias_sums is None else bias_sums.sum(0).to(weight.dtype)
    return grad_x, weight_sums.sum(0).to(weight.dtype), grad_bias


_backward_operator = torch.library.custom_op("mixnas::norm_backward", backward, mutates_args=())


@_backward_operator.register_fake
def _(grad, grad_sum, x, weight, mean, rstd, with_bias, centre):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight),
        weight.new_empty(weight.shape[0] if with_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.centre = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, *(() if residual is not None else (total,)))
    ctx.with_bias, ctx.with_residual = bias is not None, residual is not None
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)


def _differentiate(ctx, grad, grad_sum, _grad_mean, _grad_rstd):
    x, weight, mean, rstd = ctx.saved_tensors
    grad = torch.zeros_like(x) if grad is None else grad
    grad_x, grad_weight, grad_bias = _backward_operator(
        grad, grad_sum, x, weight, mean, rstd, ctx.with_bias, ctx.centre
    )
    bias = grad_bias if ctx.with_bias else None
    return grad_x, grad_x if ctx.with_residual else None, grad_weight, bias, None, None


_operator.register_autograd(_differentiate, setup_context=_setup_context)


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    centre: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight {tuple(weight.shape)} must have the {x.shape[-1]} channels of x {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have the shape of x {tuple(x.shape)}")
    backend = choose(x, weight, bias, residual)
    if backend == "triton" and x.shape[-1] <= MAX_CHANNELS:
        out, total, _, _ = _operator(x, residual, weight, bias, eps, centre)
        return out if residual is None else (out, total)
    if backend == "reference":
        if centre:
            return layer_norm_reference(x, weight, bias, eps, residual)
        return rms_norm_reference(x, weight, eps, residual)
    total = x if residual is None else x + residual
    shape = (x.shape[-1],)
    out = F.layer_norm(total, shape, weight, bias, eps) if centre else F.rms_norm(total, shape, weight, eps)
    return out if residual is None else (out, total)


@overload
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = ..., eps: float = ..., residual: None = ...
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = ..., eps: float = ..., *, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise the last dimension to mean 0 and variance 1, then scale and shift.

    Args:
        x: (..., C).
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        residual: (..., C), added to `x` first.

    Returns:
        The normed tensor; with a residual, the normed tensor and the sum.

    Raises:
        ValueError: Shapes that do not fit.
    """
    return _norm(x, weight, bias, eps, residual, True)


@overload
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = ..., residual: None = ...) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = ..., *, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Divide the last dimension by its root mean square, then scale.

    Args:
        x: (..., C).
        weight: (C,).
        eps: Added to the mean square.
        residual: (..., C), added to `x` first.

    Returns:
        The normed tensor; with a residual, the normed tensor and the sum.

    Raises:
        ValueError: Shapes that do not fit.
    """
    return _norm(x, weight, None, eps, residual, False)


SMALL = {"positions": 8192}


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    channels = bounds.get("channels", MAX_CHANNELS)
    rows = min(2**25 // channels, bounds.get("positions", 2**31))
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        if dtype == torch.float32 and channels < 1024:
            continue  # the wide rows need the most registers
        x = torch.empty(rows, channels, dtype=dtype, device="meta")
        row = torch.empty(rows, dtype=torch.float32, device="meta")
        is_forward = kernel == "norm_forward"
        call: Callable[[], object]
        if is_forward:
            call = partial(forward, x, x, x[0], x[0], 1e-5, True)
        else:
            call = partial(backward, x, x, x, x[0], row, row, True, True)
        yield Example(
            label=f"{name} {rows}x{channels} layer, residual",
            call=call,
            bytes=4 * x.numel() * x.element_size(),
            operations=(9 if is_forward else 14) * x.numel(),
        )
        if is_forward:
            yield Example(
                label=f"{name} {rows}x{channels} rms",
                call=partial(forward, x, None, x[0], None, 1e-5, False),
                bytes=2 * x.numel() * x.element_size(),
                operations=5 * x.numel(),
                timed=False,
            )
