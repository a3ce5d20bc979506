"""The kernels against their floors and against what a user would pick instead.

    python benchmarks/kernels.py [--family NAME] [--label TEXT] [--minutes 7] [--output FILE]

Needs torch and numpy, Triton on a GPU, and this folder; nothing installed. For each family and shape: first the answer
(outputs and gradients against float64 at a batch of two, then the output of the whole shape), and only if it is right
the times: forward and training step, eagerly and in a CUDA graph, with the caches hot and cold, as 20th, 50th and 80th
percentiles. Beside them stand the floors, bytes over the measured copy bandwidth and operations over the measured rate
of the unit, and the peers: ATen (cuDNN), `torch.compile`, `scaled_dot_product_attention`, flash-linear-attention where
installed. On a CPU the same grid runs on ATen in float32. Writes one JSON with all of it and its provenance.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from mixnas.kernels import dispatch  # noqa: E402
from mixnas.kernels.depthwise import valid_taps  # noqa: E402
from mixnas.kernels.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_reference  # noqa: E402
from mixnas.kernels.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference  # noqa: E402
from mixnas.kernels.fused_block import fused_conv_block, fused_conv_block_reference  # noqa: E402
from mixnas.kernels.gated_linear_attention import (  # noqa: E402
    gated_linear_attention,
    gated_linear_attention_reference,
)
from mixnas.kernels.glu import glu, glu_reference  # noqa: E402
from mixnas.kernels.neighborhood_attention import (  # noqa: E402
    neighborhood_attention,
    neighborhood_attention_reference,
)
from mixnas.kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference  # noqa: E402
from mixnas.kernels.selective_scan import selective_scan, selective_scan_reference  # noqa: E402
from mixnas.kernels.testing import Case, compare, relative_error  # noqa: E402
from mixnas.predictors.device import device_name, provenance  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
# Above a kernel's own limits (`testing.LIMITS`): long sums in bfloat16 on a GPU order differently.
ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


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
    if not both and CUDA and importlib.util.find_spec("fla"):
        peers["flash-linear-attention chunk_gla"] = (_fla_gla, True)
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


def _cut(point: Point, tensors: Mapping[str, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
    return {name: tensor[:batch] if name in point.batched else tensor for name, tensor in tensors.items()}


def _first(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def check(point: Point, function: Callable[..., Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return relative errors against float64: at a batch of two with gradients, and of the whole shape's output."""
    shapes = {name: (2, *shape[1:]) if name in point.batched else shape for name, shape in point.case.tensors.items()}
    small = Case(tensors=shapes, options=point.case.options, prepare=point.case.prepare)
    errors = compare(function, point.reference, small, DTYPE, DEVICE)
    with torch.no_grad():
        output = _first(function(**tensors, **point.case.options))
        two = {name: tensor.double() for name, tensor in _cut(point, tensors, 2).items()}
        with dispatch.backend("reference"):
            expected = _first(point.reference(**two, **point.case.options))
    errors["output of the whole shape"] = relative_error(output[:2], expected)
    if not torch.isfinite(output).all():
        errors["output of the whole shape"] = float("inf")
    return errors


class Timer:
    """Times a call as a device sees it; percentiles in microseconds."""

    def __init__(self, seconds: float, at_least: int, at_most: int) -> None:
        self.seconds, self.at_least, self.at_most = seconds, at_least, at_most
        # Four times an H200's L2; larger than a CPU's caches.
        self._flush = torch.empty(256 * 2**20 if CUDA else 64 * 2**20, dtype=torch.int8, device=DEVICE)

    def _once(self, call: Callable[[], Any], cold: bool) -> float:
        if cold:
            self._flush.zero_()
        if not CUDA:
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e6
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def __call__(self, call: Callable[[], Any], cold: bool) -> dict[str, float]:
        for _ in range(3 if CUDA else 1):
            call()
        times, until = [], time.perf_counter() + self.seconds
        while len(times) < self.at_least or (time.perf_counter() < until and len(times) < self.at_most):
            times.append(self._once(call, cold))
        times.sort()
        at = lambda share: round(times[min(len(times) - 1, int(share * len(times)))], 2)  # noqa: E731
        return {"p20_us": at(0.2), "p50_us": at(0.5), "p80_us": at(0.8), "repeats": len(times)}


