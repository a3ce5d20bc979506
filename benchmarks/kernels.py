"""The kernels against their floors and against what a user would pick instead.

    python benchmarks/kernels.py [--family NAME] [--label TEXT] [--minutes 7] [--output FILE]

Needs torch and numpy, Triton on a GPU, and this folder; nothing installed. For each family and shape: first the answer
(outputs and gradients against float64, at a batch of two and at the two ends of the whole shape), and only if it is
right the times: forward and training step, eagerly (what a caller waits, launches included) and in a CUDA graph (what
the device takes), with the caches hot and cold, as 20th, 50th and 80th percentiles. Beside them stand the floors, bytes
over the measured copy bandwidth, operations over the measured rate of the unit and exponentials over that of theirs,
and the peers: ATen (cuDNN, with its own search for the fastest algorithm), `scaled_dot_product_attention`, and, after
all points, those that are slow to start: `torch.compile`, and flash-linear-attention where installed. On a CPU the same
grid runs on ATen in float32.

The minutes are shared out over the points that are left; a row that would take longer is repeated less, down to once,
and says so; past the end nothing new is started. One JSON, written anew after each point, holds all of it with its
provenance, and lists under "left_out" what was not measured, and why.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()
STARTED = time.perf_counter()

import torch  # noqa: E402
from _gpu_results import write_json  # noqa: E402
from _kernel_grid import FLA, Point, grid  # noqa: E402

from mixnas.kernels import dispatch  # noqa: E402
from mixnas.kernels.testing import Case, compare, relative_error  # noqa: E402
from mixnas.predictors.measuring.device import device_name, provenance  # noqa: E402

OURS, ATEN, COMPILED = "mixnas (Triton)", "ATen", "ATen, torch.compile"
SLOW_TO_START = (COMPILED, FLA)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
# Above a kernel's own limits (`testing.LIMITS`): long sums in bfloat16 on a GPU order differently.
ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def _ends(tensor: torch.Tensor) -> torch.Tensor:
    """The first and the last example, where a grid that is too small or an index that overflows would show."""
    return tensor[[0, -1]] if len(tensor) > 1 else tensor


def _first(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _with_gradients(
    point: Point, function: Callable[..., Any], tensors: Mapping[str, torch.Tensor], cotangent: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    """The output, the gradients of the operands that have a batch, and the cotangent (drawn unless given)."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    output = _first(function(**leaves, **point.case.options))
    cotangent = torch.randn_like(output) if cotangent is None else cotangent
    batched = [leaf for name, leaf in leaves.items() if name in point.batched]
    return output.detach(), torch.autograd.grad(output, batched, cotangent), cotangent


def check(
    point: Point, function: Callable[..., Any], tensors: Mapping[str, torch.Tensor], small: bool
) -> dict[str, float]:
    """Return relative errors against float64: of the whole shape's first and last example, and at a batch of two."""
    errors: dict[str, float] = {}
    if small:
        cut = {name: (2, *shape[1:]) if name in point.batched else shape for name, shape in point.case.tensors.items()}
        case = Case(tensors=cut, options=point.case.options, prepare=point.case.prepare)
        errors = compare(function, point.reference, case, DTYPE, DEVICE)
    output, gradients, cotangent = _with_gradients(point, function, tensors, None)
    ends = {name: (_ends(t) if name in point.batched else t).double() for name, t in tensors.items()}
    with dispatch.backend("reference"):
        right, right_gradients, _ = _with_gradients(point, point.reference, ends, _ends(cotangent).double())
    names = [f"gradient of {name}" for name in tensors if name in point.batched]
    found = zip(("output", *names), (output, *gradients), (right, *right_gradients), strict=True)
    for name, value, expected in found:
        error = relative_error(_ends(value), expected) if torch.isfinite(value).all() else math.inf
        errors[f"{name}, whole shape"] = error
    return errors


