"""The kernels of the selective scan (`selective_scan.py` says what they compute, and with which letters).

All walk a segment of tokens with the states of a block of channels in registers. Sequences that are few and long are
cut into segments, so that every multiprocessor has some: `ends` finds what a segment adds to the states, as if it began
with none, and by how much it lets them decay; `chain` turns that into the states at which segments begin; then the
segments run side by side. Backwards in time the same holds for the gradients of the states.
"""

from mixnas.kernels.dispatch import tl, triton
from mixnas.kernels.fast_math import LN_2, LOG2_E, exp2, log2, sigmoid


@triton.jit
def softplus(x):
    """log(1 + e^x), float32."""
    y = exp2(tl.minimum(x, 20.0) * LOG2_E)
    small = y * (1.0 - y * (0.5 - y * (0.33333334 - y * 0.25)))  # 1 + y would round y away: steps start near e^-7
    return tl.where(x > 20.0, x, tl.where(x < -4.0, small, LN_2 * log2(1.0 + y)))


@triton.jit
def selective_scan_forward_kernel(
    x_ptr, step_ptr, a_ptr, b_ptr, c_ptr, skip_ptr, bias_ptr, start_ptr, y_ptr,
    E, N,
    LENGTH: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    example, segment = tl.program_id(0).to(tl.int64), tl.program_id(2)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e, in_n = e < E, n < N
    at_en, in_en = e[:, None] * N + n[None, :], in_e[:, None] & in_n[None, :]
    a = tl.load(a_ptr + at_en, mask=in_en, other=0.0).to(tl.float32) * LOG2_E
    skip = tl.load(skip_ptr + e, mask=in_e, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + e, mask=in_e, other=0.0).to(tl.float32)
    if start_ptr is None:
        state = tl.zeros((BLOCK_E, BLOCK_N), dtype=tl.float32)
    else:
        state = tl.load(start_ptr + (example * tl.num_programs(2) + segment) * E * N + at_en, mask=in_en, other=0.0)
    row = example * LENGTH + segment * SEGMENT
    x_ptrs, step_ptrs, y_ptrs = x_ptr + row * E + e, step_ptr + row * E + e, y_ptr + row * E + e
    b_ptrs, c_ptrs = b_ptr + row * N + n, c_ptr + row * N + n
    left = LENGTH - segment * SEGMENT  # tokens from here to the end of the sequence
    # Two bytes a thread are too narrow for the asynchronous copies of `num_stages`: these run one token ahead instead.
    next_x = tl.load(x_ptrs, mask=in_e, other=0.0)
    next_step = tl.load(step_ptrs, mask=in_e, other=0.0)
    for t in tl.range(0, SEGMENT, num_stages=STAGES):
        x, step = next_x.to(tl.float32), next_step.to(tl.float32)
        x_ptrs += E
        step_ptrs += E
        next_x = tl.load(x_ptrs, mask=in_e & (t + 1 < left), other=0.0)
        next_step = tl.load(step_ptrs, mask=in_e & (t + 1 < left), other=0.0)
        b = tl.load(b_ptrs, mask=in_n & (t < left), other=0.0).to(tl.float32)
        c = tl.load(c_ptrs, mask=in_n & (t < left), other=0.0).to(tl.float32)
        delta = softplus(step + bias)
        state = exp2(delta[:, None] * a) * state + (delta * x)[:, None] * b[None, :]
        y = tl.sum(state * c[None, :], 1) + skip * x
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=in_e & (t < left))
        y_ptrs += E
        b_ptrs += N
        c_ptrs += N


