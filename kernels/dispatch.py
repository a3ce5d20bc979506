"""The choice of implementation by device, and the one door through which Triton kernels are launched."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING or importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    HAS_TRITON = True
else:  # macOS, Windows: kernels are defined but can't be launched

    class _Absent:
        """Stands for `triton` and `triton.language` while kernels are being defined."""

        constexpr = object

        @staticmethod
        def jit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
            return function if function is not None else lambda kernel: kernel

    triton = tl = _Absent()
    HAS_TRITON = False

BACKENDS = ("triton", "aten", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Read once, as Triton does: `@triton.jit` decides at import between the compiler and the interpreter.
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")

_Operand = TypeVar("_Operand", torch.Tensor, torch.Tensor | None)

_forced: str | None = None
_as_traced = False
_eager_alone = False
_recorder: Callable[..., None] | None = None
_recorded_gpu = ""


def choose(*tensors: torch.Tensor | None) -> str:
    """Name the implementation for these tensors: "triton", "aten" or "reference".

    CUDA tensors of a dtype that kernels take run Triton where it is installed; CPU tensors run ATen, or Triton in the
    interpreter when the process was started with ``TRITON_INTERPRET=1``. `backend` overrides the choice.
    """
    if _forced is not None:
        return _forced
    on_cuda = True
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in KERNEL_DTYPES:
            return "aten"
        on_cuda = on_cuda and tensor.is_cuda
    return "triton" if (on_cuda and HAS_TRITON) or INTERPRETING else "aten"


def use_triton(*tensors: torch.Tensor | None) -> bool:
    """Say whether these tensors go to a Triton kernel (see `choose`)."""
    return choose(*tensors) == "triton"


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force one implementation for a while (process-wide; None restores the choice by device).

    "triton" on CPU tensors needs a process that was started with ``TRITON_INTERPRET=1``.
    """
    global _forced
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend {name!r}: expected one of {', '.join(BACKENDS)}, or None")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def recording(recorder: Callable[..., None], gpu: str) -> Iterator[None]:
    """Hand each launch to `recorder(kernel, grid, arguments, options)`, not to a device, configured as for `gpu`."""
    global _recorder, _recorded_gpu
    before = _recorder, _recorded_gpu
    _recorder, _recorded_gpu = recorder, gpu
    try:
        yield
    finally:
        _recorder, _recorded_gpu = before


def is_recording() -> bool:
    """Say whether launches are being recorded for the ahead-of-time compiler, not run."""
    return _recorder is not None


def recorded_gpu() -> str:
    """Return the table's name of the GPU that launches are being recorded for."""
    return _recorded_gpu


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Launch `kernel` on `grid`: tensors and integers by position, constants, `num_warps`, `num_stages` by name."""
    if _recorder is not None:
        _recorder(kernel, tuple(grid), arguments, options)
        return
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):  # Triton launches on the current device, not on the tensors'
            kernel[tuple(grid)](*arguments, **options)
        return
    if not INTERPRETING:
        raise RuntimeError(
            f"the Triton kernel {getattr(kernel, '__name__', kernel)} was asked for {device.type} tensors: start the "
            "process with TRITON_INTERPRET=1 to interpret it, or leave the choice to the device"
        )
    kernel[tuple(grid)](*arguments, **options)


def as_autocast(*tensors: _Operand) -> tuple[_Operand, ...]:
    """Return floating-point operands as autocast would have ATen's: it can't see inside an operator of our own.

    Tensors on a device for which autocast is off are returned as they are.
    """
    return tuple(_as_autocast(tensor) for tensor in tensors)


def _as_autocast(tensor: _Operand) -> _Operand:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def tracing() -> bool:
    """Say whether tensors made now belong to a trace (`torch.compile`, `torch.export`) and must not be kept."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    if _eager_alone:
        raise TracedOtherwiseError("what runs here is not what a trace would hold")
    if _as_traced or torch.compiler.is_compiling():  # which cannot look at the modes
        return True
    # A mode that only looks on (`observes`) leaves eager mode as it is.
    return any(not getattr(mode, "observes", False) for mode in _get_current_dispatch_mode_stack())


def exporting() -> bool:
    """Say whether what is computed now is put down for another runtime (`torch.export`), or as if it were
    (`as_traced`): for an operator that has a form of its own for runtimes that cannot run the other."""
    return _as_traced or torch.compiler.is_exporting()


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """For what is made once and kept: it can be read in and out of inference mode, and has no gradient.

    Inside a trace nothing is switched: torch.export would write down that gradients are, of the switches of inference
    mode only one half, and put all that follows into a graph of its own.
    """
    if tracing():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class TracedOtherwiseError(RuntimeError):
    """Something asked whether it is traced, where the answer would show other operations than eager mode's."""


@contextlib.contextmanager
def eager_alone() -> Iterator[None]:
    """Within it, whoever asks `tracing` gets `TracedOtherwiseError`: shapes alone would not show what runs for real."""
    global _eager_alone
    before, _eager_alone = _eager_alone, True
    try:
        yield
    finally:
        _eager_alone = before


@contextlib.contextmanager
def as_traced() -> Iterator[None]:
    """Compute in eager mode by the operations that a trace records, not by those that are fastest on this machine."""
    global _as_traced
    before, _as_traced = _as_traced, True
    try:
        yield
    finally:
        _as_traced = before


def cdiv(a: int, b: int) -> int:
    """Divide and round up (`triton.cdiv` without Triton)."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()
