"""Gated linear attention in chunks, causal or in both directions, forward and backward.

Gated Linear Attention Transformers with Hardware-Efficient Training, Yang et al. 2023 (arXiv:2312.06635); both
directions as in ViG (arXiv:2405.18425). Per head, with a decay alpha_t in (0, 1] for each key channel:

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = scale * q_t^T S_t.

Within a chunk, with b the running sum of log alpha and S the state before the chunk,

    o_i = (q_i e^{b_i}) S + sum_{j <= i} (sum_d q_id k_jd e^{b_id - b_jd}) v_j.

Nowhere e^{b_i} is multiplied by e^{-b_j}: no exponent is positive, so no decay overflows. On a GPU all chunks run side
by side, after the states between them were found (`gated_linear_attention_kernels.py`).

Shapes: B examples, L tokens, H heads, D key channels, E value channels.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from mixnas.kernels import configs
from mixnas.kernels.dispatch import INTERPRETING, as_autocast, cdiv, choose, launch, next_power_of_2
from mixnas.kernels.gated_linear_attention_kernels import (
    gated_linear_attention_chain_kernel,
    gated_linear_attention_forward_kernel,
    gated_linear_attention_gradient_kernel,
    gated_linear_attention_states_kernel,
)
from mixnas.kernels.tools.aot import Example
from mixnas.kernels.work import counted

MAX_VALUE_CHANNELS = 128  # of a head: what a program holds of S in registers; wider heads run the ATen form


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


# -- Triton -----------------------------------------------------------------------------------------------------------


class _Call:
    """One call's operands, contiguous and of one type, and what its launches have in common."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_decay: torch.Tensor,
        reverse_log_decay: torch.Tensor | None,
    ) -> None:
        self.q, self.k, self.v = (x.contiguous() for x in of_one_type(q, k, v))
        self.decay = log_decay.contiguous()
        self.reverse = self.decay if reverse_log_decay is None else reverse_log_decay.to(log_decay.dtype).contiguous()
        self.directions = 1 if reverse_log_decay is None else 2
        (self.B, self.L, self.H, self.D), self.E = q.shape, v.shape[3]

    def options(self, kernel: str) -> dict[str, int | str]:
        """The launch's constants and options that all kernels but `chain` have."""
        row = self.pick(kernel)
        return {
            # Three passes of the tensor cores' tf32 are as exact as float32; 16-bit operands need one.
            "PRECISION": "tf32x3" if self.q.dtype == torch.float32 else "tf32",
            "DECAY_PRECISION": "tf32x3" if self.decay.dtype == torch.float32 else "tf32",
            "WIDEN": INTERPRETING,
            **row,
            "BLOCK_D": min(row["BLOCK_D"], max(16, next_power_of_2(self.D))),
            "BLOCK_E": min(row["BLOCK_E"], max(16, next_power_of_2(self.E))),
        }

    def pick(self, kernel: str) -> dict[str, int]:
        """The launch's row of the table."""
        features = {"key_channels": self.D, "value_channels": self.E, "bits": 8 * self.q.element_size()}
        return configs.pick(kernel, self.q, **features, directions=self.directions, sequences=self.B * self.H)

    def chunks(self, options: Mapping[str, int | str]) -> int:
        """How many chunks a sequence has."""
        return cdiv(self.L, int(options["BLOCK_C"]))

    def states(self, keys: torch.Tensor, values: torch.Tensor, size: int, own: bool) -> torch.Tensor | None:
        """S as it comes to each chunk of `size` tokens, (directions, B * H, chunks, D, E); None where there is one.

        Args:
            keys: q where the gradient of S is asked for (`own`).
            values: The gradient of the output then.
            size: Tokens of a chunk.
            own: A decay counts its own token, as of queries.
        """
        options = self.options("gated_linear_attention_states")
        options["BLOCK_C"] = size
        chunks, sequences = self.chunks(options), self.B * self.H
        if chunks == 1:
            return None
        # As exact as what it is multiplied with; fp16 could overflow.
        dtype = torch.bfloat16 if values.dtype == torch.bfloat16 else torch.float32
        shape = (self.directions, sequences, chunks)
        states = torch.empty((*shape, self.D, self.E), dtype=dtype, device=keys.device)
        kept = torch.empty((*shape, self.D), dtype=torch.float32, device=keys.device)
        parts = cdiv(self.D, int(options["BLOCK_D"])) * cdiv(self.E, int(options["BLOCK_E"]))
        grid: tuple[int, ...] = (sequences * chunks, self.directions, parts)
        tensors = (keys, values, self.decay, self.reverse, states, kept)
        sizes = (self.L, self.H, self.D, self.E, chunks)
        launch(gated_linear_attention_states_kernel, grid, *tensors, *sizes, OWN=own, **options)
        row = self.pick("gated_linear_attention_chain")
        grid = (sequences, self.directions, cdiv(self.D * self.E, row["BLOCK"]))
        shape = (self.D, self.E, self.D * self.E)
        launch(gated_linear_attention_chain_kernel, grid, states, kept, *shape, CHUNKS=chunks, OWN=own, **row)
        return states

    def mix(
        self, to: torch.Tensor, source: torch.Tensor, values: torch.Tensor, states: torch.Tensor | None, scale: float,
        own: bool, options: dict[str, int | str],
    ) -> torch.Tensor:  # fmt: skip
        """Launch the forward kernel: the output, or with the roles of queries and keys exchanged v's gradient."""
        out = torch.empty_like(self.v)
        chunks = self.chunks(options)
        tensors = (to, source, values, self.decay, self.reverse, states, out)
        constants = self._constants(options) | {"OWN": own}
        sizes = (self.L, self.H, self.D, self.E, chunks)
        grid = (self.B * self.H * chunks, cdiv(self.E, int(options["BLOCK_E"])))
        launch(gated_linear_attention_forward_kernel, grid, *tensors, scale, *sizes, **constants, **options)
        return out

    def gradients(
        self, grad: torch.Tensor, states: torch.Tensor | None, grad_states: torch.Tensor | None, scale: float,
        options: dict[str, int | str],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Launch the gradient kernel: of q, k and the decays, (directions, B, L, H, D)."""
        grad_q, grad_k = torch.empty_like(self.q), torch.empty_like(self.k)
        grad_decay = torch.empty((self.directions, *self.q.shape), dtype=self.decay.dtype, device=self.q.device)
        chunks = self.chunks(options)
        tensors = (grad, self.q, self.k, self.v, self.decay, self.reverse, states, grad_states)
        outputs = (grad_q, grad_k, grad_decay[0], grad_decay[-1])
        sizes = (self.L, self.H, self.D, self.E, chunks)
        grid = (self.B * self.H * chunks,)
        constants = self._constants(options) | {"PARTS_E": cdiv(self.E, int(options["BLOCK_E"]))}
        launch(gated_linear_attention_gradient_kernel, grid, *tensors, *outputs, scale, *sizes, **constants, **options)
        return grad_q, grad_k, grad_decay

    def _constants(self, options: Mapping[str, int | str]) -> dict[str, int]:
        return {
            "DIRECTIONS": self.directions,
            "PARTS": cdiv(self.D, int(options["BLOCK_D"])),
            "LEVELS": int(options["BLOCK_C"]).bit_length() - 1,
        }


def of_one_type(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors in their type, or in float32 where they have several: the tensor cores take one."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return tensors
    return tuple(tensor.float() for tensor in tensors)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    reverse_log_decay: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    call = _Call(q, k, v, log_decay, reverse_log_decay)
    options = call.options("gated_linear_attention_forward")
    states = call.states(call.k, call.v, int(options["BLOCK_C"]), own=False)
    return call.mix(call.q, call.k, call.v, states, scale / call.directions, True, options).to(v.dtype)


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
    call = _Call(q, k, v, log_decay, reverse_log_decay)
    grad = grad.to(call.v.dtype).contiguous()
    scale = scale / call.directions
    options = call.options("gated_linear_attention_gradient")
    size = int(options["BLOCK_C"])
    states = call.states(call.k, call.v, size, own=False)
    grad_states = call.states(call.q, grad, size, own=True)
    grad_q, grad_k, grad_decay = call.gradients(grad, states, grad_states, scale, options)
    options = call.options("gated_linear_attention_forward") | {"BLOCK_C": size}
    grad_v = call.mix(call.k, call.q, grad, grad_states, scale, False, options)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_decay


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
        q, k, v = as_autocast(q, k, v)
        return _gla(q, k, v, log_decay, reverse_log_decay, scale)
    return _aten(q, k, v, log_decay, reverse_log_decay, scale)


SMALL = {"sequences": 64}


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    D, E = bounds.get("key_channels", 64), bounds.get("value_channels", MAX_VALUE_CHANNELS)
    B, L, H = (1, 4096, min(16, bounds["sequences"])) if "sequences" in bounds else (64, 196, 4)
    dtype, name = (torch.bfloat16, "bf16") if bounds.get("bits", 32) == 16 else (torch.float32, "fp32")
    q = torch.empty(B, L, H, D, dtype=dtype, device="meta")
    v = torch.empty(B, L, H, E, dtype=dtype, device="meta")
    forward = kernel != "gated_linear_attention_gradient"
    keys, values, products = {
        "gated_linear_attention_states": (3, 1, 1),
        "gated_linear_attention_chain": (0, 0, 0),
        "gated_linear_attention_forward": (4, 2, 2),
        "gated_linear_attention_gradient": (8, 2, 4),
    }[kernel]
    most = bounds.get("directions", 2)
    for directions, reverse in ((2, q), (1, None))[2 - most :]:
        tensors = (q, q, v, q, reverse, D**-0.5)
        yield Example(
            label=f"{name} {B}x{L}x{H} D{D} E{E} {'both directions' if reverse is not None else 'causal'}",
            call=partial(_forward, *tensors) if forward else partial(_backward, v, *tensors),
            bytes=(keys * q.numel() + values * v.numel()) * q.element_size(),
            operations=directions * 2 * q.numel() * E * products,
            unit="matrix",
            special=directions * 2 * q.numel(),
            timed=directions == most,
        )