class Timer:
    """Times a call; percentiles in microseconds.

    Args:
        seconds: How long a figure is repeated for.
        at_least: Repeats that a figure should have.
        at_most: Repeats that are enough.
    """

    def __init__(self, seconds: float, at_least: int, at_most: int) -> None:
        self.seconds, self.at_least, self.at_most = seconds, at_least, at_most
        # Several times an H200's L2, or the last cache of a CPU.
        self._flush = torch.empty(256 * 2**20 if CUDA else 128 * 2**20, dtype=torch.int8, device=DEVICE)

    def _waited(self, call: Callable[[], Any], cold: bool) -> float:
        """What the caller waits for the result."""
        if cold:
            self._flush.zero_()
        if CUDA:
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1e6

    def _on_device(self, call: Callable[[], Any], cold: bool) -> float:
        """What the device takes: it is kept busy until all has been queued."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if cold:
            self._flush.zero_()
        torch.cuda._sleep(500_000)  # clock cycles: about 0.3 ms
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def __call__(
        self, call: Callable[[], Any], *, cold: bool = False, queued: bool = False, share: float = math.inf
    ) -> dict[str, Any]:
        """Time `call`; stop after `share` seconds even with fewer repeats than there should be, but not before one."""
        once = self._on_device if queued else self._waited
        for _ in range(3 if CUDA else 1):
            once(call, cold)
        times: list[float] = []
        started = time.perf_counter()
        while True:
            times.append(once(call, cold))
            took = time.perf_counter() - started
            enough = len(times) >= self.at_most or (len(times) >= self.at_least and took >= self.seconds)
            if enough or took >= max(share, self.seconds / 10):
                break
        times.sort()
        at = lambda part: round(times[min(len(times) - 1, int(part * len(times)))], 2)  # noqa: E731
        figure = {"p20_us": at(0.2), "p50_us": at(0.5), "p80_us": at(0.8), "repeats": len(times)}
        if len(times) < self.at_least:
            figure["shortened"] = f"{self.at_least} repeats wanted, {len(times)} in this row's share of the time"
        return figure


class Budget:
    """Shares the time until a deadline out over points, and notes what is left out; seconds of `time.perf_counter`."""

    def __init__(self, deadline: float, points: int) -> None:
        self.deadline, self._points = deadline, points
        self._until = 0.0
        self.left_out: list[dict[str, str]] = []

    def start_point(self) -> None:
        """Give the next point an equal share of what is left: what fast points leave over goes to those behind them."""
        now = time.perf_counter()
        self._until = now + max(0.0, self.deadline - now) / self._points
        self._points -= 1

    def share(self, figures: int) -> float:
        """Seconds for the next of the point's `figures` that are left."""
        return max(0.0, self._until - time.perf_counter()) / figures

    def allows(self, **what: str) -> bool:
        """Say whether there is time for it at all; if not, note that it was left out."""
        if time.perf_counter() <= self.deadline:
            return True
        self.left_out.append({**what, "why": "out of time"})
        return False


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


# Forward or training step, in a CUDA graph or not, on a cold cache or not.
FIGURES = tuple(
    (what, graph, cold)
    for what in ("forward", "step")
    for graph in ((False, True) if CUDA else (False,))
    for cold in ((False,) if dispatch.INTERPRETING else (False, True))
)


def _calls(
    point: Point, function: Callable[..., Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Callable[[], Any]]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with torch.no_grad():
        cotangent = torch.randn_like(_first(function(**tensors, **point.case.options)))

    def forward() -> Any:
        with torch.no_grad():
            return function(**tensors, **point.case.options)

    def step() -> Any:
        output = _first(function(**leaves, **point.case.options))
        return torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)

    return {"forward": forward, "step": step}


def time_all(
    timer: Timer, calls: Mapping[str, Callable[[], Any]], budget: Budget, behind: int, **names: str
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield each figure's name, and its times or why there are none; `behind` figures of the point come after."""
    replays: dict[str, Callable[[], Any]] = {}
    for index, (what, graph, cold) in enumerate(FIGURES):
        name = f"{what}, {'graph' if graph else 'eager'}, {'cold' if cold else 'hot'}"
        if not budget.allows(**names, figure=name):
            yield name, "left out: out of time"
            continue
        call = calls[what]
        if graph:
            try:
                call = replays[what] = replays.get(what) or _graph(call)
            except RuntimeError as error:
                torch.cuda.synchronize()
                why = f"not captured: {_first_line(error)}"
                budget.left_out.append({**names, "figure": name, "why": why})
                yield name, why
                continue
        share = budget.share(len(FIGURES) - index + behind)
        yield name, timer(call, cold=cold, queued=graph, share=share)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def ceilings(timer: Timer) -> dict[str, float]:
    """Measure what this machine reaches: copy bandwidth, plain float32 and matrix rates.

    Exponentials and their like take the special units of a GPU, 16 a clock and multiprocessor, at its highest clock.
    """
    source = torch.randn((2**29 if CUDA else 2**25), device=DEVICE)
    target = torch.empty_like(source)
    copied = timer(lambda: target.copy_(source))["p20_us"]
    size = 8192 if CUDA else 1024
    a, b = torch.randn(size, size, device=DEVICE), torch.randn(size, size, device=DEVICE)
    fp32 = timer(lambda: a @ b)["p20_us"]
    narrow_a, narrow_b = a.to(DTYPE), b.to(DTYPE)
    matrix = timer(lambda: narrow_a @ narrow_b)["p20_us"]
    special = math.inf
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        special = 16 * properties.multi_processor_count * 1e3 * getattr(properties, "clock_rate", 1_755_000)
    return {
        "special_operations_per_s": special,
        "copy_bytes_per_s": 2 * source.numel() * source.element_size() / copied * 1e6,
        "fp32_operations_per_s": 2 * size**3 / fp32 * 1e6,
        "matrix_operations_per_s": 2 * size**3 / matrix * 1e6,
    }


def clocks_under_load() -> dict[str, str]:
    """A GPU's clocks while it works: at rest, before and after, they are others."""
    if not CUDA:
        return {}
    a = torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE)
    for _ in range(1000):  # more than a second, queued; asking takes less
        a @ a
    record = provenance(DEVICE)
    torch.cuda.synchronize()
    return {name: record[name] for name in ("clock_sm", "clock_memory") if name in record}


