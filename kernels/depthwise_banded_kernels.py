"""The kernels of the depthwise convolution on the tensor cores (`depthwise_banded.py` says what they compute).

A plane is one channel of all images: R = B*H rows of PITCH columns, PITCH the width rounded up, zeros behind the width.
"""

from mixnas.kernels.dispatch import tl, triton
from mixnas.kernels.epilogue import activate


@triton.jit
def depthwise_planes_kernel(
    x_ptr,  # (R, W, C)
    plane_ptr,  # (C, R, PITCH)
    size,  # R * PITCH
    width,
    channels,
    PITCH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    across = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    down = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    place, c = across[:, None], down[None, :]
    across, down = across[None, :], down[:, None]
    row, x = place // PITCH, place % PITCH
    at = (row.to(tl.int64) * width + x) * channels + c
    value = tl.load(x_ptr + at, mask=(place < size) & (x < width) & (c < channels), other=0.0)
    target = plane_ptr + down.to(tl.int64) * size + across
    tl.store(target, tl.trans(value), mask=(across < size) & (down < channels))


@triton.jit
def depthwise_bands_kernel(
    weight_ptr,  # (I*J, C)
    band_ptr,  # (C, DOWN, 8, LENGTH)
    channels,
    FIRST: tl.constexpr,  # of the weight's taps: the first that is used
    STEP: tl.constexpr,  # from one to the next: 1, or -1 for the gradient of the input
    TAPS_PITCH: tl.constexpr,  # taps from one row of the weight to the next
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    LAST: tl.constexpr,  # entry `place` of the copy shifted by s is tap LAST - place - s
    LENGTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    across = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    down = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    entry, c = across[:, None], down[None, :]
    across, down = across[None, :], down[:, None]
    i = tl.program_id(2)
    tap = LAST - entry % LENGTH - entry // LENGTH
    at = (FIRST + STEP * (i * TAPS_PITCH + tap)) * channels + c
    value = tl.load(weight_ptr + at, mask=(tap >= 0) & (tap < ACROSS) & (c < channels), other=0.0)
    target = band_ptr + (down.to(tl.int64) * DOWN + i) * 8 * LENGTH + across
    tl.store(target, tl.trans(value).to(band_ptr.dtype.element_ty), mask=(across < 8 * LENGTH) & (down < channels))


@triton.jit(do_not_specialize=["rows"])
def depthwise_banded_kernel(
    plane_ptr,  # (C, R, PITCH)
    band_ptr,  # (C, DOWN, 8, LENGTH)
    bias_ptr,  # (C,) or None
    out_ptr,  # (C, R, PITCH)
    rows,  # R
    height,
    size,  # R * PITCH
    PITCH: tl.constexpr,
    DOWN: tl.constexpr,
    TOP: tl.constexpr,
    FROM: tl.constexpr,  # entry of a band where the product of a block with itself begins
    LENGTH: tl.constexpr,
    SPAN: tl.constexpr,  # blocks of columns that reach into one: 1, or 3 where a row has several
    GROUP: tl.constexpr,  # rows of taps that a product takes
    BLOCK_X: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = (PITCH + BLOCK_X - 1) // BLOCK_X
    STEPS: tl.constexpr = (DOWN + GROUP - 1) // GROUP * SPAN
    blocks_m = tl.cdiv(rows, BLOCK_M)
    block = tl.program_id(0) % BLOCKS
    m = ((tl.program_id(0) // BLOCKS) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) // (BLOCKS * blocks_m)).to(tl.int64)
    y = m % height
    x = block * BLOCK_X + tl.arange(0, BLOCK_X)
    # The inner dimension of a product: columns of the input, of several rows of taps where a row of the map is short.
    inner = tl.arange(0, GROUP * BLOCK_X)
    k = inner % BLOCK_X
    plane_ptr += c * size
    band_ptr += c * DOWN * 8 * LENGTH
    acc = tl.zeros((BLOCK_M, BLOCK_X), dtype=tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        i = (step // SPAN) * GROUP + inner // BLOCK_X
        beside = step % SPAN - SPAN // 2
        column = block * BLOCK_X + k + beside * BLOCK_X
        row = y[:, None] + i[None, :] - TOP
        column_ok = (column >= 0) & (column < PITCH) & (i < DOWN)
        ok = (m < rows)[:, None] & (row >= 0) & (row < height) & column_ok[None, :]
        a = tl.load(plane_ptr + (m[:, None] + i[None, :] - TOP) * PITCH + column[None, :], mask=ok, other=0.0)
        # Row k of the matrix holds the taps from k on, backwards: the copy of the band shifted by as much modulo 8
        # is read at a multiple of 8, eight taps at once.
        start = FROM - beside * BLOCK_X - k
        band = band_ptr + (i * 8 + start % 8) * LENGTH + (start // 8) * 8
        t = tl.load(band[:, None] + tl.arange(0, BLOCK_X)[None, :], mask=(i < DOWN)[:, None], other=0.0)
        if WIDEN:
            a, t = a.to(tl.float32), t.to(tl.float32)
        acc = tl.dot(a, t, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c).to(tl.float32)
    target = out_ptr + c * size + m[:, None] * PITCH + x[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (x < PITCH)[None, :])


@triton.jit
def depthwise_maps_kernel(
    plane_ptr,  # (C, R, PITCH)
    gate_ptr,  # (R, W, C) or None
    out_ptr,  # (R, W, C)
    pre_ptr,  # (R, W, C) or None: what the activation is applied to, for the backward
    size,  # R * PITCH
    width,
    channels,
    PITCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    across = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    down = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    place, c = across[:, None], down[None, :]
    across, down = across[None, :], down[:, None]
    inside = (across < size) & (down < channels)
    value = tl.trans(tl.load(plane_ptr + down.to(tl.int64) * size + across, mask=inside, other=0.0))
    row, x = place // PITCH, place % PITCH
    at = (row.to(tl.int64) * width + x) * channels + c
    ok = (place < size) & (x < width) & (c < channels)
    if pre_ptr is not None:
        tl.store(pre_ptr + at, value, mask=ok)
    value = activate(value.to(tl.float32), ACTIVATION)
    if gate_ptr is not None:
        value *= tl.load(gate_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows", "steps"])
def depthwise_correlation_kernel(
    grad_ptr,  # (C, R, PITCH)
    plane_ptr,  # (C, R, PITCH)
    partial_ptr,  # (C, splits * BLOCKS * SPAN, BLOCK_X, DOWN, ACROSS) float32
    rows,  # R
    height,
    size,  # R * PITCH
    steps,  # blocks of rows that a program goes through
    PITCH: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,  # rows of taps that a program takes
    TAPS: tl.constexpr,  # a power of two, at least GROUP * ACROSS
    BLOCK_X: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = (PITCH + BLOCK_X - 1) // BLOCK_X
    GROUPS: tl.constexpr = (DOWN + GROUP - 1) // GROUP
    c = (tl.program_id(0) // GROUPS).to(tl.int64)
    part = tl.program_id(1)
    beside = part % SPAN - SPAN // 2
    block = (part // SPAN) % BLOCKS
    split = part // (SPAN * BLOCKS)
    x = block * BLOCK_X + tl.arange(0, BLOCK_X)
    inner = tl.arange(0, GROUP * BLOCK_X)
    within = inner // BLOCK_X
    i = (tl.program_id(0) % GROUPS) * GROUP + within
    column = (block + beside) * BLOCK_X + inner % BLOCK_X
    in_grad = (x < PITCH)[None, :]
    in_plane = ((column >= 0) & (column < PITCH) & (i < DOWN))[None, :]
    grad_ptr += c * size
    plane_ptr += c * size
    acc = tl.zeros((BLOCK_X, GROUP * BLOCK_X), dtype=tl.float32)  # [column of the gradient, column of the input]
    for step in tl.range(0, steps, num_stages=STAGES):
        m = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = (m % height)[:, None] + i[None, :] - TOP
        ok = (m < rows)[:, None] & (row >= 0) & (row < height) & in_plane
        g = tl.load(grad_ptr + m[:, None] * PITCH + x[None, :], mask=(m < rows)[:, None] & in_grad, other=0.0)
        a = tl.load(plane_ptr + (m[:, None] + i[None, :] - TOP) * PITCH + column[None, :], mask=ok, other=0.0)
        if WIDEN:
            g, a = g.to(tl.float32), a.to(tl.float32)
        acc = tl.dot(tl.trans(g), a, acc)
    # The gradient of a tap is the sum of a diagonal: what each column of the gradient adds to each tap goes to memory,
    # and is summed over columns with what other programs found. Taps that meet no column of this block add nothing.
    local = tl.arange(0, BLOCK_X)
    tap = (inner % BLOCK_X)[None, :] - local[:, None] + beside * BLOCK_X + LEFT
    first = (c * tl.num_programs(1) + part) * BLOCK_X * DOWN * ACROSS
    at = first + local[:, None] * DOWN * ACROSS + (i * ACROSS)[None, :] + tap
    tl.store(partial_ptr + at, acc, mask=(tap >= 0) & (tap < ACROSS) & (i < DOWN)[None, :])
    j = tl.arange(0, TAPS)
    k = local[:, None] + (j % ACROSS)[None, :] - LEFT - beside * BLOCK_X
    row = (tl.program_id(0) % GROUPS) * GROUP + j // ACROSS
    at = first + local[:, None] * DOWN * ACROSS + (row * ACROSS + j % ACROSS)[None, :]
    inside = (row < DOWN) & (j < GROUP * ACROSS)
    tl.store(partial_ptr + at, k * 0.0, mask=((k < 0) | (k >= BLOCK_X)) & inside[None, :])
