"""The grid of `kernels.py`: which operators at which shapes, beside what."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from mixnas.kernels.depthwise import valid_taps
from mixnas.kernels.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_reference
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference
from mixnas.kernels.fused_block import fused_conv_block, fused_conv_block_reference
from mixnas.kernels.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_reference,
)
from mixnas.kernels.glu import glu, glu_reference
from mixnas.kernels.neighborhood_attention import (
    neighborhood_attention,
    neighborhood_attention_reference,
)
from mixnas.kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from mixnas.kernels.selective_scan import selective_scan, selective_scan_reference
from mixnas.kernels.testing import Case

FLA = "flash-linear-attention chunk_gla"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the grid.

    Attributes:
        batched: Which operands have the batch as their first dimension.
        operations: Of a forward (a multiply-add is two), done by `unit`: "fp32" or "matrix".
        peers: What else a user would call, by name: a function of the same operands, and whether it computes the same.
        compiled: Also time the ATen form under `torch.compile` (slow to start: one point of a family).
    """

    family: str
    label: str
    case: Case
    function: Callable[..., Any]
    reference: Callable[..., Any]
    batched: tuple[str, ...]
    operations: int
    unit: str = "fp32"
    peers: Mapping[str, tuple[Callable[..., Any], bool]] = field(default_factory=dict)
    compiled: bool = False


def _conv2d(batch: int, size: int, channels: int, kernel: int, activation: str, gated: bool, compiled: bool) -> Point:
    shape = (batch, size, size, channels)
    tensors = {"x_BHWC": shape, "weight_C1KK": (channels, 1, kernel, kernel), "bias": (channels,)}
    tensors |= {"gate": shape} if gated else {}
    return Point(
        family="depthwise_conv2d",
        label=f"{batch}x{size}x{size}x{channels} k{kernel} {activation}{' gated' if gated else ''}",
        case=Case(tensors=tensors, options={"activation": activation}),
        function=depthwise_conv2d,
        reference=depthwise_conv2d_reference,
        batched=("x_BHWC", "gate"),
        operations=2 * batch * channels * valid_taps(size, kernel, kernel // 2) ** 2,
        compiled=compiled,
    )


def _conv1d(batch: int, length: int, channels: int, kernel: int, compiled: bool) -> Point:
    return Point(
        family="depthwise_conv1d",
        label=f"{batch}x{length}x{channels} k{kernel} causal silu",
        case=Case(
            tensors={"x_BLC": (batch, length, channels), "weight_C1K": (channels, 1, kernel), "bias": (channels,)},
            options={"activation": "silu"},
        ),
        function=depthwise_conv1d,
        reference=depthwise_conv1d_reference,
        batched=("x_BLC",),
        operations=2 * batch * channels * valid_taps(length, kernel, kernel - 1),
        compiled=compiled,
    )


def _norm(rows: int, channels: int, kind: str, compiled: bool) -> Point:
    tensors = {"x": (rows, channels), "weight": (channels,), "residual": (rows, channels)}
    tensors |= {"bias": (channels,)} if kind == "layer" else {}
    return Point(
        family="norm",
        label=f"{kind} {rows}x{channels} with residual",
        case=Case(tensors=tensors),
        function=layer_norm if kind == "layer" else rms_norm,
        reference=layer_norm_reference if kind == "layer" else rms_norm_reference,
        batched=("x", "residual"),
        operations=9 * rows * channels,
        compiled=compiled,
    )


def _glu(rows: int, channels: int, activation: str, compiled: bool) -> Point:
    return Point(
        family="glu",
        label=f"{activation} {rows}x{channels}",
        case=Case(tensors={"gate": (rows, channels), "up": (rows, channels)}, options={"activation": activation}),
        function=glu,
        reference=glu_reference,
        batched=("gate", "up"),
        operations=5 * rows * channels,
        compiled=compiled,
    )


def _sdpa_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, causal: bool = False, **__: Any) -> Any:
    q, k, v = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _fla_gla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, log_decay)[0]


def _gla(batch: int, length: int, heads: int, width: int, both: bool) -> Point:
    shape = (batch, length, heads, width)
    names = ("q", "k", "v", "log_decay", *(("reverse_log_decay",) if both else ()))
    decay = lambda drawn: F.logsigmoid(drawn) / 4  # noqa: E731
    passes = 2 if both else 1
    peers: dict[str, tuple[Callable[..., Any], bool]] = {
        "sdpa (softmax attention over all pairs)": (partial(_sdpa_tokens, causal=not both), False)
    }
    if not both and torch.cuda.is_available() and importlib.util.find_spec("fla"):
        peers[FLA] = (_fla_gla, True)
    return Point(
        family="gated_linear_attention",
        label=f"{batch}x{length} heads {heads}x{width} {'both directions' if both else 'causal'}",
        case=Case(
            tensors=dict.fromkeys(names, shape),
            prepare={"log_decay": decay, "reverse_log_decay": decay},
        ),
        function=gated_linear_attention,
        reference=gated_linear_attention_reference,
        batched=names,
        operations=passes * 2 * 2 * math.prod(shape) * width,
        unit="matrix",
        peers=peers,
    )


