"""What the convolutions fuse behind themselves: activation, then an elementwise gate; out = act(z) * gate.

The Triton helpers `activate` and `activation_slope` are inlined by the kernels that need them; the backward of the
epilogue is one elementwise kernel of its own, since its result feeds two reductions.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from mixnas.kernels import configs
from mixnas.kernels.dispatch import cdiv, launch, tl, triton
from mixnas.kernels.fast_math import normal_tail, sigmoid
from mixnas.kernels.tools.aot import Example

ACTIVATIONS = ("none", "relu", "silu", "gelu", "sigmoid")


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Apply the activation in float32 ("gelu" is the exact one, not the one with tanh)."""
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0)
    elif ACTIVATION == "silu":
        z = z * sigmoid(z)
    elif ACTIVATION == "gelu":
        tail, _ = normal_tail(z)
        z = z * tl.where(z > 0.0, 1.0 - tail, tail)
    elif ACTIVATION == "sigmoid":
        z = sigmoid(z)
    return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """Return the activation's derivative at z."""
    if ACTIVATION == "relu":
        slope = tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        share = sigmoid(z)
        slope = share * (1.0 + z * (1.0 - share))
    elif ACTIVATION == "gelu":
        tail, density = normal_tail(z)
        slope = tl.where(z > 0.0, 1.0 - tail, tail) + z * 0.3989422804014327 * density
    elif ACTIVATION == "sigmoid":
        share = sigmoid(z)
        slope = share * (1.0 - share)
    else:
        slope = z * 0.0 + 1.0
    return slope


@triton.jit
def epilogue_backward_kernel(
    grad_ptr,
    pre_ptr,
    gate_ptr,
    grad_pre_ptr,
    grad_gate_ptr,
    numel,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        grad_gate = grad * activate(pre, ACTIVATION)
        tl.store(grad_gate_ptr + offsets, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
        grad = grad * tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad_pre = grad * activation_slope(pre, ACTIVATION)
    tl.store(grad_pre_ptr + offsets, grad_pre.to(grad_pre_ptr.dtype.element_ty), mask=mask)


def activation_function(z: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply a named activation with ATen."""
    if activation == "relu":
        return F.relu(z)
    if activation == "silu":
        return F.silu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "sigmoid":
        return torch.sigmoid(z)
    return z


def epilogue_reference(z: torch.Tensor, gate: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Compute act(z) * gate from its definition, in the dtype given."""
    out = activation_function(z, activation)
    return out if gate is None else out * gate


def epilogue_backward(
    grad: torch.Tensor, pre: torch.Tensor, gate: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the epilogue's backward.

    Args:
        grad: Gradient of act(pre) * gate, contiguous; `pre` and `gate` likewise, all of one shape.
        pre: What the activation was applied to. Not read for activation "none" without a gate.

    Returns:
        The gradients of `pre` and of `gate` (None without a gate).
    """
    if activation == "none" and gate is None:
        return grad, None
    grad_pre = torch.empty_like(grad)
    grad_gate = None if gate is None else torch.empty_like(gate)
    config = configs.pick("epilogue_backward", grad)
    grid = (cdiv(grad.numel(), config["BLOCK"]),)
    operands = (grad, pre, gate, grad_pre, grad_gate, grad.numel())
    launch(epilogue_backward_kernel, grid, *operands, ACTIVATION=activation, **config)
    return grad_pre, grad_gate


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x = torch.empty(32 * 56 * 56, 64, dtype=dtype, device="meta")
        yield Example(
            label=f"{name} 100352x64 gelu gated",
            call=partial(epilogue_backward, x, x, x, "gelu"),
            bytes=5 * x.numel() * x.element_size(),
            operations=20 * x.numel(),
            special=x.numel(),
        )
