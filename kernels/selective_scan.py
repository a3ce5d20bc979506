"""Selective scan: the input-dependent diagonal state space recurrence of Mamba, forward and backward.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, Gu and Dao 2023 (arXiv:2312.00752), algorithm 2. With
delta_t = softplus(step_t + step_bias), for each channel e and state n:

    h_t = exp(delta_t a) h_{t-1} + delta_t b_t x_t,    y_t = c_t . h_t + skip x_t.

A program walks the tokens of one example and a block of channels with the states in registers; where such programs are
too few for a GPU, the sequences are cut into segments (`selective_scan_kernels.py`). The backward pass keeps no states
from the forward pass: it scans once more to write every SPAN-th state, then goes backwards span by span, recomputing
the states within one into a scratch that the L2 cache holds.

Shapes: B examples, L tokens, E channels, N states of a channel.
"""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from mixnas.kernels import configs
from mixnas.kernels.dispatch import as_autocast, cdiv, choose, launch, next_power_of_2, tracing
from mixnas.kernels.selective_scan_kernels import (
    selective_scan_backward_kernel,
    selective_scan_chain_kernel,
    selective_scan_ends_kernel,
    selective_scan_forward_kernel,
    selective_scan_states_kernel,
)
from mixnas.kernels.tools.aot import Example
from mixnas.kernels.work import counted

SPAN = 16  # tokens between two kept states
ENOUGH_WARPS = 528  # of a launch: four for each multiprocessor of a large GPU
WANTED_WARPS = 2048  # of a launch whose sequences are split
MAX_STATES = 64


def selective_scan_reference(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    step_bias: torch.Tensor,
) -> torch.Tensor:
    """Compute the recurrence token by token, in the dtype given."""
    delta = F.softplus(step + step_bias)
    state = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for x_t, delta_t, b_t, c_t in zip(*(tensor.unbind(1) for tensor in (x, delta, b, c)), strict=True):
        state = (delta_t.unsqueeze(-1) * a).exp() * state + (delta_t * x_t).unsqueeze(-1) * b_t.unsqueeze(1)
        outputs.append((state * c_t.unsqueeze(1)).sum(-1))
    return torch.stack(outputs, 1) + skip * x


# -- ATen: in spans, all at once (few operations: small inputs and traces), or token by token in pieces of the batch ---

_PIECE = 1 << 20  # states of a piece, all tokens: what a core's caches hold


