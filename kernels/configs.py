"""Launch configurations: a deterministic table by kernel, GPU and shape bucket (`<family>.json` beside each family).

Autotuning at run time would make a network's latency depend on what ran before it, and no predictor could learn that.
Here the same shape on the same GPU always launches the same way. A kernel's rows are read in order, and the first whose
bounds (`up_to`, inclusive) hold the shape is taken; the last row has no bounds. `python -m mixnas.kernels.tools.retune`
measures the candidates on a GPU and writes its rows.

``MIXNAS_NO_WGMMA=1`` takes the rows "no-wgmma" of the kernels that have some, whatever the GPU: blocks too small for
the matrix instructions of Hopper's warp groups, which the assembler that Triton 3.6 and 3.7 bring is reported to get
wrong (triton-lang/triton issue 11366).
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixnas.kernels import dispatch

TABLES = Path(__file__).parent
ANY_GPU = "any"  # rows for a GPU that has none of its own
NO_WGMMA = "no-wgmma"  # rows whose code has none of Hopper's matrix instructions for warp groups
INTERPRETER = "interpreter"  # rows for the interpreter, where a few large blocks are the fast form


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        up_to: Inclusive bounds on the features given to `pick`; a feature that isn't named is unbounded.
        launch: Block sizes, `num_warps` and `num_stages`, passed to the kernel by name.
        spills_because: Why a stack frame or spills are accepted for this row; empty where none are.
    """

    up_to: dict[str, int] = field(default_factory=dict)
    launch: dict[str, int] = field(default_factory=dict)
    spills_because: str = ""


@functools.cache
def load() -> dict[str, dict[str, Any]]:
    """Read the tables, one per family: `{family: {"provenance": {...}, "kernels": {kernel: {gpu: [row, ...]}}}}`."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(TABLES.glob("*.json"))}


@functools.cache
def kernels() -> dict[str, dict[str, tuple[Row, ...]]]:
    """Return the rows of all families' kernels, by kernel and GPU."""
    found: dict[str, dict[str, tuple[Row, ...]]] = {}
    for table in load().values():
        for kernel, by_gpu in table["kernels"].items():
            found[kernel] = {gpu: tuple(Row(**row) for row in rows) for gpu, rows in by_gpu.items()}
    return found


def rows(kernel: str, gpu: str) -> tuple[Row, ...]:
    """Return the rows of `kernel` for `gpu`, or those for any GPU where it has none of its own."""
    if kernel not in kernels():
        raise KeyError(f"no table has a kernel {kernel!r}; there are {', '.join(sorted(kernels()))}")
    by_gpu = kernels()[kernel]
    if gpu != INTERPRETER and NO_WGMMA in by_gpu and without_wgmma():
        return by_gpu[NO_WGMMA]
    return by_gpu.get(gpu) or by_gpu[ANY_GPU]


def without_wgmma() -> bool:
    """Say whether ``MIXNAS_NO_WGMMA`` asks for the rows without Hopper's matrix instructions for warp groups."""
    return os.environ.get("MIXNAS_NO_WGMMA", "").lower() in ("1", "true", "yes", "on")


def gpus(kernel: str) -> tuple[str, ...]:
    """Return the names of the GPUs (and "interpreter") that `kernel` has rows for."""
    return tuple(kernels()[kernel])


@functools.cache
def _cuda_name(index: int) -> str:
    return torch.cuda.get_device_name(index).lower().replace(" ", "-")


def gpu_of(tensor: torch.Tensor) -> str:
    """Return the table's name for the tensor's device, such as "nvidia-h200"."""
    if dispatch.is_recording():
        return dispatch.recorded_gpu()
    if tensor.is_cuda:
        return _cuda_name(tensor.get_device())
    return INTERPRETER


@functools.lru_cache(maxsize=4096)
def _pick(kernel: str, gpu: str, features: tuple[tuple[str, int], ...], _without_wgmma: bool) -> dict[str, int]:
    values = dict(features)
    for row in rows(kernel, gpu):
        if all(values[name] <= bound for name, bound in row.up_to.items()):
            return row.launch
    raise KeyError(f"no row of {kernel!r} for {gpu!r} holds {values}; the last row must be unbounded")


def pick(kernel: str, tensor: torch.Tensor, **features: int) -> dict[str, int]:
    """Return the launch configuration of `kernel` for a shape, on the device of `tensor`.

    Args:
        kernel: The kernel's name in the table: its function's name without `_kernel`.
        tensor: Any of the operands; its device says which rows apply.
        features: The shape's features that the rows are bounded by, such as `channels=64`. How large the launch is
            belongs to them (`positions`, or `sequences` where programs walk whole sequences).
    """
    chosen = _overrides.get(kernel)
    return chosen or _pick(kernel, gpu_of(tensor), tuple(sorted(features.items())), without_wgmma())


_overrides: dict[str, dict[str, int]] = {}


@contextlib.contextmanager
def override(kernel: str, launch: dict[str, int]) -> Iterator[None]:
    """Launch `kernel` with this configuration for a while, whatever the table says; for `retune.py`."""
    before = _overrides.get(kernel)
    _overrides[kernel] = launch
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before