def sources() -> str:
    """SHA-256 of the kernels, their tables and this file: says what was timed where there is no git to ask."""
    digest = hashlib.sha256()
    for path in (*sorted((ROOT / "kernels").glob("*.py")), *sorted((ROOT / "kernels").glob("*.json")), Path(__file__)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def floors(
    point: Point, tensors: Mapping[str, torch.Tensor], outputs: Any, ceiling: dict[str, float]
) -> dict[str, Any]:
    """Return the times of a forward that no version can beat, in microseconds."""
    written = outputs if isinstance(outputs, tuple) else (outputs,)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors.values(), *written))
    bytes_us = moved / ceiling["copy_bytes_per_s"] * 1e6
    operations_us = point.operations / ceiling[f"{point.unit}_operations_per_s"] * 1e6
    special_us = point.special / ceiling["special_operations_per_s"] * 1e6
    by = {"bytes": bytes_us, "operations": operations_us, "special": special_us}
    return {
        "bytes": moved,
        "operations": point.operations,
        "unit": point.unit,
        "special": point.special,
        **{f"{what}_us": round(us, 2) for what, us in by.items()},
        "bound_by": max(by, key=lambda what: by[what]),
    }


def floor_us(floor: Mapping[str, Any]) -> float:
    """The largest of `floors`."""
    return max(float(floor[f"{what}_us"]) for what in ("bytes", "operations", "special"))


