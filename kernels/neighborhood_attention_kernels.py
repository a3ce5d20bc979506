"""The kernels of neighborhood attention (`neighborhood_attention.py` says what they compute, and with which letters).

A program takes a tile of queries of one group and walks the box of keys that any of them attends, a block at a time on
the tensor cores, masking as flash attention does; for the gradients of keys and values the roles are exchanged. A box
is walked in whole rows, or a row in whole blocks, so that no block divides by the box's width.
"""

from mixnas.kernels.dispatch import tl, triton
from mixnas.kernels.fast_math import exp2


@triton.jit
def _first_key(i, n, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first key of query i in a group of n; negative where a causal window begins before the group."""
    if CAUSAL:
        return tl.minimum(i // STRIDE * STRIDE + STRIDE - 1, n - 1) - WINDOW + 1
    leader = tl.minimum(i // STRIDE * STRIDE + STRIDE // 2, n - 1)
    return tl.maximum(tl.minimum(leader - WINDOW // 2, n - WINDOW), 0)


@triton.jit
def _first_query(j, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first query that attends key j."""
    if CAUSAL:
        return j
    least = tl.maximum(j - WINDOW + 1 + WINDOW // 2 - STRIDE // 2, 0)  # of leader - STRIDE // 2
    return tl.where(j < WINDOW, 0, (least + STRIDE - 1) // STRIDE * STRIDE)


@triton.jit
def _span(q, first, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys, counted from the first, query q attends: unsigned, so that one comparison has both ends."""
    span = q * 0 + WINDOW
    if CAUSAL:
        span = q - first + 1
    return span.to(tl.uint32, bitcast=True)


@triton.jit
def _places(block, BLOCK: tl.constexpr, BOX_X: tl.constexpr):
    """Row and column in the box of what a block holds: whole rows of it, or a part of one (`_box_width`)."""
    lane = tl.arange(0, BLOCK)
    if BOX_X <= BLOCK:
        return block * (BLOCK // BOX_X) + lane // BOX_X, lane % BOX_X
    else:
        return lane * 0 + block // (BOX_X // BLOCK), (block % (BOX_X // BLOCK)) * BLOCK + lane


@triton.jit
def _product(x, y, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter would multiply the bits of bfloat16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def neighborhood_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scale,
    H, W, N, D, TILES_X, TILES,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BOX_X: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    ONE_ROW: tl.constexpr = (TILE_Y == 1 and WINDOW_Y == 1) and BOX_X >= BLOCK_INNER  # of all that is walked
    group, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    group_y, group_x = group // DILATION_X, group % DILATION_X
    size_y, size_x = (H - group_y + DILATION_Y - 1) // DILATION_Y, (W - group_x + DILATION_X - 1) // DILATION_X
    start_y, start_x = tile // TILES_X * TILE_Y, tile % TILES_X * TILE_X
    example, head = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, TILE_Y * TILE_X)
    qy, qx = start_y + i // TILE_X, start_x + i % TILE_X
    in_q = (qy < size_y) & (qx < size_x)
    at_q = ((example * H + qy * DILATION_Y + group_y) * W + qx * DILATION_X + group_x) * N + head
    mask_q = in_q[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + at_q[:, None] * D + d[None, :], mask=mask_q, other=0.0)
    box_y = tl.maximum(_first_key(start_y, size_y, WINDOW_Y, STRIDE_Y, CAUSAL_Y), 0)
    box_x = tl.maximum(_first_key(start_x, size_x, WINDOW_X, STRIDE_X, CAUSAL_X), 0)
    first_y = _first_key(qy, size_y, WINDOW_Y, STRIDE_Y, CAUSAL_Y)
    first_x = _first_key(qx, size_x, WINDOW_X, STRIDE_X, CAUSAL_X)
    span_y, span_x = _span(qy, first_y, WINDOW_Y, CAUSAL_Y), _span(qx, first_x, WINDOW_X, CAUSAL_X)
    top = tl.full((TILE_Y * TILE_X,), -1e30, dtype=tl.float32)
    total = tl.zeros((TILE_Y * TILE_X,), dtype=tl.float32)
    out = tl.zeros((TILE_Y * TILE_X, BLOCK_D), dtype=tl.float32)
    for block in range(NUM_BLOCKS):
        row, column = _places(block, BLOCK_INNER, BOX_X)
        ky, kx = box_y + row, box_x + column
        in_k = (ky < size_y) & (kx < size_x)
        at_k = ((example * H + ky * DILATION_Y + group_y) * W + kx * DILATION_X + group_x) * N + head
        mask_k = in_k[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + at_k[:, None] * D + d[None, :], mask=mask_k, other=0.0)
        v = tl.load(v_ptr + at_k[:, None] * D + d[None, :], mask=mask_k, other=0.0)
        seen = (kx[None, :] - first_x[:, None]).to(tl.uint32, bitcast=True) < span_x[:, None]
        if not ONE_ROW:
            seen = seen & ((ky[None, :] - first_y[:, None]).to(tl.uint32, bitcast=True) < span_y[:, None])
        scores = _product(q, tl.trans(k), PRECISION, WIDEN) * scale
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: the first is
        weights = exp2(scores - new_top[:, None])
        shrink = exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + _product(weights.to(v.dtype), v, PRECISION, WIDEN)
        top = new_top
    total = tl.where(in_q, total, 1.0)
    out = out / total[:, None]
    tl.store(out_ptr + at_q[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_q)
    tl.store(lse_ptr + at_q, top + tl.log2(total), mask=in_q)


@triton.jit
def neighborhood_attention_query_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, grad_q_ptr, scale,
    H, W, N, D, TILES_X, TILES,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BOX_X: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    ONE_ROW: tl.constexpr = (TILE_Y == 1 and WINDOW_Y == 1) and BOX_X >= BLOCK_INNER  # of all that is walked
    group, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    group_y, group_x = group // DILATION_X, group % DILATION_X
    size_y, size_x = (H - group_y + DILATION_Y - 1) // DILATION_Y, (W - group_x + DILATION_X - 1) // DILATION_X
    start_y, start_x = tile // TILES_X * TILE_Y, tile % TILES_X * TILE_X
    example, head = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, TILE_Y * TILE_X)
    qy, qx = start_y + i // TILE_X, start_x + i % TILE_X
    in_q = (qy < size_y) & (qx < size_x)
    at_q = ((example * H + qy * DILATION_Y + group_y) * W + qx * DILATION_X + group_x) * N + head
    mask_q = in_q[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + at_q[:, None] * D + d[None, :], mask=mask_q, other=0.0)
    grad = tl.load(grad_ptr + at_q[:, None] * D + d[None, :], mask=mask_q, other=0.0)
    lse = tl.load(lse_ptr + at_q, mask=in_q, other=0.0)
    out = tl.load(out_ptr + at_q[:, None] * D + d[None, :], mask=mask_q, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + at_q, delta, mask=in_q)  # for the gradients of keys and values
    box_y = tl.maximum(_first_key(start_y, size_y, WINDOW_Y, STRIDE_Y, CAUSAL_Y), 0)
    box_x = tl.maximum(_first_key(start_x, size_x, WINDOW_X, STRIDE_X, CAUSAL_X), 0)
    first_y = _first_key(qy, size_y, WINDOW_Y, STRIDE_Y, CAUSAL_Y)
    first_x = _first_key(qx, size_x, WINDOW_X, STRIDE_X, CAUSAL_X)
    span_y, span_x = _span(qy, first_y, WINDOW_Y, CAUSAL_Y), _span(qx, first_x, WINDOW_X, CAUSAL_X)
    grad_q = tl.zeros((TILE_Y * TILE_X, BLOCK_D), dtype=tl.float32)
    for block in range(NUM_BLOCKS):
        row, column = _places(block, BLOCK_INNER, BOX_X)
        ky, kx = box_y + row, box_x + column
        in_k = (ky < size_y) & (kx < size_x)
        at_k = ((example * H + ky * DILATION_Y + group_y) * W + kx * DILATION_X + group_x) * N + head
        mask_k = in_k[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + at_k[:, None] * D + d[None, :], mask=mask_k, other=0.0)
        v = tl.load(v_ptr + at_k[:, None] * D + d[None, :], mask=mask_k, other=0.0)
        seen = (kx[None, :] - first_x[:, None]).to(tl.uint32, bitcast=True) < span_x[:, None]
        if not ONE_ROW:
            seen = seen & ((ky[None, :] - first_y[:, None]).to(tl.uint32, bitcast=True) < span_y[:, None])
        scores = _product(q, tl.trans(k), PRECISION, WIDEN) * scale
        weights = exp2(tl.where(seen, scores - lse[:, None], float("-inf")))
        grad_weights = _product(grad, tl.trans(v), PRECISION, WIDEN)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_q += _product(grad_scores.to(k.dtype), k, PRECISION, WIDEN)
    grad_q *= scale * 0.6931471805599453
    tl.store(grad_q_ptr + at_q[:, None] * D + d[None, :], grad_q.to(grad_q_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def neighborhood_attention_key_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, scale,
    H, W, N, D, TILES_X, TILES,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BOX_X: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    ONE_ROW: tl.constexpr = (TILE_Y == 1 and WINDOW_Y == 1) and BOX_X >= BLOCK_INNER  # of all that is walked
    group, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    group_y, group_x = group // DILATION_X, group % DILATION_X
    size_y, size_x = (H - group_y + DILATION_Y - 1) // DILATION_Y, (W - group_x + DILATION_X - 1) // DILATION_X
    start_y, start_x = tile // TILES_X * TILE_Y, tile % TILES_X * TILE_X
    example, head = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, TILE_Y * TILE_X)
    ky, kx = start_y + i // TILE_X, start_x + i % TILE_X
    in_k = (ky < size_y) & (kx < size_x)
    at_k = ((example * H + ky * DILATION_Y + group_y) * W + kx * DILATION_X + group_x) * N + head
    mask_k = in_k[:, None] & (d < D)[None, :]
    k = tl.load(k_ptr + at_k[:, None] * D + d[None, :], mask=mask_k, other=0.0)
    v = tl.load(v_ptr + at_k[:, None] * D + d[None, :], mask=mask_k, other=0.0)
    box_y = _first_query(start_y, WINDOW_Y, STRIDE_Y, CAUSAL_Y)
    box_x = _first_query(start_x, WINDOW_X, STRIDE_X, CAUSAL_X)
    grad_k = tl.zeros((TILE_Y * TILE_X, BLOCK_D), dtype=tl.float32)
    grad_v = tl.zeros((TILE_Y * TILE_X, BLOCK_D), dtype=tl.float32)
    for block in range(NUM_BLOCKS):
        row, column = _places(block, BLOCK_INNER, BOX_X)
        qy, qx = box_y + row, box_x + column
        in_q = (qy < size_y) & (qx < size_x)
        at_q = ((example * H + qy * DILATION_Y + group_y) * W + qx * DILATION_X + group_x) * N + head
        mask_q = in_q[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + at_q[:, None] * D + d[None, :], mask=mask_q, other=0.0)
        grad = tl.load(grad_ptr + at_q[:, None] * D + d[None, :], mask=mask_q, other=0.0)
        lse = tl.load(lse_ptr + at_q, mask=in_q, other=0.0)
        delta = tl.load(delta_ptr + at_q, mask=in_q, other=0.0)
        first_y = _first_key(qy, size_y, WINDOW_Y, STRIDE_Y, CAUSAL_Y)
        first_x = _first_key(qx, size_x, WINDOW_X, STRIDE_X, CAUSAL_X)
        span_y, span_x = _span(qy, first_y, WINDOW_Y, CAUSAL_Y), _span(qx, first_x, WINDOW_X, CAUSAL_X)
        seen = (kx[:, None] - first_x[None, :]).to(tl.uint32, bitcast=True) < span_x[None, :]
        if not ONE_ROW:
            seen = seen & ((ky[:, None] - first_y[None, :]).to(tl.uint32, bitcast=True) < span_y[None, :])
        scores = _product(k, tl.trans(q), PRECISION, WIDEN) * scale
        weights = exp2(tl.where(seen, scores - lse[None, :], float("-inf")))
        grad_v += _product(weights.to(grad.dtype), grad, PRECISION, WIDEN)
        grad_weights = _product(v, tl.trans(grad), PRECISION, WIDEN)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_k += _product(grad_scores.to(q.dtype), q, PRECISION, WIDEN)
    grad_k *= scale * 0.6931471805599453
    tl.store(grad_k_ptr + at_k[:, None] * D + d[None, :], grad_k.to(grad_k_ptr.dtype.element_ty), mask=mask_k)
    tl.store(grad_v_ptr + at_k[:, None] * D + d[None, :], grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask_k)
