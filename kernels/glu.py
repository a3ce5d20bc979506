"""Gated linear units: act(gate) * up in one pass over memory, forward and backward.

GLU variants improve Transformer, Shazeer 2020 (arXiv:2002.05202): "silu" is SwiGLU's product, "sigmoid" the original
gated linear unit's (arXiv:1612.08083).
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from mixnas.kernels import configs
from mixnas.kernels.dispatch import as_autocast, cdiv, choose, launch, tl, triton
from mixnas.kernels.tools.aot import Example

ACTIVATIONS = ("silu", "sigmoid")


@triton.jit
def glu_forward_kernel(gate_ptr, up_ptr, out_ptr, numel, SILU: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    act = tl.sigmoid(gate)
    if SILU:
        act = act * gate
    tl.store(out_ptr + offsets, (act * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, numel, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    if SILU:
        act = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    else:
        act = sigmoid
        slope = sigmoid * (1.0 - sigmoid)
    tl.store(grad_gate_ptr + offsets, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + offsets, (grad * act).to(grad_up_ptr.dtype.element_ty), mask=mask)


def glu_reference(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """Compute act(gate) * up from its definition, in the dtype given."""
    sigmoid = torch.sigmoid(gate)
    return (gate * sigmoid if activation == "silu" else sigmoid) * up


def _forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    config = configs.pick("glu_forward", gate)
    grid = (cdiv(gate.numel(), config["BLOCK"]),)
    launch(glu_forward_kernel, grid, gate, up, out, gate.numel(), SILU=activation == "silu", **config)
    return out


_glu = torch.library.custom_op("mixnas::glu", _forward, mutates_args=())


@_glu.register_fake
def _(gate, up, activation):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    config = configs.pick("glu_backward", gate)
    grid = (cdiv(gate.numel(), config["BLOCK"]),)
    numel = gate.numel()
    launch(glu_backward_kernel, grid, grad, gate, up, grad_gate, grad_up, numel, SILU=activation == "silu", **config)
    return grad_gate, grad_up


_glu_backward = torch.library.custom_op("mixnas::glu_backward", _backward, mutates_args=())


@_glu_backward.register_fake
def _(grad, gate, up, activation):
    return (
        torch.empty_like(gate, memory_format=torch.contiguous_format),
        torch.empty_like(up, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx, grad):
    grad_gate, grad_up = _glu_backward(grad, *ctx.saved_tensors, ctx.activation)
    return grad_gate, grad_up, None


_glu.register_autograd(_differentiate, setup_context=_setup_context)


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """Multiply `up` by the activated `gate`.

    Args:
        gate: (..., C), any shape.
        up: Same shape, dtype and device as `gate`.
        activation: "silu" or "sigmoid".

    Raises:
        ValueError: An unknown activation, or shapes that differ.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have the same shape")
    backend = choose(gate, up)
    if backend == "triton":
        gate, up = as_autocast(gate, up)
        return _glu(gate, up, activation)
    if backend == "reference":
        return glu_reference(gate, up, activation)
    return (F.silu(gate) if activation == "silu" else torch.sigmoid(gate)) * up


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x = torch.empty(8 * 4096, 1024, dtype=dtype, device="meta")
        forward = kernel == "glu_forward"
        yield Example(
            label=f"{name} 32768x1024",
            call=partial(_forward, x, x, "silu") if forward else partial(_backward, x, x, x, "silu"),
            bytes=(3 if forward else 5) * x.numel() * x.element_size(),
            operations=(5 if forward else 11) * x.numel(),
            special=2 * x.numel(),
        )
