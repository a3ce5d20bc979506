"""Neighborhood attention in one and two dimensions with window, stride and dilation, forward and backward.

Generalized Neighborhood Attention, Hassani et al. 2025 (arXiv:2504.16922), on Neighborhood Attention Transformer
(arXiv:2204.07143) and its dilation (arXiv:2209.15001). Along a dimension, tokens whose positions are equal modulo the
dilation form a group; within one of n tokens, query i has the leader l = min(i // s * s + s // 2, n - 1) and attends
the w keys around l, moved inwards at the borders: always w keys. Causal dimensions: l = min(i // s * s + s - 1, n - 1),
and the keys j <= i with l - j < w. Stride 1 slides; stride w is attention in blocks; w = n is full attention.

Shapes: B examples, H x W positions (sequences: 1 x L), N heads, D channels of a head.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from mixnas.kernels import configs, dispatch
from mixnas.kernels.dispatch import as_autocast, cdiv, choose, launch, next_power_of_2, tracing
from mixnas.kernels.neighborhood_attention_kernels import (
    neighborhood_attention_forward_kernel,
    neighborhood_attention_key_gradient_kernel,
    neighborhood_attention_query_gradient_kernel,
)
from mixnas.kernels.tools.aot import Example
from mixnas.kernels.work import counted

MAX_HEAD_CHANNELS = 128
_LOG2_E = math.log2(math.e)
_MOST_HEADS = 65535  # of a launch


# -- which keys: plain integers ---------------------------------------------------------------------------------------


def keys_of(i: int, n: int, window: int, stride: int = 1, causal: bool = False) -> range:
    """Return the keys that query `i` attends in a group of `n` tokens (dilation 1)."""
    if causal:
        leader = min(i // stride * stride + stride - 1, n - 1)
        return range(max(leader - window + 1, 0), i + 1)
    first = max(min(min(i // stride * stride + stride // 2, n - 1) - window // 2, n - window), 0)
    return range(first, min(first + window, n))


def attended(n: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> list[list[int]]:
    """Return the keys of each of `n` positions along one dimension."""
    found = []
    for position in range(n):
        group, size = position % dilation, cdiv(n - position % dilation, dilation)
        found.append([j * dilation + group for j in keys_of(position // dilation, size, window, stride, causal)])
    return found


def num_pairs(size: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
              causal: Sequence[bool]) -> int:  # fmt: skip
    """Return how many (query, key) pairs attend, one head of one example."""
    dimensions = zip(size, window, stride, dilation, causal, strict=True)
    return math.prod(_num_keys(*dimension) for dimension in dimensions)


@functools.lru_cache(maxsize=4096)
def _num_keys(n: int, window: int, stride: int, dilation: int, causal: bool) -> int:
    """Return how many (query, key) pairs attend along one dimension."""
    sizes = [cdiv(n - group, dilation) for group in range(min(dilation, n))]
    return sum(len(keys_of(i, size, window, stride, causal)) for size in sizes for i in range(size))


@functools.cache
def _boxes(n: int, window: int, stride: int, dilation: int, causal: bool, tile: int) -> tuple[int, int]:
    """Return the widest box of keys that a tile of queries attends, and of queries that attend a tile of keys."""
    keys = queries = 1
    for size in {cdiv(n - group, dilation) for group in range(min(dilation, n))}:
        seen = [keys_of(i, size, window, stride, causal) for i in range(size)]
        for start in range(0, size, tile):
            end = min(start + tile, size)
            keys = max(keys, seen[end - 1].stop - seen[start].start)
            least = max(start - window + 1 + window // 2 - stride // 2, 0)  # as `_first_query`
            first = start if causal else 0 if start < window else cdiv(least, stride) * stride
            last = max(i for i in range(size) if seen[i].start < end and seen[i].stop > start)
            queries = max(queries, last - first + 1)
    return keys, queries


def neighborhood_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: Sequence[int],
    stride: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    causal: Sequence[bool] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax over all pairs with the mask of the definition, in the dtype given."""
    size = q.shape[1:-2]
    stride, dilation, causal = _complete(window, stride, dilation, causal)
    masks = []
    for along in zip(size, window, stride, dilation, causal, strict=True):
        mask = torch.zeros(along[0], along[0], dtype=torch.bool, device=q.device)
        for position, keys in enumerate(attended(*along)):
            mask[position, keys] = True
        masks.append(mask)
    mask = masks[0] if len(masks) == 1 else torch.einsum("ik,jl->ijkl", *masks).flatten(2).flatten(0, 1)
    q_L, k_L, v_L = (x.flatten(1, -3) for x in (q, k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q_L, k_L) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bnqk,bknd->bqnd", weights, v_L).view_as(v)


# -- ATen: scaled_dot_product_attention over tiles ---------------------------------------------------------------------

_DENSE = 512  # tokens of a group up to which one masked product is faster than tiles
_TILE = (8, 64)


_Along = tuple[int, int, int, bool, int, int, int, int]  # n, window, stride, causal, queries' and keys' start and end


def _bias(along_y: _Along, along_x: _Along, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return 0 where a tile's queries attend a box's keys and -inf elsewhere, (queries, keys)."""
    masks = []
    for n, window, stride, causal, start, end, box_start, box_end in (along_y, along_x):
        seen = [keys_of(i, n, window, stride, causal) for i in range(start, end)]
        masks.append(torch.tensor([[j in keys for j in range(box_start, box_end)] for keys in seen], device=device))
    mask = (masks[0][:, None, :, None] & masks[1][None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, float("-inf"))


@functools.lru_cache(maxsize=256)
def _kept_bias(along_y: _Along, along_x: _Along, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # may be saved for a backward pass later
        return _bias(along_y, along_x, dtype, device)


def _aten_group(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Sequence[int], stride: Sequence[int],
                causal: Sequence[bool], scale: float) -> torch.Tensor:  # fmt: skip
    """Attention within one dilation group, (B, N, H, W, D)."""
    H, W = q.shape[2:4]
    tile_y, tile_x = (H, W) if H * W <= _DENSE else _TILE
    make = _bias if tracing() else _kept_bias
    rows = []
    for y in range(0, H, tile_y):
        row = []
        for x in range(0, W, tile_x):
            boxes: list[slice] = []
            along: list[_Along] = []
            for axis, (start, tile, n) in enumerate(((y, tile_y, H), (x, tile_x, W))):
                end = min(start + tile, n)
                options = (n, window[axis], stride[axis], causal[axis])
                first, last = keys_of(start, *options).start, keys_of(end - 1, *options).stop
                boxes.append(slice(first, last))
                along.append((*options, start, end, first, last))
            bias = None
            if any(causal) or window[0] < H or window[1] < W:
                bias = make(along[0], along[1], q.dtype, q.device)
            q_tile = q[:, :, y : y + tile_y, x : x + tile_x]
            k_box, v_box = (t[:, :, boxes[0], boxes[1]].flatten(2, 3) for t in (k, v))
            out = F.scaled_dot_product_attention(q_tile.flatten(2, 3), k_box, v_box, attn_mask=bias, scale=scale)
            row.append(out.view(q_tile.shape))
        rows.append(row[0] if len(row) == 1 else torch.cat(row, 3))
    return rows[0] if len(rows) == 1 else torch.cat(rows, 2)


def _aten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Sequence[int], stride: Sequence[int],
          dilation: Sequence[int], causal: Sequence[bool], scale: float) -> torch.Tensor:  # fmt: skip
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))
    if tuple(dilation) == (1, 1):
        out = _aten_group(q, k, v, window, stride, causal, scale)
    else:
        out = torch.empty_like(q)
        for y in range(min(dilation[0], q.shape[2])):
            for x in range(min(dilation[1], q.shape[3])):
                q_g, k_g, v_g = (t[:, :, y :: dilation[0], x :: dilation[1]] for t in (q, k, v))
                attended_to = _aten_group(q_g, k_g, v_g, window, stride, causal, scale)
                out[:, :, y :: dilation[0], x :: dilation[1]] = attended_to
    return out.permute(0, 2, 3, 1, 4)


# -- Triton -----------------------------------------------------------------------------------------------------------


def _box_width(needed: int, block: int) -> int:
    """Return how wide a box is walked: so that a block holds whole rows of it, or a row whole blocks."""
    return next_power_of_2(needed) if needed <= block else cdiv(needed, block) * block


def _geometry(kernel: str, q: torch.Tensor, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
              causal: Sequence[bool]) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int | str]]:  # fmt: skip
    """Return the grid, the integers after the tensors, and the constants and options of a launch."""
    B, H, W, N, D = q.shape
    config = dict(configs.pick(kernel, q, head_channels=D, bits=8 * q.element_size(), positions=B * H * W))
    block = config.pop("BLOCK_OUTER")
    lengths = cdiv(H, dilation[0]), cdiv(W, dilation[1])
    tile_y = min(next_power_of_2(lengths[0]), 1 << (block.bit_length() // 2))
    tiles = (tile_y, block // tile_y)
    which = 1 if kernel.endswith("key_gradient") else 0
    box = [
        _boxes(n, w, s, d, c, t)[which]
        for n, w, s, d, c, t in zip((H, W), window, stride, dilation, causal, tiles, strict=True)
    ]
    counts = [cdiv(length, tile) for length, tile in zip(lengths, tiles, strict=True)]
    groups = min(dilation[0], H) * dilation[1]
    options: dict[str, int | str] = {
        "TILE_Y": tiles[0],
        "TILE_X": tiles[1],
        "BOX_X": (width := _box_width(box[1], config["BLOCK_INNER"])),
        "NUM_BLOCKS": cdiv(box[0] * width, config["BLOCK_INNER"]),
        "BLOCK_D": max(16, next_power_of_2(D)),
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "WIDEN": dispatch.INTERPRETING,
    }
    named = {"WINDOW": window, "STRIDE": stride, "DILATION": dilation, "CAUSAL": causal}
    for name, (along_y, along_x) in named.items():
        options |= {f"{name}_Y": along_y, f"{name}_X": along_x}
    integers = (H, W, N, D, counts[1], counts[0] * counts[1])
    return (groups * counts[0] * counts[1], B * N), integers, options | config


def _in_pieces(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Cut the examples where all heads of all are more than a grid's second axis holds."""
    examples, heads = tensors[0].shape[0], tensors[0].shape[3]
    if examples * heads <= _MOST_HEADS:
        return [tensors]
    return list(zip(*(tensor.split(max(1, _MOST_HEADS // heads)) for tensor in tensors), strict=True))


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = torch.empty_like(v)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)  # of the scores in base 2
    for q_p, *others in _in_pieces(q, k, v, out, lse):
        grid, integers, options = _geometry("neighborhood_attention_forward", q_p, window, stride, dilation, causal)
        tensors = (q_p, *others)
        launch(neighborhood_attention_forward_kernel, grid, *tensors, scale * _LOG2_E, *integers, **options)
    return out, lse


_attention = torch.library.custom_op("mixnas::neighborhood_attention", _forward, mutates_args=())


@_attention.register_fake
def _(q, k, v, window, stride, dilation, causal, scale):
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, q, k, v, out = (x.contiguous() for x in (grad, q, k, v, out))
    delta = torch.empty_like(lse)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scale = scale * _LOG2_E
    options = (window, stride, dilation, causal)
    for tensors in _in_pieces(grad, q, k, v, out, lse, delta, grad_q):
        grid, integers, constants = _geometry("neighborhood_attention_query_gradient", tensors[1], *options)
        launch(neighborhood_attention_query_gradient_kernel, grid, *tensors, scale, *integers, **constants)
    for tensors in _in_pieces(grad, q, k, v, lse, delta, grad_k, grad_v):
        grid, integers, constants = _geometry("neighborhood_attention_key_gradient", tensors[1], *options)
        launch(neighborhood_attention_key_gradient_kernel, grid, *tensors, scale, *integers, **constants)
    return grad_q, grad_k, grad_v


_attention_backward = torch.library.custom_op("mixnas::neighborhood_attention_backward", _backward, mutates_args=())


@_attention_backward.register_fake
def _(grad, q, k, v, out, lse, window, stride, dilation, causal, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, grad, grad_lse):
    grads = _attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_setup_context)


def _complete(window: Sequence[int], stride: Sequence[int] | None, dilation: Sequence[int] | None,
              causal: Sequence[bool] | None) -> tuple[list[int], list[int], list[bool]]:  # fmt: skip
    """Fill in stride 1, dilation 1, not causal."""
    n = len(window)
    return list(stride or [1] * n), list(dilation or [1] * n), list(causal or [False] * n)


def _macs(q, k, v, window, stride=None, dilation=None, causal=None, scale=None) -> int:
    """Scores and their product with the values, of the pairs that attend."""
    pairs = num_pairs(tuple(q.shape[1:-2]), window, *_complete(window, stride, dilation, causal))
    return 2 * q.shape[0] * pairs * q.shape[-2] * q.shape[-1]


@counted(_macs)
def neighborhood_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: Sequence[int],
    stride: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    causal: Sequence[bool] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attend, from each position, a window of positions around it.

    Args:
        q: (B, L, N, D) or (B, H, W, N, D) queries of N heads.
        k: Keys, shape of `q`.
        v: Values, shape of `q`.
        window: Keys of a query along each dimension; times the dilation at most the size, except where causal.
        stride: Along each dimension, how many neighbouring queries share one window; at most the window. Default 1.
        dilation: Distance between neighbouring keys along each dimension. Default 1.
        causal: Along which dimensions no later position is seen. Default none.
        scale: Factor on the scores; D^-1/2 where not given.

    Returns:
        Shape of `q`.

    Raises:
        ValueError: Shapes or options that do not fit together.
    """
    size = q.shape[1:-2]
    if not q.shape == k.shape == v.shape or len(size) not in (1, 2):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v have shapes {shapes}: expected one shape, (B, L, N, D) or (B, H, W, N, D)")
    window = list(window)
    stride, dilation, causal = _complete(window, stride, dilation, causal)
    for name, option in (("window", window), ("stride", stride), ("dilation", dilation), ("causal", causal)):
        if len(option) != len(size):
            raise ValueError(f"{name} {option}: expected one value for each of {len(size)} dimensions")
    for n, w, s, d, c in zip(size, window, stride, dilation, causal, strict=True):
        if w < 1 or d < 1 or not 1 <= s <= w or (not c and w * d > n):
            raise ValueError(
                f"window {w}, stride {s}, dilation {d} along {n} positions: expected 1 <= stride <= window and, unless "
                "causal, window * dilation <= positions"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = choose(q, k, v)
    if backend == "reference":
        return neighborhood_attention_reference(q, k, v, window, stride, dilation, causal, scale)
    if len(size) == 1:  # one row
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        window, stride, dilation, causal = [1, *window], [1, *stride], [1, *dilation], [False, *causal]
    if backend == "triton" and q.shape[-1] <= MAX_HEAD_CHANNELS:
        q, k, v = as_autocast(q, k, v)
        out, _ = _attention(q, k, v, window, stride, dilation, causal, scale)
    else:
        out = _aten(q, k, v, window, stride, dilation, causal, scale)
    return out.squeeze(1) if len(size) == 1 else out


SMALL = {"positions": 8192}


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    D = bounds.get("head_channels", MAX_HEAD_CHANNELS)
    dtype, name = (torch.bfloat16, "bf16") if "bits" in bounds else (torch.float32, "fp32")
    settings = {
        "2-D 56x56 w7 s2 d4": ((56, 56), [7, 7], [2, 2], [4, 4]),
        "1-D 4096 w64": ((1, 4096), [1, 64], [1, 1], [1, 1]),
    }
    for label, (size, window, stride, dilation) in settings.items():
        batch = max(1, min(8, bounds.get("positions", 2**31) // math.prod(size)))
        q = torch.empty(batch, *size, 4, D, dtype=dtype, device="meta")
        lse = torch.empty(q.shape[:-1], device="meta")
        options = (window, stride, dilation, [False, False], D**-0.5)
        forward = kernel == "neighborhood_attention_forward"
        maps, products = {
            "neighborhood_attention_forward": (4, 2),
            "neighborhood_attention_query_gradient": (5, 3),
            "neighborhood_attention_key_gradient": (6, 4),
        }[kernel]
        yield Example(
            label=f"{name} {label} D{D}{'' if batch == 8 else f', batch {batch}'}",
            call=partial(_forward, q, q, q, *options) if forward else partial(_backward, q, q, q, q, q, lse, *options),
            bytes=maps * q.numel() * q.element_size(),
            operations=2 * products * q.numel() * math.prod(window),
            unit="matrix",
            special=q.numel() // D * math.prod(window),
        )
