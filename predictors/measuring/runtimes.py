"""The runtimes that a network may be deployed through, each as a callable to be timed.

The order of two networks can differ between them, so latency is measured, kept and predicted per runtime. No runtime's
time counts before its outputs agree with eager PyTorch's.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mixnas.predictors.measuring.measure import Call, Clock, CudaClock, cpu_clock, forward_call
from mixnas.search_space.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

RUNTIMES = ("eager", "compiled", "onnxruntime", "graph")
"""eager PyTorch, torch.compile, ONNX Runtime (CPU), and a CUDA graph of the eager forward (GPU)."""

TOLERANCES = {"float16": 2e-2, "bfloat16": 6e-2, "int8": 6e-2, "uint8": 6e-2}
"""How far outputs may be from eager's, relative to the greatest of them, by the type of the coarsest weights: there one
rounding that falls otherwise shows."""
TOLERANCE = 2e-3
"""The same where all are float32."""


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
        from mixnas.search_space.formats.onnx import PACKAGES

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


def prepare(module: nn.Module, inputs: Tensor, runtime: str, threads: int, name: str = "the network") -> Call:
    """The forward of a module on fixed inputs through a runtime, compiled, warm, and right.

    Args:
        module: In evaluation mode, deployed, on the inputs' device.
        inputs: What it reads.
        runtime: One of `RUNTIMES`.
        threads: Threads inside an operator (ONNX Runtime keeps its own; the others are torch's, set by `measuring`).
        name: What it is, for messages.

    Raises:
        ConfigError: The runtime is not available here, or it does not answer what eager answers.
    """
    require(runtime, inputs.device.type)
    if runtime == "eager":
        return forward_call(module, inputs)
    if runtime == "compiled":
        call = _compiled(module, inputs)
    elif runtime == "graph":
        call = _graph(module, inputs)
    else:
        call = _onnxruntime(module, inputs, threads)
    _compare(call, module, inputs, runtime, name)
    return call


def _compare(call: Call, module: nn.Module, inputs: Tensor, runtime: str, name: str) -> None:
    """Refuse a runtime whose outputs are not eager's."""
    import torch

    with torch.inference_mode():
        wanted = module(inputs).double()
        answer: Any = call()
        found = torch.as_tensor(answer[0] if isinstance(answer, list | tuple) else answer).to(wanted)
    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in (*module.parameters(), *module.buffers())}
    allowed = max((TOLERANCES.get(dtype, TOLERANCE) for dtype in stored), default=TOLERANCE)
    if found.shape != wanted.shape:
        difference = f"outputs of shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    else:
        largest = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
        if largest <= allowed:
            return
        difference = f"outputs up to {largest:.2g} away, relative to the greatest; {allowed:g} is allowed"
    raise ConfigError(
        f"runtime {runtime!r} does not compute {name} as eager PyTorch does: {difference}. It is not measured; use "
        "another runtime, or leave the operator out."
    )


def _compiled(module: nn.Module, inputs: Tensor) -> Call:
    import torch

    # Exported first: each module then has code of its own, so Dynamo's cache holds one entry per forward. Compiled as
    # they stand, all units would share one code object, and the guards of all would be tried on every call.
    with torch.no_grad():
        exported = torch.export.export(module, (inputs,), strict=False).module()
    function = torch.compile(exported, dynamic=False)
    with torch.inference_mode():
        for _ in range(3):
            function(inputs)
    return lambda: function(inputs)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is, or came of, a GPU's memory that did not suffice: a capture that fails hides why."""
    import torch

    while error is not None:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def built_on(device: str, build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, made on a device: drawing large weights on a CPU takes longer than measuring them."""
    import torch

    if device == "cpu":
        return build()
    try:
        with torch.device(device):
            module = build()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        log.warning("a module cannot be made on %s, but is made on the CPU and brought there: %s", device, error)
        module = build()
    return module.to(device)


@functools.cache
def _first_graph() -> Any:
    """A graph whose memory all others of this process share: they run in turn, and nobody reads what one has left.

    It stays: memory whose graphs are all gone cannot be shared again.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        number = torch.zeros(1, device="cuda").add_(1)  # loaded before it is captured
        with torch.cuda.graph(graph):
            number.add_(1)
    return graph


def _graph(module: nn.Module, inputs: Tensor) -> Call:
    import torch

    # Not inference mode: a later capture outside it could not write the state of the random numbers.
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_first_graph().pool()):
            output = module(inputs)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _onnxruntime(module: nn.Module, inputs: Tensor, threads: int) -> Call:
    import onnxruntime

    from mixnas.search_space.formats.onnx import to_onnx

    content = to_onnx(module, inputs, dynamic_batch=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: session.run(None, feed)