def _graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a call in a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_all(
    timer: Timer, function: Callable[..., Any], point: Point, tensors: Mapping[str, torch.Tensor], deadline: float
) -> dict[str, Any]:
    """Time forward and training step, eagerly and in a graph, hot and cold."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with torch.no_grad():
        cotangent = torch.randn_like(_first(function(**tensors, **point.case.options)))

    def forward() -> Any:
        with torch.no_grad():
            return function(**tensors, **point.case.options)

    def step() -> Any:
        output = _first(function(**leaves, **point.case.options))
        return torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)

    results: dict[str, Any] = {}
    for name, call in (("forward", forward), ("step", step)):
        if time.perf_counter() > deadline:
            results[name] = "out of time"
            continue
        results[f"{name}, eager, hot"] = timer(call, False)
        results[f"{name}, eager, cold"] = timer(call, True)
        if CUDA:
            try:
                replay = _graph(call)
            except RuntimeError as error:
                results[f"{name}, graph"] = f"not captured: {str(error).splitlines()[0]}"
                torch.cuda.synchronize()
                continue
            results[f"{name}, graph, hot"] = timer(replay, False)
            results[f"{name}, graph, cold"] = timer(replay, True)
    return results


def ceilings(timer: Timer) -> dict[str, float]:
    """Measure what this machine reaches: copy bandwidth, plain float32 and matrix rates."""
    source = torch.randn((2**29 if CUDA else 2**25), device=DEVICE)
    target = torch.empty_like(source)
    copied = timer(lambda: target.copy_(source), False)["p50_us"]
    size = 8192 if CUDA else 1024
    a, b = torch.randn(size, size, device=DEVICE), torch.randn(size, size, device=DEVICE)
    fp32 = timer(lambda: a @ b, False)["p50_us"]
    narrow_a, narrow_b = a.to(DTYPE), b.to(DTYPE)
    matrix = timer(lambda: narrow_a @ narrow_b, False)["p50_us"]
    return {
        "copy_bytes_per_s": 2 * source.numel() * source.element_size() / copied * 1e6,
        "fp32_operations_per_s": 2 * size**3 / fp32 * 1e6,
        "matrix_operations_per_s": 2 * size**3 / matrix * 1e6,
    }


def floors(
    point: Point, tensors: Mapping[str, torch.Tensor], outputs: Any, ceiling: dict[str, float]
) -> dict[str, Any]:
    """Return the times of a forward that no version can beat, in microseconds."""
    written = outputs if isinstance(outputs, tuple) else (outputs,)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors.values(), *written))
    bytes_us = moved / ceiling["copy_bytes_per_s"] * 1e6
    operations_us = point.operations / ceiling[f"{point.unit}_operations_per_s"] * 1e6
    return {
        "bytes": moved,
        "operations": point.operations,
        "unit": point.unit,
        "bytes_us": round(bytes_us, 2),
        "operations_us": round(operations_us, 2),
        "bound_by": "bytes" if bytes_us >= operations_us else "operations",
    }


def _on(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with dispatch.backend(backend):
            return function(*args, **kwargs)

    return call


def implementations(point: Point) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """Yield (name, function, whether it computes the same): ours first, then what a user would pick instead."""
    if CUDA:
        yield "mixnas (Triton)", _on("triton", point.function), True
    yield "ATen", _on("aten", point.function), True
    for name, (function, same) in point.peers.items():
        yield name, function, same
    if point.compiled and CUDA:
        yield "ATen, torch.compile", _on("aten", torch.compile(point.function, dynamic=False)), True


def run_point(point: Point, timer: Timer, ceiling: dict[str, float], deadline: float) -> dict[str, Any]:
    """Check and time every implementation at one point."""
    tensors = point.case.draw(DTYPE, DEVICE)
    record: dict[str, Any] = {"family": point.family, "label": point.label, "dtype": str(DTYPE)[6:]}
    results = record["implementations"] = {}
    with torch.no_grad(), dispatch.backend("aten"):
        outputs = point.function(**tensors, **point.case.options)
    record["floor"] = floors(point, tensors, outputs, ceiling)
    for name, function, same in implementations(point):
        if time.perf_counter() > deadline:
            results[name] = {"skipped": "out of time"}
            continue
        entry: dict[str, Any] = {"same_function": same}
        results[name] = entry
        try:
            if same:
                errors = check(point, function, tensors)
                entry["errors"] = {key: float(f"{error:.2e}") for key, error in errors.items()}
                entry["right"] = all(error <= ALLOWED[DTYPE] for error in errors.values())
            if entry.get("right", True):
                entry["times"] = time_all(timer, function, point, tensors, deadline)
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            entry["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return record


def show(record: dict[str, Any]) -> None:
    """Print one point: a figure only where the answer was right."""
    floor = record["floor"]
    floor_us = max(floor["bytes_us"], floor["operations_us"])
    print(
        f"\n{record['family']}: {record['label']} ({record['dtype']}); floor {floor_us:.1f} us by {floor['bound_by']}"
    )
    for name, entry in record["implementations"].items():
        if "times" not in entry:
            why = entry.get("failed") or entry.get("skipped") or f"WRONG, no figure: {entry.get('errors')}"
            print(f"  {name:42s} {why}")
            continue
        cells = []
        for key, value in entry["times"].items():
            if isinstance(value, str):
                cells.append(f"{key}: {value}")
                continue
            times = "/".join(f"{value[p]:.0f}" for p in ("p20_us", "p50_us", "p80_us"))
            ratio = f" ({value['p50_us'] / floor_us:.1f}x floor)" if key.startswith("forward") and floor_us else ""
            cells.append(f"{key} {times} us{ratio}")
        note = "" if entry["same_function"] else " [another function]"
        print(f"  {name + note:42s} " + "; ".join(cells))


def main() -> None:
    """Run the grid on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only this family; may be given again")
    parser.add_argument("--label", default="", help="only points whose label contains this")
    parser.add_argument("--minutes", type=float, default=7.0, help="start nothing new after this long (default: 7)")
    parser.add_argument("--output", type=Path, help="the JSON (default: benchmarks/results/kernels-<device>.json)")
    arguments = parser.parse_args()
    if not CUDA:
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.filterwarnings("ignore", category=UserWarning)
    started = time.perf_counter()
    timer = Timer(0.12, 20, 200) if CUDA else Timer(0.2, 3, 50)
    before = provenance(DEVICE)
    ceiling = ceilings(timer)
    print(f"{before['device']}: " + ", ".join(f"{name} {value:.3g}" for name, value in ceiling.items()))
    if not CUDA:
        print("No CUDA device: the same grid on ATen, in float32; the Triton kernels are not timed here.")
    wanted = arguments.family or [point.family for point in grid()]
    points = [point for point in grid() if point.family in wanted and arguments.label in point.label]
    records = []
    for point in points:
        records.append(run_point(point, timer, ceiling, started + arguments.minutes * 60))
        show(records[-1])
    result = {
        "provenance": before,
        "provenance_after": provenance(DEVICE),
        "ran": "Triton kernels and peers" if CUDA else "ATen only: no CUDA device",
        "seconds": round(time.perf_counter() - started, 1),
        "ceilings": ceiling,
        "points": records,
    }
    output = arguments.output or ROOT / "benchmarks" / "results" / f"kernels-{device_name(DEVICE)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    wrong = [r["label"] for r in records for e in r["implementations"].values() if e.get("right") is False]
    print(f"\n{len(records)} points in {result['seconds']} s; {len(wrong)} wrong answers; wrote {output.name}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
