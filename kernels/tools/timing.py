"""What `retune` times a launch with: compilers in processes of their own, operands on the device, a clock."""

import functools
import importlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from mixnas.kernels import FAMILIES, configs, dispatch
from mixnas.kernels.tools import aot
from mixnas.kernels.tools.rows import Job


def compile_candidate(job: Job, launch: Mapping[str, int], example: int) -> dict[str, Any]:
    """Compile a job's example with a launch, as the GPU would launch it; returns what it uses (`aot`)."""
    with configs.override(job.kernel, dict(launch)):
        kernel, arguments, options = aot._record(job.kernel, configs.ANY_GPU, job.examples()[example])
    return aot.compile_for_launch(kernel, arguments, options)


class Compilers:
    """Processes that compile; one that dies costs what it was compiling, no more."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, mp_context=multiprocessing.get_context("spawn"))

    def submit(self, job: Job, launch: Mapping[str, int], example: int = 0) -> Future[dict[str, Any]] | None:
        """Begin to compile; None where no process can be had: then the launch compiles for itself."""
        interpreting = os.environ.pop("TRITON_INTERPRET", None)  # they compile, whatever this process does
        try:
            for _ in range(2):
                try:
                    self._pool = self._pool or self._start()
                    return self._pool.submit(compile_candidate, job, launch, example)
                except (BrokenProcessPool, OSError, RuntimeError):
                    self._pool = None
            return None
        finally:
            if interpreting is not None:
                os.environ["TRITON_INTERPRET"] = interpreting

    def close(self) -> None:
        """End the processes, without waiting for what they still compile."""
        if self._pool is not None:
            for process in list(getattr(self._pool, "_processes", {}).values()):
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)


def _on_device(value: Any, generator: torch.Generator, made: dict[int, torch.Tensor]) -> Any:
    """Replace "meta" tensors by random ones on the device, each once."""
    if isinstance(value, torch.Tensor):
        if id(value) not in made:
            drawn = torch.randn(value.shape, generator=generator, device=generator.device, dtype=torch.float32)
            # Negative, so that decays decay.
            made[id(value)] = (-0.5 * drawn.abs()).to(value.dtype)
        return made[id(value)]
    if isinstance(value, (tuple, list)):
        return type(value)(_on_device(item, generator, made) for item in value)
    return value


def _flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for item in result or () for tensor in _flat(item)] if isinstance(result, (tuple, list)) else []


class Bench:
    """An example with its operands on the device: what a launch gives, and how long its one kernel takes."""

    def __init__(self, kernel: str, example: aot.Example, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        made: dict[int, torch.Tensor] = {}
        call: Any = example.call  # examples are `functools.partial`s
        arguments = [_on_device(argument, generator, made) for argument in call.args]
        keywords = {name: _on_device(value, generator, made) for name, value in call.keywords.items()}
        self.label = example.label
        self._kernel, self._device = kernel, device
        self._call = functools.partial(call.func, *arguments, **keywords)
        self._expected: list[torch.Tensor] | None = None

    def run(self, launch: Mapping[str, int]) -> tuple[str, Callable[[], None]]:
        """Run the example; returns what is wrong with the result ("" if nothing), and the launch of its one kernel.

        The first result is what later ones are compared with.
        """
        caught: list[Callable[[], None]] = []
        with dispatch.backend("triton"), configs.override(self._kernel, dict(launch)), _catching(self._kernel, caught):
            result = [tensor.double() for tensor in _flat(self._call())]
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._expected = result if self._expected is None else self._expected
        pairs = list(zip(result, self._expected, strict=True))
        errors = [float((got - want).norm()) / max(float(want.norm()), 1e-30) for got, want in pairs]
        if not all(torch.isfinite(got).all() for got, _ in pairs):
            return "the result is not finite", caught[-1]
        return "" if all(error < 1e-2 for error in errors) else f"another result: {max(errors):.1e}", caught[-1]


class _catching:  # noqa: N801 - a context manager, used like a function
    """Within it, launches of a kernel are kept, to be repeated by themselves."""

    def __init__(self, kernel: str, caught: list[Callable[[], None]]) -> None:
        self._name, self._caught = f"{kernel}_kernel", caught

    def __enter__(self) -> None:
        modules = [importlib.import_module(f"mixnas.kernels.{family}") for family in FAMILIES]
        self._door = door = dispatch.launch

        def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
            if kernel.__name__ == self._name:
                self._caught.append(functools.partial(door, kernel, grid, *arguments, **options))
            door(kernel, grid, *arguments, **options)

        self._modules = [module for module in modules if getattr(module, "launch", None) is door]
        for module in self._modules:
            module.launch = launch  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module.launch = self._door  # type: ignore[attr-defined]


class ContextLostError(RuntimeError):
    """A launch broke the device's context (an illegal access, say): nothing runs in this process any more."""


def require_context(device: str) -> None:
    """Raise `ContextLostError` where the device answers no more."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise ContextLostError(f"the GPU answers this process no more: {error}") from error


class Clock:
    """Median time of a launch in a CUDA graph on a cold L2, in microseconds; on a CPU its wall-clock time."""

    def __init__(self, device: str, repeats: int) -> None:
        self.repeats = repeats
        self._flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device == "cuda" else None

    def __call__(self, launch: Callable[[], None]) -> float:
        if self._flush is None:
            started = time.perf_counter()
            launch()
            return (time.perf_counter() - started) * 1e6
        launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        graph.replay()
        events = []
        for _ in range(self.repeats):
            self._flush.zero_()
            torch.cuda._sleep(100_000)  # clock cycles: the graph is queued before the clock starts
            events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            events[-1][0].record()
            graph.replay()
            events[-1][1].record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) * 1e3 for start, end in events)