def _scan(batch: int, length: int, channels: int, states: int) -> Point:
    tensors = {"x": (batch, length, channels), "step": (batch, length, channels), "a": (channels, states)}
    tensors |= {
        "b": (batch, length, states),
        "c": (batch, length, states),
        "skip": (channels,),
        "step_bias": (channels,),
    }
    return Point(
        family="selective_scan",
        label=f"{batch}x{length}x{channels} states {states}",
        case=Case(tensors=tensors, prepare={"a": lambda a: -a.exp(), "step_bias": lambda drawn: drawn - 2.0}),
        function=selective_scan,
        reference=selective_scan_reference,
        batched=("x", "step", "b", "c"),
        operations=7 * batch * length * channels * states,
    )


def _neighborhood(batch: int, size: int, heads: int, width: int, window: int, dilation: int) -> Point:
    shape = (batch, size, size, heads, width)
    return Point(
        family="neighborhood_attention",
        label=f"{batch}x{size}x{size} heads {heads}x{width} window {window} dilation {dilation}",
        case=Case(
            tensors=dict.fromkeys(("q", "k", "v"), shape),
            options={"window": (window, window), "dilation": (dilation, dilation)},
        ),
        function=neighborhood_attention,
        reference=neighborhood_attention_reference,
        batched=("q", "k", "v"),
        operations=4 * math.prod(shape) * window**2,
        unit="matrix",
        peers={"sdpa (attention over all pairs)": (_sdpa_tokens, False)},
    )


def _block(batch: int, size: int, channels: int, kernel: int, expansion: int, compiled: bool) -> Point:
    hidden, row = channels * expansion, (channels,)
    tensors = {"x_BHWC": (batch, size, size, channels), "weight_C1KK": (channels, 1, kernel, kernel), "conv_bias": row}
    tensors |= {"norm_weight": row, "norm_bias": row, "up_EC": (hidden, channels), "up_bias": (hidden,)}
    tensors |= {"down_CE": (channels, hidden), "down_bias": row}
    small = lambda drawn: drawn * channels**-0.5  # noqa: E731
    return Point(
        family="fused_block",
        label=f"{batch}x{size}x{size}x{channels} k{kernel} expansion {expansion}",
        case=Case(tensors=tensors, prepare={"up_EC": small, "down_CE": small}),
        function=fused_conv_block,
        reference=fused_conv_block_reference,
        batched=("x_BHWC",),
        operations=4 * batch * size * size * channels * hidden,
        unit="matrix",
        compiled=compiled,
    )


def grid() -> Iterator[Point]:
    """Yield the points: stages of a hierarchical image network, sequences, and the small maps of an embedded one."""
    for size, channels, kernel in ((56, 64, 3), (56, 64, 5), (56, 64, 7), (56, 64, 13), (28, 128, 7), (14, 256, 7)):
        yield _conv2d(32, size, channels, kernel, "none", False, compiled=(size, kernel) == (56, 7))
    yield _conv2d(32, 56, 64, 7, "silu", True, compiled=False)
    yield _conv2d(32, 14, 256, 31, "none", False, compiled=False)
    yield _conv2d(64, 8, 32, 5, "none", False, compiled=False)
    yield _conv1d(8, 2048, 512, 4, compiled=True)
    yield _conv1d(64, 64, 64, 4, compiled=False)
    for rows, channels in ((100352, 64), (16384, 1024), (4096, 32)):
        yield _norm(rows, channels, "layer", compiled=channels == 1024)
    yield _norm(16384, 1024, "rms", compiled=True)
    yield _glu(32768, 1024, "silu", compiled=True)
    yield _glu(4096, 128, "sigmoid", compiled=False)
    yield _gla(8, 1024, 4, 64, both=False)
    yield _gla(64, 196, 4, 32, both=True)
    yield _scan(8, 1024, 512, 16)
    yield _scan(64, 64, 64, 16)
    yield _neighborhood(8, 32, 4, 32, 7, 1)
    yield _neighborhood(8, 32, 4, 32, 7, 2)
    yield _block(32, 56, 64, 7, 4, compiled=True)
    yield _block(32, 14, 128, 7, 4, compiled=False)