@triton.jit
def selective_scan_ends_kernel(
    x_ptr, step_ptr, a_ptr, b_ptr, bias_ptr, ends_ptr, deltas_ptr,
    E, N,
    LENGTH: tl.constexpr, SEGMENT: tl.constexpr, BACKWARDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # Backwards x is the gradient of the output and b is c: the gradient of the states that come before the segment.
    example, segment = tl.program_id(0).to(tl.int64), tl.program_id(2)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e, in_n = e < E, n < N
    at_en, in_en = e[:, None] * N + n[None, :], in_e[:, None] & in_n[None, :]
    a = tl.load(a_ptr + at_en, mask=in_en, other=0.0).to(tl.float32) * LOG2_E
    bias = tl.load(bias_ptr + e, mask=in_e, other=0.0).to(tl.float32)
    state = tl.zeros((BLOCK_E, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    STEP: tl.constexpr = -1 if BACKWARDS else 1
    FIRST: tl.constexpr = SEGMENT - 1 if BACKWARDS else 0
    row = example * LENGTH + segment * SEGMENT + FIRST
    x_ptrs, step_ptrs, b_ptrs = x_ptr + row * E + e, step_ptr + row * E + e, b_ptr + row * N + n
    left = LENGTH - segment * SEGMENT
    next_x = tl.load(x_ptrs, mask=in_e & (left > FIRST), other=0.0)
    next_step = tl.load(step_ptrs, mask=in_e & (left > FIRST), other=0.0)
    for walked in tl.range(0, SEGMENT, num_stages=STAGES):
        t = FIRST + STEP * walked
        x, step = next_x.to(tl.float32), next_step.to(tl.float32)
        x_ptrs += STEP * E
        step_ptrs += STEP * E
        ahead = in_e & (t + STEP < left) & (t + STEP >= 0)
        next_x = tl.load(x_ptrs, mask=ahead, other=0.0)
        next_step = tl.load(step_ptrs, mask=ahead, other=0.0)
        b = tl.load(b_ptrs, mask=in_n & (t < left), other=0.0).to(tl.float32)
        delta = softplus(step + bias)
        total += tl.where(in_e & (t < left), delta, 0.0)
        if BACKWARDS:
            state = exp2(delta[:, None] * a) * (state + x[:, None] * b[None, :])
        else:
            state = exp2(delta[:, None] * a) * state + (delta * x)[:, None] * b[None, :]
        b_ptrs += STEP * N
    place = example * tl.num_programs(2) + segment
    tl.store(ends_ptr + place * E * N + at_en, state, mask=in_en)
    tl.store(deltas_ptr + place * E + e, total, mask=in_e)


@triton.jit
def selective_scan_chain_kernel(
    ends_ptr, deltas_ptr, a_ptr,
    E, N,
    SEGMENTS: tl.constexpr, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # In place: what a segment adds is replaced by the state (or its gradient) that comes to the segment from outside.
    example = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < E * N
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    for walked in tl.range(0, SEGMENTS, num_stages=STAGES):
        segment = example * SEGMENTS + (SEGMENTS - 1 - walked if BACKWARDS else walked)
        added = tl.load(ends_ptr + segment * E * N + at, mask=inside, other=0.0)
        delta = tl.load(deltas_ptr + segment * E + at // N, mask=inside, other=0.0)
        tl.store(ends_ptr + segment * E * N + at, state, mask=inside)
        state = exp2(delta * a) * state + added


@triton.jit
def selective_scan_states_kernel(
    x_ptr, step_ptr, a_ptr, b_ptr, bias_ptr, start_ptr, kept_ptr,
    E, N,
    LENGTH: tl.constexpr, SEGMENT: tl.constexpr, SPAN: tl.constexpr, NUM_SPANS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    example, segment = tl.program_id(0).to(tl.int64), tl.program_id(2)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e, in_n = e < E, n < N
    at_en, in_en = e[:, None] * N + n[None, :], in_e[:, None] & in_n[None, :]
    a = tl.load(a_ptr + at_en, mask=in_en, other=0.0).to(tl.float32) * LOG2_E
    bias = tl.load(bias_ptr + e, mask=in_e, other=0.0).to(tl.float32)
    if start_ptr is None:
        state = tl.zeros((BLOCK_E, BLOCK_N), dtype=tl.float32)
    else:
        state = tl.load(start_ptr + (example * tl.num_programs(2) + segment) * E * N + at_en, mask=in_en, other=0.0)
    row = example * LENGTH + segment * SEGMENT
    x_ptrs, step_ptrs, b_ptrs = x_ptr + row * E + e, step_ptr + row * E + e, b_ptr + row * N + n
    left = LENGTH - segment * SEGMENT
    next_x = tl.load(x_ptrs, mask=in_e, other=0.0)
    next_step = tl.load(step_ptrs, mask=in_e, other=0.0)
    for within in range(SEGMENT // SPAN):
        span = segment * (SEGMENT // SPAN) + within
        tl.store(kept_ptr + (example * NUM_SPANS + span) * E * N + at_en, state, mask=in_en & (span < NUM_SPANS))
        for token in tl.range(0, SPAN, num_stages=STAGES):
            t = within * SPAN + token
            x, step = next_x.to(tl.float32), next_step.to(tl.float32)
            x_ptrs += E
            step_ptrs += E
            next_x = tl.load(x_ptrs, mask=in_e & (t + 1 < left), other=0.0)
            next_step = tl.load(step_ptrs, mask=in_e & (t + 1 < left), other=0.0)
            b = tl.load(b_ptrs, mask=in_n & (t < left), other=0.0).to(tl.float32)
            delta = softplus(step + bias)
            state = exp2(delta[:, None] * a) * state + (delta * x)[:, None] * b[None, :]
            b_ptrs += N


@triton.jit
def selective_scan_backward_kernel(
    grad_ptr, x_ptr, step_ptr, a_ptr, b_ptr, c_ptr, skip_ptr, bias_ptr, kept_ptr, last_ptr, scratch_ptr,
    grad_x_ptr, grad_step_ptr, grad_a_ptr, grad_b_ptr, grad_c_ptr, grad_skip_ptr, grad_bias_ptr,
    E, N,
    LENGTH: tl.constexpr, SEGMENT: tl.constexpr, SPAN: tl.constexpr, NUM_SPANS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    example, part, segment = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    place = example * tl.num_programs(2) + segment
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e, in_n = e < E, n < N
    at_en, in_en = e[:, None] * N + n[None, :], in_e[:, None] & in_n[None, :]
    a = tl.load(a_ptr + at_en, mask=in_en, other=0.0).to(tl.float32) * LOG2_E
    skip = tl.load(skip_ptr + e, mask=in_e, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + e, mask=in_e, other=0.0).to(tl.float32)
    scratch_ptr += (place * tl.num_programs(1) + part) * SPAN * BLOCK_E * BLOCK_N
    at_scratch = tl.arange(0, BLOCK_E)[:, None] * BLOCK_N + n[None, :]
    rows_before = part.to(tl.int64) * tl.num_programs(0) * LENGTH  # of the sums over this part's channels
    if last_ptr is None:
        grad_state = tl.zeros((BLOCK_E, BLOCK_N), dtype=tl.float32)
    else:
        grad_state = tl.load(last_ptr + place * E * N + at_en, mask=in_en, other=0.0)
    grad_a = tl.zeros((BLOCK_E, BLOCK_N), dtype=tl.float32)
    grad_skip = tl.zeros((BLOCK_E,), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for back in range(SEGMENT // SPAN):
        span = (segment + 1) * (SEGMENT // SPAN) - 1 - back
        at_kept = (example * NUM_SPANS + span) * E * N + at_en
        state = tl.load(kept_ptr + at_kept, mask=in_en & (span < NUM_SPANS), other=0.0)
        tl.debug_barrier()  # the span before may still be reading the scratch
        for within in range(SPAN):
            t = span * SPAN + within
            row = example * LENGTH + t
            tl.store(scratch_ptr + within * BLOCK_E * BLOCK_N + at_scratch, state)
            here_e, here_n = in_e, in_n
            if LENGTH % SEGMENT:  # the last segment reaches past the end
                here_e, here_n = in_e & (t < LENGTH), in_n & (t < LENGTH)
            x = tl.load(x_ptr + row * E + e, mask=here_e, other=0.0).to(tl.float32)
            step = tl.load(step_ptr + row * E + e, mask=here_e, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + row * N + n, mask=here_n, other=0.0).to(tl.float32)
            delta = softplus(step + bias)
            state = exp2(delta[:, None] * a) * state + (delta * x)[:, None] * b[None, :]
        tl.debug_barrier()
        after = state
        # Registers bind here: what is finished is stored at once, a state is loaded once the one after is done with.
        for later in range(SPAN):
            within = SPAN - 1 - later
            t = span * SPAN + within
            row = example * LENGTH + t
            here_e, here_n = in_e, in_n
            if LENGTH % SEGMENT:
                here_e, here_n = in_e & (t < LENGTH), in_n & (t < LENGTH)
            x = tl.load(x_ptr + row * E + e, mask=here_e, other=0.0).to(tl.float32)
            step = tl.load(step_ptr + row * E + e, mask=here_e, other=0.0).to(tl.float32) + bias
            grad = tl.load(grad_ptr + row * E + e, mask=here_e, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + row * N + n, mask=here_n, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + row * N + n, mask=here_n, other=0.0).to(tl.float32)
            delta = softplus(step)
            decay = exp2(delta[:, None] * a)
            input = delta * x
            grad_c = tl.sum(grad[:, None] * after, 0)
            tl.store(grad_c_ptr + (rows_before + row) * N + n, grad_c, mask=here_n)
            before = tl.load(scratch_ptr + within * BLOCK_E * BLOCK_N + at_scratch)
            after = before
            grad_state += grad[:, None] * c[None, :]
            grad_b = tl.sum(grad_state * input[:, None], 0)
            tl.store(grad_b_ptr + (rows_before + row) * N + n, grad_b, mask=here_n)
            grad_input = tl.sum(grad_state * b[None, :], 1)
            grad_state *= decay
            grad_kept = grad_state * before  # times d(delta a)
            grad_delta = tl.sum(grad_kept * a, 1) * LN_2 + grad_input * x
            grad_a += grad_kept * delta[:, None]
            grad_step = grad_delta * sigmoid(step)
            grad_skip += grad * x
            grad_bias += grad_step  # 0 past the end, where no gradient has come in yet
            grad_x = grad * skip + grad_input * delta
            tl.store(grad_x_ptr + row * E + e, grad_x.to(grad_x_ptr.dtype.element_ty), mask=here_e)
            tl.store(grad_step_ptr + row * E + e, grad_step.to(grad_step_ptr.dtype.element_ty), mask=here_e)
    tl.store(grad_a_ptr + place * E * N + at_en, grad_a, mask=in_en)
    tl.store(grad_skip_ptr + place * E + e, grad_skip, mask=in_e)
    tl.store(grad_bias_ptr + place * E + e, grad_bias, mask=in_e)
