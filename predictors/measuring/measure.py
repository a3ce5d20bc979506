"""Measuring latency on a machine whose speed drifts: every time is a ratio to a sentinel network's.

A shared machine's speed changes by 20 to 30% over minutes, and no statistic of absolute times survives that. So each
short window of repeats stands between two readings of one small fixed network, the sentinel. A window whose two
readings differ by more than 10% is dropped and measured again. A network's latency is the mean, over several passes in
shuffled order, of its 20th percentile divided by the sentinel's, times the sentinel's reference time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mixnas.predictors.measuring.device import DEFAULT_THREADS
from mixnas.predictors.measuring.sentinel import make_sentinel
from mixnas.predictors.measuring.value import Latency
from mixnas.search_space.reporting import SILENT, Report

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Call = Callable[[], object]
Clock = Callable[[Call, int], np.ndarray]
"""`clock(call, repeats)` returns the time of each repeat, nanoseconds."""

QUANTILE = 20
MAX_DRIFT = 0.10
CONFIDENCE = 0.90
_LEAST_REPEATS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureConfig:
    """How latency is measured.

    Attributes:
        passes: Accepted windows per network, each in a pass of its own over all networks in shuffled order.
        window_ms: Time that the repeats of a window should take together; sets the number of repeats.
        min_repeats: Repeats of a window, at least; of a forward that takes longer than `window_ms` as many as last as
            long as these would at that time, but no fewer than three.
        max_repeats: Repeats of a window, at most.
        warmup: Untimed calls before each window.
        sentinel_repeats: Repeats of each sentinel reading.
        max_extra_passes: Further passes for the windows that were dropped; what is still missing then is made up
            from the dropped windows that drifted least, and the interval is widened by their drift.
        threads: Threads inside an operator.
        batch_size: Inputs per forward.
    """

    passes: int = 3
    window_ms: float = 12.0
    min_repeats: int = 8
    max_repeats: int = 80
    warmup: int = 2
    sentinel_repeats: int = 10
    max_extra_passes: int = 4
    threads: int = DEFAULT_THREADS
    batch_size: int = 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measured latency and how it came about.

    Attributes:
        latency: `ratio` times the sentinel's reference time; its interval includes the sentinel's scatter.
        ratio: Time in units of the sentinel's.
        passes: Accepted windows.
        windows_dropped: Windows in which the machine drifted.
        threads: Threads inside an operator.
    """

    latency: Latency
    ratio: float
    passes: int
    windows_dropped: int
    threads: int


@dataclass(frozen=True, slots=True)
class Window:
    """One window: the repeats of one network between two readings of the sentinel. Times in nanoseconds."""

    index: int
    pass_index: int
    samples_ns: np.ndarray = field(repr=False)
    before_ns: float
    after_ns: float

    @property
    def sentinel_ns(self) -> float:
        """Geometric mean of the two readings."""
        return math.sqrt(self.before_ns * self.after_ns)

    @property
    def drift(self) -> float:
        """Relative difference of the two readings."""
        return abs(self.before_ns - self.after_ns) / min(self.before_ns, self.after_ns)

    @property
    def accepted(self) -> bool:
        """Whether the machine's speed held for the length of the window."""
        return self.drift <= MAX_DRIFT

    @property
    def ratio(self) -> float:
        """Time in units of the sentinel's."""
        return float(np.percentile(self.samples_ns, QUANTILE)) / self.sentinel_ns


def cpu_clock(call: Call, repeats: int) -> np.ndarray:
    """Wall-clock time of each call."""
    times = np.empty(repeats)
    now = time.perf_counter_ns
    for i in range(repeats):
        start = now()
        call()
        times[i] = now() - start
    return times


