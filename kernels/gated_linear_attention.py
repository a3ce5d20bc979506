"""Gated linear attention in chunks, causal or in both directions, forward and backward.

Gated Linear Attention Transformers with Hardware-Efficient Training, Yang et al. 2023 (arXiv:2312.06635); both
directions as in ViG (arXiv:2405.18425). Per head, with a decay alpha_t in (0, 1] for each key channel:

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = scale * q_t^T S_t.

Within a chunk, with b the running sum of log alpha and S the state before the chunk,

    o_i = (q_i e^{b_i}) S + sum_{j <= i} (sum_d q_id k_jd e^{b_id - b_jd}) v_j.

The kernels form e^{b_i - b_j} itself, not e^{b_i} times e^{-b_j}: no exponent is positive, so no decay overflows.
One program walks the chunks of one (example, head, block of key channels, direction) with its part of S in registers;
parts over key channels and directions are added outside.

Shapes: B examples, L tokens, H heads, D key channels, E value channels.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from mixnas.kernels import configs
from mixnas.kernels.dispatch import cdiv, choose, launch, next_power_of_2, tl, triton
from mixnas.kernels.tools.aot import Example
from mixnas.kernels.work import counted

MAX_VALUE_CHANNELS = 128  # of a head: what a program holds of S in registers; wider heads run the ATen form


@triton.jit(do_not_specialize=["B", "L", "H"])
def gated_linear_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, decay_ptr, reverse_ptr, out_ptr, scale,
    B, L, H, D, E,
    NUM_CHUNKS: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    direction, part = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, BLOCK_C)
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    earlier = i[:, None] >= i[None, :]
    if direction == 1:
        decay_ptr = reverse_ptr
    out_ptr += (direction * tl.num_programs(2) + part).to(tl.int64) * B * L * H * E
    state = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
    for chunk in range(NUM_CHUNKS):
        t = chunk * BLOCK_C + i
        position = tl.where(direction == 1, L - 1 - t, t)
        row = (b * L + position).to(tl.int64) * H + h
        in_d = (t < L)[:, None] & (d < D)[None, :]
        in_e = (t < L)[:, None] & (e < E)[None, :]
        at_d = row[:, None] * D + d[None, :]
        at_e = row[:, None] * E + e[None, :]
        q = tl.load(q_ptr + at_d, mask=in_d, other=0.0).to(tl.float32) * scale
        k = tl.load(k_ptr + at_d, mask=in_d, other=0.0).to(tl.float32)
        g = tl.load(decay_ptr + at_d, mask=in_d, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at_e, mask=in_e, other=0.0).to(tl.float32)
        cum = tl.cumsum(g, 0)
        last = tl.sum(g, 0)
        gap = tl.where(earlier[:, :, None], cum[:, None, :] - cum[None, :, :], 0.0)
        scores = tl.sum(q[:, None, :] * k[None, :, :] * tl.exp(gap), 2)
        scores = tl.where(earlier, scores, 0.0)
        out = tl.dot(q * tl.exp(cum), state, input_precision=PRECISION)
        out += tl.dot(scores, v, input_precision=PRECISION)
        tl.store(out_ptr + at_e, out.to(out_ptr.dtype.element_ty), mask=in_e)
        state *= tl.exp(last)[:, None]
        state += tl.dot(tl.trans(k * tl.exp(last[None, :] - cum)), v, input_precision=PRECISION)


@triton.jit(do_not_specialize=["B", "L", "H"])
def gated_linear_attention_query_gradient_kernel(
    grad_ptr, k_ptr, v_ptr, decay_ptr, reverse_ptr, grad_q_ptr, scale,
    B, L, H, D, E,
    NUM_CHUNKS: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    direction, part = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, BLOCK_C)
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    earlier = i[:, None] >= i[None, :]
    if direction == 1:
        decay_ptr = reverse_ptr
    grad_q_ptr += direction.to(tl.int64) * B * L * H * D
    state = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
    for chunk in range(NUM_CHUNKS):
        t = chunk * BLOCK_C + i
        position = tl.where(direction == 1, L - 1 - t, t)
        row = (b * L + position).to(tl.int64) * H + h
        in_d = (t < L)[:, None] & (d < D)[None, :]
        in_e = (t < L)[:, None] & (e < E)[None, :]
        at_d = row[:, None] * D + d[None, :]
        at_e = row[:, None] * E + e[None, :]
        k = tl.load(k_ptr + at_d, mask=in_d, other=0.0).to(tl.float32)
        g = tl.load(decay_ptr + at_d, mask=in_d, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at_e, mask=in_e, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at_e, mask=in_e, other=0.0).to(tl.float32)
        cum = tl.cumsum(g, 0)
        last = tl.sum(g, 0)
        pairs = tl.where(earlier, tl.dot(grad, tl.trans(v), input_precision=PRECISION), 0.0)
        gap = tl.where(earlier[:, :, None], cum[:, None, :] - cum[None, :, :], 0.0)
        # The state transposed and last: with S[E, D] or the other order, Triton 3.6 spills in float32 at E = 128.
        grad_q = tl.sum(pairs[:, :, None] * k[None, :, :] * tl.exp(gap), 1)
        grad_q += tl.exp(cum) * tl.dot(grad, tl.trans(state), input_precision=PRECISION)
        tl.store(grad_q_ptr + at_d, grad_q * scale, mask=in_d)
        state *= tl.exp(last)[:, None]
        state += tl.dot(tl.trans(k * tl.exp(last[None, :] - cum)), v, input_precision=PRECISION)


@triton.jit(do_not_specialize=["B", "L", "H"])
def gated_linear_attention_backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, decay_ptr, reverse_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, grad_decay_ptr, scale,
    B, L, H, D, E,
    NUM_CHUNKS: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    direction, part = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, BLOCK_C)
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    later = i[:, None] <= i[None, :]  # [key, query]
    if direction == 1:
        decay_ptr = reverse_ptr
    grad_q_ptr += direction.to(tl.int64) * B * L * H * D
    grad_k_ptr += direction.to(tl.int64) * B * L * H * D
    grad_decay_ptr += direction.to(tl.int64) * B * L * H * D
    grad_v_ptr += (direction * tl.num_programs(2) + part).to(tl.int64) * B * L * H * E
    grad_state = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
    after = tl.zeros((BLOCK_D,), dtype=tl.float32)  # sum over later chunks of q dq - k dk
    for back in range(NUM_CHUNKS):
        t = (NUM_CHUNKS - 1 - back) * BLOCK_C + i
        position = tl.where(direction == 1, L - 1 - t, t)
        row = (b * L + position).to(tl.int64) * H + h
        in_d = (t < L)[:, None] & (d < D)[None, :]
        in_e = (t < L)[:, None] & (e < E)[None, :]
        at_d = row[:, None] * D + d[None, :]
        at_e = row[:, None] * E + e[None, :]
        q = tl.load(q_ptr + at_d, mask=in_d, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + at_d, mask=in_d, other=0.0).to(tl.float32)
        g = tl.load(decay_ptr + at_d, mask=in_d, other=0.0).to(tl.float32)
        grad_q = tl.load(grad_q_ptr + at_d, mask=in_d, other=0.0)
        v = tl.load(v_ptr + at_e, mask=in_e, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at_e, mask=in_e, other=0.0).to(tl.float32) * scale
        cum = tl.cumsum(g, 0)
        last = tl.sum(g, 0)
        to_end = tl.exp(last[None, :] - cum)
        gap = tl.where(later[:, :, None], cum[None, :, :] - cum[:, None, :], 0.0)
        q_decayed = q[None, :, :] * tl.exp(gap)
        scores = tl.where(later, tl.sum(q_decayed * k[:, None, :], 2), 0.0)
        grad_v = tl.dot(k * to_end, grad_state, input_precision=PRECISION)
        grad_v += tl.dot(scores, grad, input_precision=PRECISION)
        tl.store(grad_v_ptr + at_e, grad_v.to(grad_v_ptr.dtype.element_ty), mask=in_e)
        pairs = tl.where(later, tl.dot(v, tl.trans(grad), input_precision=PRECISION), 0.0)
        grad_k = to_end * tl.dot(v, tl.trans(grad_state), input_precision=PRECISION)
        grad_k += tl.sum(pairs[:, :, None] * q_decayed, 1)
        tl.store(grad_k_ptr + at_d, grad_k.to(grad_k_ptr.dtype.element_ty), mask=in_d)
        # Decays act through e^{b_i - b_j} alone: d/db_t is q_t dq_t - k_t dk_t, and a decay moves all later b.
        moved = q * grad_q - k * grad_k
        total = tl.sum(moved, 0)
        grad_decay = (after + total)[None, :] - tl.cumsum(moved, 0) + moved
        tl.store(grad_decay_ptr + at_d, grad_decay.to(grad_decay_ptr.dtype.element_ty), mask=in_d)
        after += total
        grad_state *= tl.exp(last)[:, None]
        grad_state += tl.dot(tl.trans(q * tl.exp(cum)), grad, input_precision=PRECISION)


def gated_linear_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    reverse_log_decay: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute the recurrence token by token, in the dtype given."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    forwards = torch.arange(q.shape[1], device=q.device)
    directions = [(forwards, log_decay)]
    if reverse_log_decay is not None:
        directions.append((forwards.flip(0), reverse_log_decay))
    total = torch.zeros_like(v)
    for order, decay in directions:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        outputs = []
        for q_t, k_t, v_t, g_t in zip(*(x[:, order].unbind(1) for x in (q, k, v, decay)), strict=True):
            state = g_t.exp().unsqueeze(-1) * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
            outputs.append(torch.einsum("bhd,bhde->bhe", q_t, state))
        total = total + torch.stack(outputs, 1)[:, order]
    return total * (scale / len(directions))


def _chunk_size(length: int) -> int:
    return min(length, 8 if length <= 64 else 16 if length <= 256 else 32)


def _macs(q, k, v, log_decay, reverse_log_decay=None, scale=None) -> int:
    """Multiply-accumulates in matrix products, as the ATen form has them: within chunks and between them."""
    B, length, heads, key_channels = q.shape
    C = _chunk_size(length)
    N = cdiv(length, C)
    between = 2 * C * key_channels * v.shape[-1] if N > 1 else 0
    return B * heads * (1 if reverse_log_decay is None else 2) * N * (C * C * v.shape[-1] + between)


def _chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """The causal form on ATen: all chunks at once, the states between them in a loop; (B, L, H, D) to (B, L, H, E)."""
    B, L, H, _ = q.shape
    C = _chunk_size(L)
    N = cdiv(L, C)
    if N * C != L:
        q, k, v, log_decay = (F.pad(x, (0, 0, 0, 0, 0, N * C - L)) for x in (q, k, v, log_decay))
    v = v.reshape(B, N, C, H, -1).transpose(2, 3)  # B N H C E
    # B N H D C: the pairs of a chunk's tokens are innermost, where the exponentials run over whole rows of them.
    q, k, log_decay = (x.reshape(B, N, C, H, -1).permute(0, 1, 3, 4, 2).contiguous() for x in (q, k, log_decay))
    cum = log_decay.cumsum(-1)
    later = torch.full((C, C), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    decay = (cum.unsqueeze(-1) - cum.unsqueeze(-2) + later).exp()
    out = (q.unsqueeze(-1) * decay * k.unsqueeze(-2)).sum(-3) @ v
    if N > 1:
        last = cum[..., -1:]
        added = (k * (last - cum).exp()) @ v  # B N H D E
        kept = last.exp()
        state, states = added[:, 0], [torch.zeros_like(added[:, 0])]
        for n in range(1, N):
            states.append(state)
            if n < N - 1:
                state = torch.addcmul(added[:, n], kept[:, n], state)
        out = out + (q * cum.exp()).transpose(-1, -2) @ torch.stack(states, 1)
    return out.transpose(2, 3).reshape(B, N * C, H, -1)[:, :L]


def _aten(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    reverse_log_decay: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    dtype = v.dtype
    if dtype not in (torch.float32, torch.float64):  # running sums of logarithms need the digits
        q, k, v, log_decay = (x.float() for x in (q, k, v, log_decay))
        reverse_log_decay = None if reverse_log_decay is None else reverse_log_decay.float()
    if reverse_log_decay is None:
        return _chunked(q * scale, k, v, log_decay).to(dtype)
    q = q * (scale / 2)
    both = [torch.cat((x, y.flip(1))) for x, y in ((q, q), (k, k), (v, v), (log_decay, reverse_log_decay))]
    forward, backward = _chunked(*both).unflatten(0, (2, -1))  # not chunk(2): its number of parts depends on B
    return (forward + backward.flip(1)).to(dtype)


def _launch_options(kernel: str, q: torch.Tensor, v: torch.Tensor) -> tuple[int, dict[str, int | str]]:
    """Return the number of parts that the key channels are cut into, and the launch's constants and options."""
    D, E = q.shape[3], v.shape[3]
    config = configs.pick(kernel, q, key_channels=D, value_channels=E, sequences=q.shape[0] * q.shape[2])
    options: dict[str, int | str] = {
        "NUM_CHUNKS": cdiv(q.shape[1], config["BLOCK_C"]),
        "BLOCK_E": max(16, next_power_of_2(E)),
        # Products of 16-bit operands lose nothing that they had in tf32; float32 has to keep its 1e-5.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        **config,
    }
    return cdiv(D, config["BLOCK_D"]), options


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    reverse_log_decay: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay))
    (B, L, H, D), E = q.shape, v.shape[3]
    directions = 1 if reverse_log_decay is None else 2
    reverse = log_decay if reverse_log_decay is None else reverse_log_decay.contiguous()
    parts, options = _launch_options("gated_linear_attention_forward", q, v)
    copies = directions * parts
    out = torch.empty((copies, *v.shape), dtype=v.dtype if copies == 1 else torch.float32, device=v.device)
    grid = (B * H, directions, parts)
    arguments = (q, k, v, log_decay, reverse, out, scale / directions, B, L, H, D, E)
    launch(gated_linear_attention_forward_kernel, grid, *arguments, **options)
    return out[0] if copies == 1 else out.sum(0).to(v.dtype)