def _on(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with dispatch.backend(backend):
            return function(*args, **kwargs)

    return call


def implementations(point: Point) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """Yield (name, function, whether it computes the same): ours first, then what a user would pick instead."""
    if CUDA or dispatch.INTERPRETING:
        yield OURS, _on("triton", point.function), True
    yield ATEN, _on("aten", point.function), True
    for name, (function, same) in point.peers.items():
        yield name, function, same
    if point.compiled and CUDA:
        yield COMPILED, _on("aten", torch.compile(point.function, dynamic=False)), True


def run_point(
    point: Point,
    timer: Timer,
    ceiling: dict[str, float],
    budget: Budget,
    slow: bool = False,
    record: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Check and time the implementations at one point; whatever fails is said, and kept.

    Args:
        point: Which.
        timer: Takes the times.
        ceiling: What the machine reaches (`ceilings`).
        budget: Of time.
        slow: Those that are slow to start, otherwise the others.
        record: What there is of the point already, to be added to.
    """
    budget.start_point()
    where = f"{point.family}: {point.label}"
    fresh: dict[str, Any] = {"family": point.family, "label": point.label, "dtype": str(DTYPE)[6:]}
    record = record or fresh | {"implementations": {}}
    results = record["implementations"]
    if not budget.allows(point=where):
        return record
    tensors = point.case.draw(DTYPE, DEVICE)
    try:
        with torch.no_grad(), dispatch.backend("aten"):
            record["floor"] = floors(point, tensors, point.function(**tensors, **point.case.options), ceiling)
    except Exception as error:  # out of memory, say
        record["failed"] = _first_line(error)
        budget.left_out.append({"point": where, "why": record["failed"]})
        return record
    todo = [one for one in implementations(point) if (one[0] in SLOW_TO_START) == slow]
    for index, (name, function, same) in enumerate(todo):
        entry: dict[str, Any] = {"same_function": same}
        names = {"point": where, "implementation": name}
        if not budget.allows(**names):
            continue
        results[name] = entry
        try:
            if same:
                # Each shape is another compilation to torch.compile: it has to be right at the one that is timed.
                errors = check(point, function, tensors, small=name != COMPILED and not point.slow_reference)
                entry["errors"] = {key: f"{error:.2e}" for key, error in errors.items()}
                entry["right"] = all(error <= ALLOWED[DTYPE] for error in errors.values())
            if entry.get("right", True):
                behind = (len(todo) - 1 - index) * len(FIGURES)
                entry["times"] = {}
                entry["times"].update(time_all(timer, _calls(point, function, tensors), budget, behind, **names))
        except Exception as error:  # of any peer's or compiler's own kind: one that fails must not cost the other rows
            entry["failed"] = _first_line(error)
            budget.left_out.append({**names, "why": entry["failed"]})
    return record


def show(record: dict[str, Any]) -> None:
    """Print one point: a figure only where the answer was right."""
    if "floor" not in record:
        why = record.get("failed", "out of time")
        print(f"\n{record['family']}: {record['label']}: left out, {why}")
        return
    least = floor_us(record["floor"])
    bound = f"floor {least:.1f} us by {record['floor']['bound_by']}"
    print(f"\n{record['family']}: {record['label']} ({record['dtype']}); {bound}")
    for name, entry in record["implementations"].items():
        cells = [f"FAILED: {entry['failed']}"] if "failed" in entry else []
        if not entry.get("right", True):
            cells.append(f"WRONG, no figure: {entry['errors']}")
        for key, value in entry.get("times", {}).items():
            if isinstance(value, str):
                cells.append(f"{key}: {value}")
                continue
            times = "/".join(f"{value[p]:.{1 if value[p] < 100 else 0}f}" for p in ("p20_us", "p50_us", "p80_us"))
            ratio = f" ({value['p50_us'] / least:.1f}x floor)" if key.startswith("forward") and least else ""
            cells.append(f"{key} {times} us{ratio}{' SHORTENED' if 'shortened' in value else ''}")
        note = "" if entry["same_function"] else " [another function]"
        print(f"  {name + note:42s} " + "; ".join(cells))


def never_here(points: list[Point]) -> Iterator[dict[str, str]]:
    """Yield what this machine cannot run at all."""
    if not CUDA:
        yield {"implementation": OURS, "why": "no CUDA device"}
        yield {"implementation": COMPILED, "why": "no CUDA device: compared on a GPU only"}
    if any(point.family == "gated_linear_attention" and FLA not in point.peers for point in points):
        installed = importlib.util.find_spec("fla") is not None
        why = "causal only" if CUDA and installed else "not installed" if CUDA else "no CUDA device"
        yield {"implementation": FLA, "why": why}


def _failures(records: list[dict[str, Any]]) -> list[str]:
    """Where our own code gave a wrong answer or none."""
    wrong = []
    for record in records:
        for name, entry in (record["implementations"] or {ATEN: record}).items():
            if name in (OURS, ATEN) and (entry.get("right") is False or "failed" in entry):
                wrong.append(f"{record['family']}: {record['label']}: {name}")
    return wrong


def main() -> None:
    """Run the grid on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only this family; may be given again")
    parser.add_argument("--label", default="", help="only points whose label contains this")
    parser.add_argument("--minutes", type=float, default=7.0, help="start nothing new after this long (default: 7)")
    parser.add_argument("--output", type=Path, help="the JSON (default: benchmarks/results/kernels-<device>.json)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    if not CUDA:
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    wanted = arguments.family or [point.family for point in grid()]
    points = [point for point in grid() if point.family in wanted and arguments.label in point.label]
    timer = Timer(0.12, 20, 200) if CUDA else Timer(0.2, 3, 50)
    before, ceiling = provenance(DEVICE), ceilings(timer)
    slow = [p for p in points if CUDA and (p.compiled or FLA in p.peers)]
    budget = Budget(STARTED + arguments.minutes * 60, len(points) + len(slow))
    budget.left_out += never_here(points)
    print(f"{before['device']}: " + ", ".join(f"{name} {value:.3g}" for name, value in ceiling.items()))
    if not CUDA:
        print("No CUDA device: the same grid on ATen, in float32; the Triton kernels are not timed here.")
    output = arguments.output or ROOT / "benchmarks" / "results" / f"kernels-{device_name(DEVICE)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "complete": False,
        "ran": "Triton kernels and peers" if CUDA else "ATen only: no CUDA device",
        "provenance": before | {"sources_sha256": sources(), "cudnn_benchmark": True, "allow_tf32": False},
        "under_load": clocks_under_load(),
        "minutes": arguments.minutes,
        "ceilings": ceiling,
        "left_out": budget.left_out,
        "points": [],
    }
    for point in points:
        result["points"].append(run_point(point, timer, ceiling, budget))
        result["seconds"] = round(time.perf_counter() - STARTED, 1)
        show(result["points"][-1])
        write_json(output, result)
    for point in slow:
        record = run_point(point, timer, ceiling, budget, slow=True, record=result["points"][points.index(point)])
        result["seconds"] = round(time.perf_counter() - STARTED, 1)
        show(record)
        write_json(output, result)
    result |= {"complete": True, "provenance_after": provenance(DEVICE)}
    write_json(output, result)
    failures = _failures(result["points"])
    print(f"\n{len(points)} points in {result['seconds']} s, {len(budget.left_out)} things left out; {output.name}")
    if failures:
        raise SystemExit("wrong or failed: " + "; ".join(failures))


if __name__ == "__main__":
    main()
