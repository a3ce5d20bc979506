"""The runtimes that a network may be deployed through, each as a callable to be timed.

The order of two networks can differ between them, so latency is measured, kept and predicted per runtime.
"""

from __future__ import annotations

import importlib.util
import shutil

import torch
from torch import Tensor, nn

from mixnas.predictors.measuring.measure import Call, Clock, CudaClock, cpu_clock, forward_call
from mixnas.predictors.measuring.table import RUNTIMES
from mixnas.search_space.errors import ConfigError, nearest
from mixnas.search_space.formats.onnx import PACKAGES, to_onnx


def missing(runtime: str, device: str = "cpu") -> str:
    """What has to be installed, or why it cannot be: "" when the runtime is there.

    Raises:
        ConfigError: No such runtime.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime {runtime!r}.{nearest(runtime, RUNTIMES)} Allowed: {', '.join(RUNTIMES)}.")
    if runtime == "graph" and not device.startswith("cuda"):
        return "a CUDA graph needs an NVIDIA GPU"
    if runtime == "compiled" and not device.startswith("cuda") and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile on a CPU needs a C++ compiler (g++ or clang++)"
    if runtime == "onnxruntime":
        if device.startswith("cuda"):
            return "ONNX Runtime is measured on the CPU only"
        absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if absent:
            return f"pip install {' '.join(absent)}"
    return ""


def require(runtime: str, device: str = "cpu") -> None:
    """Raise `ConfigError` that says what is missing."""
    problem = missing(runtime, device)
    if problem:
        raise ConfigError(f"runtime {runtime!r} is not available here: {problem}.")


def clock_of(runtime: str, device: str = "cpu") -> Clock:
    """The clock that times a runtime's calls on a torch device."""
    return CudaClock(graph=runtime == "graph") if device.startswith("cuda") else cpu_clock


def prepare(module: nn.Module, inputs: Tensor, runtime: str, threads: int) -> Call:
    """The forward of a module on fixed inputs through a runtime, compiled and warm.

    Args:
        module: In evaluation mode, deployed, on the inputs' device.
        inputs: What it reads.
        runtime: One of `RUNTIMES`.
        threads: Threads inside an operator (ONNX Runtime keeps its own; the others are torch's, set by `measuring`).
    """
    require(runtime, inputs.device.type)
    if runtime == "eager":
        return forward_call(module, inputs)
    if runtime == "compiled":
        return _compiled(module, inputs)
    if runtime == "graph":
        return _graph(module, inputs)
    return _onnxruntime(module, inputs, threads)


def _compiled(module: nn.Module, inputs: Tensor) -> Call:
    # Exported first: each module then has code of its own, so Dynamo's cache holds one entry per forward. Compiled as
    # they stand, all units would share one code object, and the guards of all would be tried on every call.
    with torch.no_grad():
        exported = torch.export.export(module, (inputs,), strict=False).module()
    function = torch.compile(exported, dynamic=False)
    with torch.inference_mode():
        for _ in range(3):
            function(inputs)
    return lambda: function(inputs)


def _graph(module: nn.Module, inputs: Tensor) -> Call:
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = module(inputs)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _onnxruntime(module: nn.Module, inputs: Tensor, threads: int) -> Call:
    import onnxruntime

    content = to_onnx(module, inputs, dynamic_batch=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: session.run(None, feed)