def on_own_heap(function: Callable[[], Window]) -> Window:
    """What a function returns, run in a thread that does nothing but this, on the core where the caller is.

    On a CPU a convolution allocates memory at every call, and how long that takes depends on what the process has
    allocated and freed before: the same one took 36 to 49 us, and 42 in a fresh process. A thread of its own has a heap
    of its own, on which only the passing memory of what is measured has ever been: there it took 42 us whatever the
    process held, which is also what a process that only serves the network sees. On another core, woken for each
    window, times would scatter twice as much.
    """
    import torch

    worker = _WORKERS.get(os.getpid())
    if worker is None:
        worker = _WORKERS[os.getpid()] = ThreadPoolExecutor(1, "measuring")
    inference = torch.is_inference_mode_enabled()
    core = {_libc().sched_getcpu()}

    def there() -> Window:
        os.sched_setaffinity(0, core)
        torch.set_num_threads(1)  # as inference mode and the core, a thread's own
        with torch.inference_mode(inference):
            return function()

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core)
    try:
        return worker.submit(there).result()
    finally:
        os.sched_setaffinity(0, allowed)


_WORKERS: dict[int, ThreadPoolExecutor] = {}  # by process: a fork does not have its parent's threads


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def _can_have_own_heap(threads: int) -> bool:
    """Not with several threads an operator, which must not share one core; glibc gives each thread a heap."""
    return threads == 1 and hasattr(os, "sched_setaffinity") and hasattr(_libc(), "sched_getcpu")


@dataclass(frozen=True, slots=True)
class HotInput:
    """A forward whose input another one has just written: a clock that clears caches writes it anew before it starts.

    Attributes:
        forward: The call.
        inputs: What it reads.
    """

    forward: Call
    inputs: torch.Tensor

    def __call__(self) -> object:
        """Run the forward."""
        return self.forward()


_QUEUED_CYCLES = 200_000
"""Clock cycles, about 0.1 ms, for which a GPU waits before the clock starts: until then all is submitted."""
_LEAST_SHARE = 0.1  # of a time is left when the clock's own is subtracted


class CudaClock:
    """Times calls on the current NVIDIA GPU, with its L2 cache cleared before each.

    `graph=False` is the time that the caller waits, launches included; `graph=True` is for the replay of a CUDA
    graph: the time between two events on the stream, less that between two round a graph of nothing. Clearing ends
    before the clock starts, and the clock starts when all is submitted: neither is in the time.

    Attributes:
        overhead_ns: What is subtracted.
    """

    def __init__(self, graph: bool) -> None:
        import torch

        self._graph = graph
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self._scratch = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device="cuda")
        self.overhead_ns = 0.0
        if graph:
            self.overhead_ns = float(np.median(self._between_events(_empty_graph(), 20)))

    def __call__(self, call: Call, repeats: int) -> np.ndarray:
        import torch

        if self._graph:
            raw = self._between_events(call, repeats)
            return np.maximum(raw - self.overhead_ns, _LEAST_SHARE * raw)
        times = np.empty(repeats)
        for i in range(repeats):
            self._clear(call)
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            call()
            torch.cuda.synchronize()
            times[i] = time.perf_counter_ns() - start
        return times

    def _clear(self, call: Call) -> None:
        """Push everything out of the cache; then bring back what would be there."""
        self._scratch.zero_()
        if isinstance(call, HotInput):
            call.inputs.mul_(1)

    def _between_events(self, call: Call, repeats: int) -> np.ndarray:
        import torch

        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start_event, end_event in events:
            self._clear(call)
            torch.cuda._sleep(_QUEUED_CYCLES)
            start_event.record()
            call()
            end_event.record()
        torch.cuda.synchronize()
        return np.array([start.elapsed_time(end) * 1e6 for start, end in events])


def _empty_graph() -> Call:
    """The replay of a CUDA graph of nothing; nothing itself where none can be captured."""
    import torch

    graph = torch.cuda.CUDAGraph()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is empty
            with torch.cuda.graph(graph):
                pass
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        log.info("no empty CUDA graph: %s", error)
        return lambda: None
    return graph.replay


