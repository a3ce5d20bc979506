"""The kernels of gated linear attention (`gated_linear_attention.py` says what they compute, and with which letters).

The tokens are cut into chunks, and all chunks run side by side. `states` finds what a chunk adds to S, as if it began
with none, and how much it lets S decay; `chain` turns that into S at the border of each chunk. Within a chunk the pairs
of tokens are a binary tree: those between the halves of a block, then those within each half, down to single tokens.
The decay between two tokens on either side of a middle is the product of the decays from each of them to the middle,
which are both at most 1 whatever the decays are; so the pairs of one level are one matrix product, and a chunk of 64
takes 6 exponentials for each of its elements. Sums of log decays to a middle are products with a matrix of zeros and
ones: no differences of running sums, nothing to cancel.

Causally a query stands after its keys (direction 0); from the last token to the first it stands before them (direction
1). A query's decay counts its own token (OWN), a key's doesn't. In v's gradient the key is what the result belongs to.
"""

from mixnas.kernels.dispatch import tl, triton
from mixnas.kernels.fast_math import LOG2_E, exp2


@triton.jit
def _product(x, y, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter would multiply the bits of bfloat16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _decay(reach, g, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """The decays of rows to a border: `reach` says which tokens lie between, g (C, D) are their log decays."""
    return exp2(_product(reach.to(tl.float32).to(g.dtype), g, PRECISION, WIDEN) * LOG2_E)


@triton.jit
def _to_border(direction, BLOCK_C: tl.constexpr, QUERY: tl.constexpr):
    """Which tokens (columns) lie between a token (rows) and the border of its chunk that S or its gradient is at."""
    i = tl.arange(0, BLOCK_C)
    ahead = (i[None, :] - i[:, None]) * (1 - 2 * direction)
    return ahead <= 0 if QUERY else ahead > 0


@triton.jit
def _to_middle(level, direction, BLOCK_C: tl.constexpr):
    """Which tokens lie between one and the middle of its block, 2^level in each half; which are in queries' halves."""
    i = tl.arange(0, BLOCK_C)
    half = i >> level
    second = half & 1
    same = half[:, None] == half[None, :]
    beyond = i[None, :] + direction > i[:, None]
    return same & ((second[:, None] == 1) ^ beyond), (second ^ direction) == 1


@triton.jit
def _within(x, level, BLOCK_C: tl.constexpr):
    """Pairs (C, C) whose tokens are in one block of the tree; others become 0."""
    block = tl.arange(0, BLOCK_C) >> (level + 1)
    return tl.where(block[:, None] == block[None, :], x, 0.0)


@triton.jit
def _pairs(
    scores, to, source, g, level, direction,
    OWN: tl.constexpr, PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add the products of `to` (rows; queries if OWN) and `source` between the halves of blocks."""
    reach, query = _to_middle(level, direction, BLOCK_C)
    decay = _decay(reach, g, DECAY_PRECISION, WIDEN)
    here = query[:, None] if OWN else (query == 0)[:, None]
    left = tl.where(here, to.to(tl.float32) * decay, 0.0).to(to.dtype)
    right = tl.where(here, 0.0, source.to(tl.float32) * decay).to(to.dtype)
    return scores + _within(_product(left, tl.trans(right), PRECISION, WIDEN), level, BLOCK_C)


@triton.jit(do_not_specialize=["L", "CHUNKS"])
def gated_linear_attention_states_kernel(
    key_ptr, value_ptr, decay_ptr, reverse_ptr, state_ptr, kept_ptr,
    L, H, D, E, CHUNKS,
    OWN: tl.constexpr,  # the "keys" are queries, the "values" the output's gradient
    PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, sequence = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    direction, blocks_e = tl.program_id(1), tl.cdiv(E, BLOCK_E)
    part, part_e = tl.program_id(2) // blocks_e, tl.program_id(2) % blocks_e
    if direction == 1:
        decay_ptr = reverse_ptr
    t = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    e = part_e * BLOCK_E + tl.arange(0, BLOCK_E)
    row = ((sequence // H).to(tl.int64) * L + t) * H + sequence % H
    in_d = (t < L)[:, None] & (d < D)[None, :]
    in_e = (t < L)[:, None] & (e < E)[None, :]
    g = tl.load(decay_ptr + row[:, None] * D + d[None, :], mask=in_d, other=0.0)
    k = tl.load(key_ptr + row[:, None] * D + d[None, :], mask=in_d, other=0.0)
    v = tl.load(value_ptr + row[:, None] * E + e[None, :], mask=in_e, other=0.0)
    k = (k.to(tl.float32) * _decay(_to_border(direction, BLOCK_C, OWN), g, DECAY_PRECISION, WIDEN)).to(k.dtype)
    added = _product(tl.trans(k), v, PRECISION, WIDEN)
    place = (direction * (tl.num_programs(0) // CHUNKS) + sequence).to(tl.int64) * CHUNKS + chunk
    at = place * D * E + d[:, None] * E + e[None, :]
    tl.store(state_ptr + at, added.to(state_ptr.dtype.element_ty), mask=(d < D)[:, None] & (e < E)[None, :])
    tl.store(kept_ptr + place * D + d, tl.sum(g.to(tl.float32), 0) * LOG2_E, mask=(d < D) & (part_e == 0))


@triton.jit
def gated_linear_attention_chain_kernel(
    state_ptr, kept_ptr,
    D, E, DE,
    CHUNKS: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # In place: what a chunk adds is replaced by what comes to the chunk from the others.
    sequence, direction = tl.program_id(0), tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first = (direction * tl.num_programs(0) + sequence).to(tl.int64) * CHUNKS
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    backwards = direction == 0 if OWN else direction == 1
    for walked in tl.range(0, CHUNKS, num_stages=STAGES):
        place = first + tl.where(backwards, CHUNKS - 1 - walked, walked)
        added = tl.load(state_ptr + place * DE + at, mask=at < DE, other=0.0)
        kept = tl.load(kept_ptr + place * D + at // E, mask=at < DE, other=0.0)
        tl.store(state_ptr + place * DE + at, state.to(state_ptr.dtype.element_ty), mask=at < DE)
        state = exp2(kept) * state + added.to(tl.float32)


@triton.jit(do_not_specialize=["L", "CHUNKS"])
def gated_linear_attention_forward_kernel(
    to_ptr, source_ptr, value_ptr, decay_ptr, reverse_ptr, state_ptr, out_ptr, scale,
    L, H, D, E, CHUNKS,
    DIRECTIONS: tl.constexpr, PARTS: tl.constexpr,
    OWN: tl.constexpr,  # rows are queries; otherwise keys, which the gradient of v belongs to
    LEVELS: tl.constexpr, PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, sequence = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    i = tl.arange(0, BLOCK_C)
    t = chunk * BLOCK_C + i
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = ((sequence // H).to(tl.int64) * L + t) * H + sequence % H
    at_e, in_e = row[:, None] * E + e[None, :], (t < L)[:, None] & (e < E)[None, :]
    scores = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
    out = tl.zeros((BLOCK_C, BLOCK_E), dtype=tl.float32)
    for step in range(PARTS * DIRECTIONS):
        direction = step % DIRECTIONS
        d = (step // DIRECTIONS) * BLOCK_D + tl.arange(0, BLOCK_D)
        at_d, in_d = row[:, None] * D + d[None, :], (t < L)[:, None] & (d < D)[None, :]
        to = tl.load(to_ptr + at_d, mask=in_d, other=0.0)
        source = tl.load(source_ptr + at_d, mask=in_d, other=0.0)
        own = tl.sum(to.to(tl.float32) * source.to(tl.float32), 1)  # a token is its own in each direction
        scores += tl.where(i[:, None] == i[None, :], own[:, None], 0.0)
        g_ptr = decay_ptr
        if direction == 1:
            g_ptr = reverse_ptr
        g = tl.load(g_ptr + at_d, mask=in_d, other=0.0)
        for level in range(LEVELS):
            scores = _pairs(scores, to, source, g, level, direction, OWN, PRECISION, DECAY_PRECISION, WIDEN, BLOCK_C)
        if state_ptr is not None:
            place = (direction * (tl.num_programs(0) // CHUNKS) + sequence).to(tl.int64) * CHUNKS + chunk
            at_state = place * D * E + d[:, None] * E + e[None, :]
            state = tl.load(state_ptr + at_state, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
            decay = _decay(_to_border(direction, BLOCK_C, OWN), g, DECAY_PRECISION, WIDEN)
            out += _product((to.to(tl.float32) * decay).to(state.dtype), state, PRECISION, WIDEN)
    v = tl.load(value_ptr + at_e, mask=in_e, other=0.0)
    out += _product(scores.to(v.dtype), v, PRECISION, WIDEN)
    tl.store(out_ptr + at_e, (out * scale).to(out_ptr.dtype.element_ty), mask=in_e)


@triton.jit
def _pair_gradients(
    grad_q, grad_k, pairs, q, k, g, level, direction,
    PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add the gradients of q and k through the pairs between the halves of blocks."""
    reach, query = _to_middle(level, direction, BLOCK_C)
    decay = _decay(reach, g, DECAY_PRECISION, WIDEN)
    of_queries = tl.where(query[:, None], decay, 0.0)
    of_keys = tl.where(query[:, None], 0.0, decay)
    here = _within(pairs, level, BLOCK_C)
    grad_q += of_queries * _product(here, (k.to(tl.float32) * of_keys).to(k.dtype), PRECISION, WIDEN)
    grad_k += of_keys * _product(tl.trans(here), (q.to(tl.float32) * of_queries).to(q.dtype), PRECISION, WIDEN)
    return grad_q, grad_k


@triton.jit(do_not_specialize=["L", "CHUNKS"])
def gated_linear_attention_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, decay_ptr, reverse_ptr, state_ptr, grad_state_ptr,
    grad_q_ptr, grad_k_ptr, grad_decay_ptr, grad_reverse_ptr, scale,
    L, H, D, E, CHUNKS,
    DIRECTIONS: tl.constexpr, PARTS: tl.constexpr, PARTS_E: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, sequence = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    i = tl.arange(0, BLOCK_C)
    t = chunk * BLOCK_C + i
    row = ((sequence // H).to(tl.int64) * L + t) * H + sequence % H
    pairs = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)  # [query, key]
    for part_e in range(PARTS_E):
        e = part_e * BLOCK_E + tl.arange(0, BLOCK_E)
        at_e, in_e = row[:, None] * E + e[None, :], (t < L)[:, None] & (e < E)[None, :]
        v = tl.load(v_ptr + at_e, mask=in_e, other=0.0)
        grad = tl.load(grad_ptr + at_e, mask=in_e, other=0.0)
        pairs += _product(grad, tl.trans(v), PRECISION, WIDEN)
    own = tl.sum(tl.where(i[:, None] == i[None, :], pairs, 0.0), 1)[:, None] * DIRECTIONS
    pairs = pairs.to(q_ptr.dtype.element_ty)
    for part in range(PARTS):
        d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        at_d, in_d = row[:, None] * D + d[None, :], (t < L)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + at_d, mask=in_d, other=0.0)
        k = tl.load(k_ptr + at_d, mask=in_d, other=0.0)
        total_q, total_k = own * k.to(tl.float32), own * q.to(tl.float32)
        for direction in range(DIRECTIONS):
            g_ptr = decay_ptr
            if direction == 1:
                g_ptr = reverse_ptr
            g = tl.load(g_ptr + at_d, mask=in_d, other=0.0)
            grad_q = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
            grad_k = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
            beyond = tl.zeros((BLOCK_D,), dtype=tl.float32)
            if state_ptr is not None:
                place = (direction * (tl.num_programs(0) // CHUNKS) + sequence).to(tl.int64) * CHUNKS + chunk
                onwards = 1 - 2 * direction
                there = (chunk + onwards >= 0) & (chunk + onwards < CHUNKS)
                for part_e in range(PARTS_E):
                    e = part_e * BLOCK_E + tl.arange(0, BLOCK_E)
                    at_e, in_e = row[:, None] * E + e[None, :], (t < L)[:, None] & (e < E)[None, :]
                    at_state = place * D * E + d[:, None] * E + e[None, :]
                    in_state = (d < D)[:, None] & (e < E)[None, :]
                    state = tl.load(state_ptr + at_state, mask=in_state, other=0.0)
                    grad = tl.load(grad_ptr + at_e, mask=in_e, other=0.0).to(state.dtype)
                    grad_q += _product(grad, tl.trans(state), PRECISION, WIDEN)
                    grad_state = tl.load(grad_state_ptr + at_state, mask=in_state, other=0.0)
                    v = tl.load(v_ptr + at_e, mask=in_e, other=0.0).to(state.dtype)
                    grad_k += _product(v, tl.trans(grad_state), PRECISION, WIDEN)
                    # S as it leaves the chunk is what comes to the next; its product with its gradient is what all
                    # later tokens together change by a decay here.
                    left = tl.load(state_ptr + at_state + onwards * D * E, mask=in_state & there, other=0.0)
                    beyond += tl.sum(left.to(tl.float32) * grad_state.to(tl.float32), 1)
                grad_q *= _decay(_to_border(direction, BLOCK_C, True), g, DECAY_PRECISION, WIDEN)
                grad_k *= _decay(_to_border(direction, BLOCK_C, False), g, DECAY_PRECISION, WIDEN)
            for level in range(LEVELS):
                grad_q, grad_k = _pair_gradients(
                    grad_q, grad_k, pairs, q, k, g, level, direction, PRECISION, DECAY_PRECISION, WIDEN, BLOCK_C
                )
            # Decays act through e^{b_i - b_j} alone: d/db_t is q_t dq_t - k_t dk_t, and a decay moves all later b.
            moved = q.to(tl.float32) * grad_q - k.to(tl.float32) * grad_k
            later = _to_border(1 - direction, BLOCK_C, True).to(tl.float32)
            grad_decay = (_product(later, moved, DECAY_PRECISION, WIDEN) + beyond[None, :]) * scale
            target = grad_decay_ptr
            if direction == 1:
                target = grad_reverse_ptr
            tl.store(target + at_d, grad_decay.to(grad_decay_ptr.dtype.element_ty), mask=in_d)
            total_q += grad_q
            total_k += grad_k
        tl.store(grad_q_ptr + at_d, (total_q * scale).to(grad_q_ptr.dtype.element_ty), mask=in_d)
        tl.store(grad_k_ptr + at_d, (total_k * scale).to(grad_k_ptr.dtype.element_ty), mask=in_d)