_gla = torch.library.custom_op("mixnas::gated_linear_attention", _forward, mutates_args=())


@_gla.register_fake
def _(q, k, v, log_decay, reverse_log_decay, scale):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    reverse_log_decay: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, q, k, v, log_decay = (x.contiguous() for x in (grad, q, k, v, log_decay))
    (B, L, H, D), E = q.shape, v.shape[3]
    directions = 1 if reverse_log_decay is None else 2
    reverse = log_decay if reverse_log_decay is None else reverse_log_decay.contiguous()
    scale = scale / directions

    parts, options = _launch_options("gated_linear_attention_query_gradient", q, v)
    grad_q = torch.empty((directions, *q.shape), dtype=torch.float32, device=q.device)
    integers = (B, L, H, D, E)
    tensors: tuple[torch.Tensor, ...] = (grad, k, v, log_decay, reverse, grad_q)
    grid = (B * H, directions, parts)
    launch(gated_linear_attention_query_gradient_kernel, grid, *tensors, scale, *integers, **options)

    parts, options = _launch_options("gated_linear_attention_backward", q, v)
    copies = directions * parts
    grad_k = torch.empty((directions, *k.shape), dtype=k.dtype if directions == 1 else torch.float32, device=k.device)
    grad_v = torch.empty((copies, *v.shape), dtype=v.dtype if copies == 1 else torch.float32, device=v.device)
    grad_decay = torch.empty((directions, *q.shape), dtype=log_decay.dtype, device=q.device)
    tensors = (grad, q, k, v, log_decay, reverse, grad_q, grad_k, grad_v, grad_decay)
    grid = (B * H, directions, parts)
    launch(gated_linear_attention_backward_kernel, grid, *tensors, scale, *integers, **options)
    return grad_q.sum(0).to(q.dtype), grad_k.sum(0).to(k.dtype), grad_v.sum(0).to(v.dtype), grad_decay