@contextlib.contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """Within it, torch's operators use this many threads; afterwards as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def measuring(threads: int) -> Iterator[None]:
    """The state that everything is measured in: inference mode, a fixed number of threads, no garbage collection."""
    import torch

    collecting = gc.isenabled()
    gc.disable()
    try:
        with fixed_threads(threads), torch.inference_mode():
            yield
    finally:
        if collecting:
            gc.enable()


def forward_call(module: torch.nn.Module, inputs: torch.Tensor) -> Call:
    """The eager forward of a module as a callable without arguments; puts the module in evaluation mode."""
    module.eval().requires_grad_(False)
    return lambda: module(inputs)


class Meter:
    """Takes windows, and keeps the sentinel's readings."""

    def __init__(self, config: MeasureConfig, *, sentinel: Call | None = None, clock: Clock = cpu_clock) -> None:
        self.config = config
        self._sentinel = make_sentinel() if sentinel is None else sentinel
        self._clock = clock
        self.readings: list[float] = []

    def _read(self) -> float:
        self._sentinel()
        value = float(np.percentile(self._clock(self._sentinel, self.config.sentinel_repeats), QUANTILE))
        self.readings.append(value)
        return value

    def window(self, call: Call, index: int = 0, pass_index: int = 0) -> Window:
        """Measure one window of `call`. Must run inside `measuring`."""
        for _ in range(self.config.warmup):  # here: what a first call keeps for later ones is not for the other heap
            started = time.perf_counter()
            call()
            if (time.perf_counter() - started) * 1e3 > self.config.window_ms:
                break
        self._sentinel()
        measured = partial(self._window, call, index, pass_index)
        own_heap = self._clock is cpu_clock and _can_have_own_heap(self.config.threads)
        return on_own_heap(measured) if own_heap else measured()

    def _once_ms(self, call: Call) -> float:
        return max(float(self._clock(call, 1)[0]) * 1e-6, 1e-6)

    def _window(self, call: Call, index: int, pass_index: int) -> Window:
        config = self.config
        estimate_ms = self._once_ms(call)
        long = estimate_ms > config.window_ms  # then what a first call is slower by, and the caches, are nothing to it
        if not long:
            estimate_ms = self._once_ms(call)
        repeats = repeats_of(estimate_ms, config)
        before = self._read()  # anew: since the reading after the last window, the core may be another
        if not long:
            call()  # brings code and data back that the sentinel's reading pushed out of the caches
        samples = self._clock(call, repeats)
        return Window(index, pass_index, samples, before, self._read())


def repeats_of(forward_ms: float, config: MeasureConfig) -> int:
    """Repeats of a window for a forward that takes so long; see `MeasureConfig`."""
    if forward_ms <= config.window_ms:
        return int(np.clip(config.window_ms / forward_ms, config.min_repeats, config.max_repeats))
    return max(min(_LEAST_REPEATS, config.min_repeats), int(config.min_repeats * config.window_ms / forward_ms))


def windows_of(
    calls: Sequence[Call],
    meter: Meter,
    rng: np.random.Generator,
    report: Report = SILENT,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Window]:
    """Windows of all calls: `passes` shuffled passes, then passes over what was dropped. Run inside `measuring`.

    Args:
        calls: One forward each.
        meter: What takes the windows.
        rng: Shuffles.
        report: Told how many windows are accepted, of how many that are wanted.
        should_stop: Asked before each window.

    Yields:
        Every window, accepted or not, in the order in which it was taken.
    """
    config = meter.config
    missing = np.full(len(calls), config.passes)
    wanted = len(calls) * config.passes
    for pass_index in range(config.passes + config.max_extra_passes):
        due = np.flatnonzero(missing)
        for index in rng.permutation(due):
            if should_stop is not None and should_stop():
                return
            window = meter.window(calls[index], int(index), pass_index)
            missing[index] -= window.accepted
            yield window
            report(wanted - int(missing.sum()), wanted)
        if not len(due):
            return


_T95 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)  # Student's t, two-sided 90%, 1 to 10 degrees


def _student(degrees: float) -> float:
    return float(np.interp(degrees, np.arange(1, 11), _T95)) if degrees <= 10 else 1.645 + 1.65 / degrees