class _CpuScan(torch.autograd.Function):
    """Token by token over pieces of the batch, recomputing the states in the backward pass.

    Autograd through the recurrence would keep several tensors of (B, L, E, N) and walk them through memory.
    """

    @staticmethod
    def forward(ctx, x, step, a, b, c, skip, step_bias):
        ctx.save_for_backward(x, step, a, b, c, skip, step_bias)
        return _in_pieces(x, step, a, b, c, skip, step_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, step, a, b, c, skip, step_bias = ctx.saved_tensors
        grad_x, grad_step, grad_b, grad_c = (torch.empty_like(t) for t in (x, step, b, c))
        grad_a = torch.zeros_like(a)
        for piece in _pieces(x, a):
            g, x_p, c_p = (t[piece].transpose(0, 1).contiguous() for t in (grad, x, c))
            raw, delta, added, b_p, decay, states = _piece_states(x[piece], step[piece], a, b[piece], step_bias)
            grad_c[piece] = (g.unsqueeze(-2) @ states).squeeze(-2).transpose(0, 1)
            grad_states = g.unsqueeze(-1) * c_p.unsqueeze(-2)
            for t in range(len(g) - 2, -1, -1):
                grad_states[t].addcmul_(decay[t + 1], grad_states[t + 1])
            grad_b[piece] = (added.unsqueeze(-2) @ grad_states).squeeze(-2).transpose(0, 1)
            grad_added = (grad_states @ b_p.unsqueeze(-1)).squeeze(-1)
            decay[0].zero_()
            decay[1:].mul_(states[:-1])
            moved = decay.mul_(grad_states)  # gradient of delta * a
            grad_delta = torch.mul(moved, a, out=states).sum(-1) + grad_added * x_p
            grad_a += moved.mul_(delta.unsqueeze(-1)).sum((0, 1))
            grad_x[piece] = (g * skip + grad_added * delta).transpose(0, 1)
            grad_step[piece] = (grad_delta * raw.sigmoid()).transpose(0, 1)
        return grad_x, grad_step, grad_a, grad_b, grad_c, (grad * x).sum((0, 1)), grad_step.sum((0, 1))


def _pieces(x: torch.Tensor, a: torch.Tensor) -> list[slice]:
    """Cut the batch so that a piece's states stay in the caches."""
    size = max(1, _PIECE // (x.shape[1] * a.numel()))
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _piece_states(
    x: torch.Tensor, step: torch.Tensor, a: torch.Tensor, b: torch.Tensor, step_bias: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return, tokens first: steps with their bias, delta, delta x, b, exp(delta a) and the states."""
    x, step, b = (t.transpose(0, 1).contiguous() for t in (x, step, b))
    raw = step + step_bias
    delta = F.softplus(raw)
    added = delta * x
    decay = (delta.unsqueeze(-1) * a).exp_()
    states = added.unsqueeze(-1) * b.unsqueeze(-2)
    for t in range(1, len(x)):
        states[t].addcmul_(decay[t], states[t - 1])
    return raw, delta, added, b, decay, states


def _in_pieces(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    step_bias: torch.Tensor,
) -> torch.Tensor:
    y = torch.empty_like(x)
    for piece in _pieces(x, a):
        states = _piece_states(x[piece], step[piece], a, b[piece], step_bias)[-1]
        y[piece] = (states @ c[piece].transpose(0, 1).unsqueeze(-1)).squeeze(-1).transpose(0, 1)
    return y.addcmul_(x, skip)


def _spans(length: int) -> tuple[int, int]:
    """Return how many tokens the ATen form takes to a span, and how many spans."""
    size = next_power_of_2(max(1, int(length**0.5)))
    return size, cdiv(length, size)


def _macs(x, step, a, *_, **__) -> int:
    """Multiply-accumulates in matrix products, as the ATen form has them: of states and c."""
    size, spans = _spans(x.shape[1])
    return x.shape[0] * size * spans * a.numel()


def _aten(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    step_bias: torch.Tensor,
) -> torch.Tensor:
    operands = (x, step, a, b, c, skip, step_bias)
    if x.dtype not in (torch.float32, torch.float64):
        operands = (x.float(), step.float(), a.float(), b.float(), c.float(), skip.float(), step_bias.float())
    if x.device.type == "cpu" and not tracing():
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
        if needs_grad:
            with torch.autocast("cpu", enabled=False):
                return _CpuScan.apply(*operands).to(x.dtype)
        if x.numel() * a.shape[1] > _PIECE:
            with torch.autocast("cpu", enabled=False):
                return _spans_in_pieces(*operands).to(x.dtype)
    return _in_spans(*operands).to(x.dtype)


def _spans_in_pieces(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    step_bias: torch.Tensor,
) -> torch.Tensor:
    """`_in_spans` of pieces of the batch: an example's answer is that of a trace, and does not depend on the others."""
    pieces = [_in_spans(x[p], step[p], a, b[p], c[p], skip, step_bias) for p in _pieces(x, a)]
    return torch.cat(pieces)


def _in_spans(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    step_bias: torch.Tensor,
) -> torch.Tensor:
    """The recurrence in about 3 sqrt(L) steps: all spans at once, then the states between them, then again."""
    B, L, E = x.shape
    S, spans = _spans(L)
    delta = F.softplus(step + step_bias)
    pieces = [delta, delta * x, b, c]
    if spans * S != L:
        pieces = [F.pad(piece, (0, 0, 0, spans * S - L)) for piece in pieces]
    # (S, B, spans, ...): a step within all spans is one contiguous slice
    delta, input, b, c = (piece.view(B, spans, S, -1).permute(2, 0, 1, 3) for piece in pieces)
    decay = (delta.unsqueeze(-1) * a).exp()
    added = input.unsqueeze(-1) * b.unsqueeze(-2)
    start = added.new_zeros(())
    if spans > 1:
        ends = added[0]
        for t in range(1, S):
            ends = torch.addcmul(added[t], decay[t], ends)
        whole = (delta.sum(0).unsqueeze(-1) * a).exp()
        state = ends[:, 0]
        starts = [torch.zeros_like(state), state]
        for span in range(1, spans - 1):
            state = torch.addcmul(ends[:, span], whole[:, span], state)
            starts.append(state)
        start = torch.stack(starts, 1)
    state = torch.addcmul(added[0], decay[0], start)
    states = [state]
    for t in range(1, S):
        state = torch.addcmul(added[t], decay[t], state)
        states.append(state)
    y = (torch.stack(states) @ c.unsqueeze(-1)).squeeze(-1)  # (S, B, spans, E)
    return y.permute(1, 2, 0, 3).reshape(B, spans * S, E)[:, :L] + skip * x


# -- Triton -----------------------------------------------------------------------------------------------------------


def _pick(kernel: str, x: torch.Tensor, N: int) -> dict[str, int]:
    sequences = x.shape[0] * x.shape[2]  # a channel of an example is walked by itself
    return {"BLOCK_N": max(2, next_power_of_2(N)), **configs.pick(kernel, x, states=N, sequences=sequences)}


def segment_length(length: int, warps: int) -> int:
    """Return how many tokens a program walks: all, or a multiple of SPAN where unsplit the warps would be too few.

    A split sequence is walked twice, so that it is worth less than four warps a multiprocessor.

    Args:
        length: Tokens of a sequence.
        warps: Of the launch if no sequence is split.
    """
    if warps >= ENOUGH_WARPS or length < 4 * SPAN:
        return length
    return SPAN * cdiv(length, SPAN * cdiv(WANTED_WARPS, warps))


def _outside(
    x: torch.Tensor, step: torch.Tensor, a: torch.Tensor, b: torch.Tensor, step_bias: torch.Tensor, segment: int,
    backwards: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return the states at which the segments begin, (B, segments, E, N); backwards the gradients after their ends."""
    (B, L, E), N = x.shape, a.shape[1]
    segments = cdiv(L, segment)
    ends = torch.empty(B, segments, E, N, dtype=torch.float32, device=x.device)
    deltas = torch.empty(B, segments, E, dtype=torch.float32, device=x.device)
    config = _pick("selective_scan_ends", x, N)
    grid: tuple[int, ...] = (B, cdiv(E, config["BLOCK_E"]), segments)
    shape = {"LENGTH": L, "SEGMENT": segment, "BACKWARDS": backwards}
    launch(selective_scan_ends_kernel, grid, x, step, a, b, step_bias, ends, deltas, E, N, **shape, **config)
    config = configs.pick("selective_scan_chain", x, states=N)
    grid = (B, cdiv(E * N, config["BLOCK"]))
    launch(selective_scan_chain_kernel, grid, ends, deltas, a, E, N, SEGMENTS=segments, BACKWARDS=backwards, **config)
    return ends


def _forward(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    step_bias: torch.Tensor,
) -> torch.Tensor:
    x, step, a, b, c, skip, step_bias = (tensor.contiguous() for tensor in (x, step, a, b, c, skip, step_bias))
    (B, L, E), N = x.shape, a.shape[1]
    y = torch.empty_like(x)
    config = _pick("selective_scan_forward", x, N)
    parts = cdiv(E, config["BLOCK_E"])
    segment = segment_length(L, B * parts * config["num_warps"])
    start = None if segment == L else _outside(x, step, a, b, step_bias, segment)
    operands = (x, step, a, b, c, skip, step_bias, start, y)
    grid = (B, parts, cdiv(L, segment))
    launch(selective_scan_forward_kernel, grid, *operands, E, N, LENGTH=L, SEGMENT=segment, **config)
    return y


_scan = torch.library.custom_op("mixnas::selective_scan", _forward, mutates_args=())


@_scan.register_fake
def _(x, step, a, b, c, skip, step_bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    step_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, x, step, a, b, c, skip, step_bias = (t.contiguous() for t in (grad, x, step, a, b, c, skip, step_bias))
    (B, L, E), N = x.shape, a.shape[1]
    spans = cdiv(L, SPAN)

    def sums(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float32, device=x.device)

    config = _pick("selective_scan_backward", x, N)
    parts = cdiv(E, config["BLOCK_E"])
    segment = segment_length(L, B * parts * config["num_warps"])
    start = last = None
    if segment != L:
        start = _outside(x, step, a, b, step_bias, segment)
        last = _outside(grad, step, a, c, step_bias, segment, backwards=True)
    segments = cdiv(L, segment)
    shape = {"LENGTH": L, "SEGMENT": SPAN * cdiv(segment, SPAN), "SPAN": SPAN, "NUM_SPANS": spans}

    kept = sums(B, spans, E, N)
    states = _pick("selective_scan_states", x, N)
    grid = (B, cdiv(E, states["BLOCK_E"]), segments)
    launch(selective_scan_states_kernel, grid, x, step, a, b, step_bias, start, kept, E, N, **shape, **states)

    scratch = sums(B * segments * parts, SPAN, config["BLOCK_E"], config["BLOCK_N"])
    grad_x, grad_step = torch.empty_like(x), torch.empty_like(step)
    grad_a, grad_skip, grad_bias = sums(B * segments, E, N), sums(B * segments, E), sums(B * segments, E)
    grad_b, grad_c = sums(parts, B, L, N), sums(parts, B, L, N)
    outputs = (grad_x, grad_step, grad_a, grad_b, grad_c, grad_skip, grad_bias)
    arguments = (grad, x, step, a, b, c, skip, step_bias, kept, last, scratch, *outputs, E, N)
    launch(selective_scan_backward_kernel, (B, parts, segments), *arguments, **shape, **config)
    like = (a, b, c, skip, step_bias)
    summed = (part.sum(0).to(tensor.dtype) for part, tensor in zip(outputs[2:], like, strict=True))
    grad_a, grad_b, grad_c, grad_skip, grad_bias = summed
    return grad_x, grad_step, grad_a, grad_b, grad_c, grad_skip, grad_bias


_scan_backward = torch.library.custom_op("mixnas::selective_scan_backward", _backward, mutates_args=())


@_scan_backward.register_fake
def _(grad, x, step, a, b, c, skip, step_bias):
    operands = (x, step, a, b, c, skip, step_bias)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in operands)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    return _scan_backward(grad, *ctx.saved_tensors)


_scan.register_autograd(_differentiate, setup_context=_setup_context)


@counted(_macs)
def selective_scan(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    step_bias: torch.Tensor,
) -> torch.Tensor:
    """Run Mamba's recurrence over the tokens (causal).

    Args:
        x: (B, L, E) input.
        step: (B, L, E) step sizes before their bias and softplus.
        a: (E, N) continuous decays, negative.
        b: (B, L, N) input to state.
        c: (B, L, N) state to output.
        skip: (E,) factor on the input that is added to the output ("D").
        step_bias: (E,) added to the steps.

    Returns:
        (B, L, E).

    Raises:
        ValueError: Shapes that do not fit together.
    """
    (B, L, E), N = x.shape, a.shape[-1]
    expected = {"step": (B, L, E), "a": (E, N), "b": (B, L, N), "c": (B, L, N), "skip": (E,), "step_bias": (E,)}
    given = {"step": step, "a": a, "b": b, "c": c, "skip": skip, "step_bias": step_bias}
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}: expected {shape} beside x {(B, L, E)}")
    backend = choose(x, *given.values())
    if backend == "reference":
        return selective_scan_reference(x, step, a, b, c, skip, step_bias)
    if backend == "triton" and N <= MAX_STATES:
        x, step, b, c = as_autocast(x, step, b, c)  # decays keep their digits
        return _scan(x, step, a, b, c, skip, step_bias)
    return _aten(x, step, a, b, c, skip, step_bias)


SMALL = {"sequences": 4096}


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    N = bounds.get("states", MAX_STATES)
    split = kernel in ("selective_scan_ends", "selective_scan_chain")
    small = split or "sequences" in bounds
    whole, pieces = (64, 196, 384), (1, 4096, min(2048, bounds.get("sequences", 2048)))
    # Whole sequences begin with no state, segments of them with what comes from those before: another variant.
    variants = [(pieces, True)] if small else [(whole, True), (pieces, False)]
    types = ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
    for (dtype, name), ((B, L, E), timed) in itertools.product(types, variants):
        x, b = (torch.empty(B, L, width, dtype=dtype, device="meta") for width in (E, N))
        a, skip = torch.empty(E, N, device="meta"), torch.empty(E, device="meta")
        operands = (x, x, a, b, b, skip, skip)
        back = kernel in ("selective_scan_states", "selective_scan_backward")
        maps = {"selective_scan_backward": 5, "selective_scan_forward": 3, "selective_scan_chain": 0}.get(kernel, 2)
        kept = B * cdiv(L, SPAN) * E * N * 4 if back else 0
        operations = {"selective_scan_backward": 22, "selective_scan_forward": 6, "selective_scan_chain": 0}.get(
            kernel, 4
        )
        yield Example(
            label=f"{name} {B}x{L}x{E} N{N}",
            call=partial(_backward, x, *operands) if back else partial(_forward, *operands),
            bytes=(maps * x.numel() + 2 * b.numel()) * x.element_size() + kept,
            operations=operations * x.numel() * N,
            special=x.numel() * N if operations else 0,
            timed=timed,
        )