_gla_backward = torch.library.custom_op("mixnas::gated_linear_attention_backward", _backward, mutates_args=())


@_gla_backward.register_fake
def _(grad, q, k, v, log_decay, reverse_log_decay, scale):
    directions = 1 if reverse_log_decay is None else 2
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return *grads, log_decay.new_empty((directions, *log_decay.shape))


def _setup_context(ctx, inputs, output):
    *operands, ctx.scale = inputs
    ctx.save_for_backward(*operands)


def _differentiate(ctx, grad):
    *grads, grad_decay = _gla_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *grads, grad_decay[0], grad_decay[1] if len(grad_decay) == 2 else None, None


_gla.register_autograd(_differentiate, setup_context=_setup_context)


@counted(_macs)
def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    reverse_log_decay: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Mix tokens by a linear recurrence whose state decays per key channel, as the data says.

    Args:
        q: (B, L, H, D) queries.
        k: (B, L, H, D) keys.
        v: (B, L, H, E) values.
        log_decay: (B, L, H, D) logarithms of the decays, at most 0.
        reverse_log_decay: Decays of a second pass from the last token to the first; the output is then the mean of
            the two passes, both of which include the token itself. Without it the output is causal.
        scale: Factor on the queries; D^-1/2 where not given.

    Returns:
        (B, L, H, E).

    Raises:
        ValueError: Shapes that do not fit together.
    """
    if not q.shape == k.shape == log_decay.shape or q.shape[:3] != v.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, log_decay))
        raise ValueError(f"q, k, v, log_decay have shapes {shapes}: expected (B, L, H, D), and (B, L, H, E) for v")
    if reverse_log_decay is not None and reverse_log_decay.shape != q.shape:
        raise ValueError(f"reverse_log_decay {tuple(reverse_log_decay.shape)} must have the shape of q")
    backend = choose(q, k, v, log_decay, reverse_log_decay)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        return gated_linear_attention_reference(q, k, v, log_decay, reverse_log_decay, scale)
    if backend == "triton" and v.shape[-1] <= MAX_VALUE_CHANNELS:
        return _gla(q, k, v, log_decay, reverse_log_decay, scale)
    return _aten(q, k, v, log_decay, reverse_log_decay, scale)


SMALL = {"sequences": 64}


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    D, E = bounds.get("key_channels", 64), bounds.get("value_channels", MAX_VALUE_CHANNELS)
    B, L, H = (1, 4096, min(16, bounds["sequences"])) if "sequences" in bounds else (64, 196, 4)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        q = torch.empty(B, L, H, D, dtype=dtype, device="meta")
        v = torch.empty(B, L, H, E, dtype=dtype, device="meta")
        tensors = (q, q, v, q, q, D**-0.5)
        forward = kernel == "gated_linear_attention_forward"
        keys, values = {
            "gated_linear_attention_forward": (4, 2),
            "gated_linear_attention_query_gradient": (5, 2),
            "gated_linear_attention_backward": (9, 3),
        }[kernel]
        yield Example(
            label=f"{name} {B}x{L}x{H} D{D} E{E} both directions",
            call=partial(_forward, *tensors) if forward else partial(_backward, v, *tensors),
            bytes=(keys * q.numel() + values * v.numel()) * q.element_size(),
            operations=2 * 2 * q.numel() * E * 2,
            unit="matrix",
        )