def summarise(windows: Iterable[Window], count: int, config: MeasureConfig, reference_ms: float) -> list[Measurement]:
    """One measurement per network from its windows.

    The spread of a few passes is a poor estimate of a variance, so each network's is shrunk towards that of all
    (weight of 4 degrees of freedom). The interval adds the sentinel's own scatter between the two ends of a window.

    Args:
        windows: As `windows_of` gave them.
        count: Number of networks.
        config: What they were measured with.
        reference_ms: The sentinel's reference time.

    Raises:
        ValueError: A network has no window.
    """
    groups: list[list[Window]] = [[] for _ in range(count)]
    if not count:
        return []
    for window in windows:
        groups[window.index].append(window)
    chosen: list[list[Window]] = []
    for index, group in enumerate(groups):
        if not group:
            raise ValueError(f"network {index} was not measured: it has no window")
        accepted = [w for w in group if w.accepted]
        rest = sorted((w for w in group if not w.accepted), key=lambda w: w.drift)
        chosen.append(accepted + rest[: max(0, config.passes - len(accepted))])
    logs = [np.log([w.ratio for w in group]) for group in chosen]
    freedom = sum(len(values) - 1 for values in logs)
    pooled = sum(float(((v - v.mean()) ** 2).sum()) for v in logs) / freedom if freedom else 0.0
    drifts = np.array([math.log(w.after_ns / w.before_ns) for group in chosen for w in group])
    # Of a mean of two readings, each with half the variance of their difference.
    sentinel_variance = float((drifts**2).mean()) / 4
    results = []
    for group, values, all_windows in zip(chosen, logs, groups, strict=True):
        n = len(values)
        own = float(((values - values.mean()) ** 2).sum())
        variance = (4 * max(pooled, sentinel_variance) + own) / (4 + n - 1) / n
        # As a logarithm: a machine that stood still for a second in one reading gives a wide interval, not infinity.
        variance += sum(math.log1p(w.drift) ** 2 for w in group if not w.accepted) / n**2
        half = _student(4 + n - 1) * math.sqrt(variance + sentinel_variance / n)
        ratio = math.exp(float(values.mean()))
        ms = ratio * reference_ms
        results.append(
            Measurement(
                Latency(ms, ms * math.exp(-half), ms * math.exp(half), "measured"),
                ratio=ratio,
                passes=sum(w.accepted for w in group),
                windows_dropped=sum(not w.accepted for w in all_windows),
                threads=config.threads,
            )
        )
    restless = sum(not result.passes for result in results)
    if restless:
        log.warning("the machine's speed drifted in every window of %d of %d networks", restless, count)
    return results


def measure_networks(
    networks: Sequence[Call],
    *,
    rng: np.random.Generator,
    config: MeasureConfig | None = None,
    sentinel: Call | None = None,
    reference_ms: float | None = None,
    clock: Clock = cpu_clock,
    report: Report = SILENT,
    keep: Callable[[Window], None] | None = None,
) -> list[Measurement]:
    """Measure networks against the sentinel, so that they can be compared although the machine's speed drifts.

    Args:
        networks: One forward each, on inputs of their own; see `forward_call`.
        rng: Shuffles the passes.
        config: How; the defaults of `MeasureConfig` if not given.
        sentinel: The sentinel's forward; `make_sentinel()` if not given.
        reference_ms: The sentinel's reference time, from the device's table. If not given, the median reading of this
            call: then latencies compare within this call only.
        clock: `cpu_clock` or a `CudaClock`.
        report: See `windows_of`.
        keep: Called with every window as it is taken, raw samples included.

    Returns:
        A `Measurement` per network, in the order given.
    """
    config = config or MeasureConfig()
    windows = []
    with measuring(config.threads):
        meter = Meter(config, sentinel=sentinel, clock=clock)
        for window in windows_of(networks, meter, rng, report):
            windows.append(window)
            if keep is not None:
                keep(window)
    if reference_ms is None:
        reference_ms = float(np.median(meter.readings)) * 1e-6 if meter.readings else math.nan
    return summarise(windows, len(networks), config, reference_ms)
