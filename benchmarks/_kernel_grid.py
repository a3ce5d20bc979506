"""Which operators at which shapes, beside what: the grid of `kernels.py`, and the shapes that `gpu.py` checks.

A new family adds a builder, and points to `grid`, `odd` and `tiny`; a test says which kernels have none.
"""

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
from mixnas.kernels.quantized_linear import (
    FP8,
    int4_linear,
    int4_linear_reference,
    pack_int4,
    scaled_linear,
    scaled_linear_reference,
)
from mixnas.kernels.selective_scan import selective_scan, selective_scan_reference
from mixnas.kernels.testing import Case

FLA = "flash-linear-attention chunk_gla"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the grid.

    Attributes:
        batched: Which operands have the batch as their first dimension.
        operations: Of a forward (a multiply-add is two), done by `unit`: "fp32" or "matrix".
        special: Exponentials and their like that no form of a forward does without.
        peers: What else a user would call, by name: a function of the same operands, and whether it computes the same.
        compiled: Also time the ATen form under `torch.compile` (slow to start: one point of a family).
        slow_reference: Its float64 form walks token by token: minutes at a long sequence.
    """

    family: str
    label: str
    case: Case
    function: Callable[..., Any]
    reference: Callable[..., Any]
    batched: tuple[str, ...]
    operations: int
    unit: str = "fp32"
    special: int = 0
    peers: Mapping[str, tuple[Callable[..., Any], bool]] = field(default_factory=dict)
    compiled: bool = False
    slow_reference: bool = False


def _conv2d(
    batch: int,
    size: int,
    channels: int,
    kernel: int,
    activation: str = "none",
    gated: bool = False,
    compiled: bool = False,
) -> Point:
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
        unit="matrix",  # as banded products; tap by tap it would be the plain unit
        compiled=compiled,
    )


def _conv1d(batch: int, length: int, channels: int, kernel: int, compiled: bool = False) -> Point:
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


def _norm(rows: int, channels: int, kind: str, compiled: bool = False) -> Point:
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


def _glu(rows: int, channels: int, activation: str, compiled: bool = False) -> Point:
    return Point(
        family="glu",
        label=f"{activation} {rows}x{channels}",
        case=Case(tensors={"gate": (rows, channels), "up": (rows, channels)}, options={"activation": activation}),
        function=glu,
        reference=glu_reference,
        batched=("gate", "up"),
        operations=5 * rows * channels,
        special=2 * rows * channels,
        compiled=compiled,
    )


def _sdpa_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, causal: bool = False, **__: Any) -> Any:
    q, k, v = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal if isinstance(causal, bool) else all(causal))


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
        special=passes * 2 * math.prod(shape),
        peers=peers,
        slow_reference=length > 2048,
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
        special=batch * length * channels * states,
        slow_reference=length > 2048,
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
        special=math.prod(shape[:-1]) * window**2,
        peers={"sdpa (attention over all pairs)": (_sdpa_tokens, False)},
    )


def _window(batch: int, length: int, heads: int, width: int, window: int) -> Point:
    """Causal neighbourhood attention on sequences."""
    shape = (batch, length, heads, width)
    return Point(
        family="neighborhood_attention",
        label=f"{batch}x{length} heads {heads}x{width} window {window} causal",
        case=Case(tensors=dict.fromkeys(("q", "k", "v"), shape), options={"window": (window,), "causal": (True,)}),
        function=neighborhood_attention,
        reference=neighborhood_attention_reference,
        batched=("q", "k", "v"),
        operations=4 * math.prod(shape) * window,
        unit="matrix",
        special=math.prod(shape[:-1]) * window,
        peers={"sdpa (causal attention over all pairs)": (_sdpa_tokens, False)},
    )


def _block(batch: int, size: int, channels: int, kernel: int, expansion: int, compiled: bool = False) -> Point:
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
    """Yield the shapes of the real-size spaces, those first that tell most: the furthest from their floors, batch 1."""
    yield _conv2d(32, 56, 64, 7, compiled=True)
    yield _gla(1, 8192, 16, 64, both=False)
    yield _scan(1, 8192, 2048, 16)
    yield _neighborhood(32, 56, 2, 32, 7, 1)
    yield _block(32, 56, 64, 7, 4, compiled=True)
    yield _conv2d(32, 14, 256, 31)
    yield _conv2d(1, 56, 64, 7)
    yield _norm(100352, 96, "layer")
    yield _glu(8192, 4096, "silu")
    yield _gla(64, 196, 4, 32, both=True)
    yield _scan(64, 196, 384, 16)
    yield _block(1, 28, 128, 7, 4)
    yield _norm(8192, 1024, "rms", compiled=True)
    yield _window(1, 4096, 16, 64, 128)  # its reference keeps all pairs
    yield _conv1d(1, 8192, 1024, 4)
    yield _conv2d(32, 56, 64, 3)
    yield _conv2d(32, 28, 128, 7)
    yield _conv2d(32, 7, 512, 7)
    yield _conv2d(32, 56, 64, 7, "silu", gated=True)
    yield _conv2d(1, 14, 256, 7)
    yield _gla(8, 1024, 4, 64, both=False)
    yield _scan(8, 1024, 512, 16)
    yield _neighborhood(8, 32, 4, 32, 7, 2)
    yield _block(32, 28, 128, 7, 4)
    yield _conv1d(8, 2048, 512, 4, compiled=True)
    yield _norm(16384, 1024, "layer", compiled=True)
    yield _norm(3136, 96, "layer")
    yield _glu(32768, 1024, "silu", compiled=True)
    yield _conv2d(32, 56, 64, 13)
    yield _conv2d(64, 8, 32, 5)
    yield _conv1d(64, 64, 64, 4)
    yield _norm(4096, 32, "layer")
    yield _glu(4096, 128, "sigmoid")


def odd() -> Iterator[Point]:
    """Yield shapes that fit no block, where mistakes show, and ordinary ones small enough to be compared as a whole."""
    yield _conv2d(2, 13, 63, 3)
    yield _conv2d(1, 7, 33, 31, "gelu")
    yield _conv2d(3, 5, 1, 5, "silu", gated=True)
    yield _conv2d(4, 28, 96, 7)
    yield _conv2d(2, 37, 61, 31, "gelu", gated=True)  # by banded products in 16 bits, and the next in several blocks
    yield _conv2d(3, 65, 40, 13)
    yield _conv1d(2, 61, 37, 4)
    yield _conv1d(3, 1, 16, 3)
    yield _conv1d(2, 512, 192, 4)
    yield _norm(67, 63, "layer")
    yield _norm(1, 1031, "rms")
    yield _norm(1537, 384, "layer")
    yield _glu(63, 61, "silu")
    yield _glu(1, 1, "sigmoid")
    yield _glu(1000, 1024, "silu")
    yield _gla(2, 61, 3, 24, both=True)
    yield _gla(1, 1, 1, 16, both=False)
    yield _gla(2, 256, 4, 64, both=False)
    yield _scan(2, 61, 37, 16)
    yield _scan(1, 1, 3, 8)
    yield _scan(2, 256, 128, 16)
    yield _neighborhood(2, 9, 3, 20, 5, 1)
    yield _neighborhood(1, 15, 2, 32, 7, 2)
    yield _window(2, 67, 2, 48, 13)
    yield _neighborhood(2, 28, 4, 32, 7, 1)
    yield _block(2, 7, 24, 5, 3)
    yield _block(1, 9, 63, 7, 2)
    yield _block(2, 14, 128, 7, 4)
    yield _block(1, 83, 24, 3, 2)  # enough positions for one kernel on a GPU


def tiny() -> Iterator[Point]:
    """Yield one shape of each kind that the interpreter gets through at once."""
    yield _conv2d(1, 3, 3, 3, "silu", gated=True)
    yield _conv1d(2, 7, 5, 4)
    yield _norm(9, 12, "layer")
    yield _glu(3, 5, "silu")
    yield _gla(1, 66, 1, 16, both=False)  # more than a chunk
    yield _scan(1, 66, 2, 2)  # more than a segment
    yield _neighborhood(1, 5, 1, 16, 3, 1)
    yield _block(1, 5, 4, 3, 1)  # in the interpreter few positions are one kernel too


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of few bits: it has no gradients, and its operands have types of their own.

    Attributes:
        kind: "int8", "fp8" or "int4".
        rows, inputs, outputs: M, K and N.
    """

    kind: str
    rows: int
    inputs: int
    outputs: int

    family = "quantized_linear"

    @property
    def label(self) -> str:
        """In names of checks."""
        return f"{self.kind} {self.rows}x{self.inputs}x{self.outputs}"

    def draw(self, device: str = "cpu", seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Draw the operands."""
        generator = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(n, self.inputs, generator=generator) for n in (self.rows, self.outputs))
        scale, shift = (
            torch.rand(self.outputs, generator=generator) + 0.1,
            torch.randn(self.outputs, generator=generator),
        )
        drawn: tuple[torch.Tensor, ...]
        if self.kind == "int4":
            whole = (3 * weight).round().clamp(-8, 7).to(torch.int8)
            scales = scale.unsqueeze(1).repeat(1, self.inputs // 32).bfloat16()
            drawn = (x.bfloat16(), pack_int4(whole, 32), scales, shift)
        else:
            if self.kind == "int8":
                x, weight = ((40 * t).round().clamp(-127, 127) for t in (x, weight))
            narrow = [t.to(torch.int8 if self.kind == "int8" else FP8) for t in (x, weight)]
            drawn = (narrow[0], torch.rand(self.rows, generator=generator) + 0.1, narrow[1], scale, shift)
        return tuple(operand.to(device) for operand in drawn)

    def function(self, *operands: torch.Tensor) -> torch.Tensor:
        """The public function."""
        return int4_linear(*operands) if self.kind == "int4" else scaled_linear(*operands)

    def reference(self, *operands: torch.Tensor) -> torch.Tensor:
        """The definition, in float64."""
        if self.kind == "int4":
            x, packed, scale, bias = operands
            return int4_linear_reference(x.double(), packed, scale, bias.double())
        return scaled_linear_reference(*operands, torch.float64)


def products(dry: bool) -> Iterator[Product]:
    """Yield products of few bits: odd shapes, the ordinary one last; in a dry run one that is interpreted at once."""
    for kind in ("int8", "fp8", "int4"):
        if dry:
            yield Product(kind=kind, rows=3, inputs=32, outputs=5)
            continue
        yield Product(kind=kind, rows=1, inputs=64, outputs=1)
        yield Product(kind=kind, rows=63, inputs=96, outputs=7)
        yield Product(kind=kind, rows=8192, inputs=1024, outputs=4096)
        yield Product(kind=kind, rows=196, inputs=384, outputs=1536)
