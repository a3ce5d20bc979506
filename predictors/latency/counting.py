"""Counting one forward: operations, multiply-accumulates and bytes by kind; on a GPU the launches too.

It runs under a dispatch mode that sees every operation, so that a new operator needs nothing here. What a kernel of our
own multiplies it says itself (`kernels.work`), with its bit width. The counts are the physics of the latency predictor,
and sums: those of a unit are those of its operators, added up (`features`).

For an NVIDIA GPU the launches of the Triton kernels are seen as well: how many blocks, in how many waves, with which
registers and shared memory (`kernels/resources.csv`). That needs no GPU: elsewhere little is computed but shapes, as no
count depends on values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mixnas.kernels import work
from mixnas.kernels.tools import resources
from mixnas.predictors.latency.gpus import GPU, Spread, floors_ms, launch_work, matmul_busy, occupancy
from mixnas.predictors.latency.model import ABOUT, Columns
from mixnas.search_space.cost import PACKED_PRODUCTS, aten_macs

# Kinds of operation: what is fast at one is not at another. Anything not listed is "pointwise".
_KINDS = {
    "matmul": ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "_int_mm"),
    "weight_only": PACKED_PRODUCTS,  # stored in few bits, multiplied in more
    "conv": ("convolution",),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    "reduce": (
        "native_layer_norm",
        "_fused_rms_norm",
        "native_group_norm",
        "mean",
        "sum",
        "amax",
        "amin",
        "_softmax",
        "avg_pool2d",
        "max_pool2d_with_indices",
        "cumsum",
        "_adaptive_avg_pool2d",
        "linalg_vector_norm",
    ),
    "copy": ("clone", "copy_", "_to_copy", "cat", "stack", "constant_pad_nd", "embedding"),
    "view": (
        "view",
        "permute",
        "transpose",
        "t",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "as_strided",
        "detach",
        "alias",
        "_unsafe_view",
        "_reshape_alias",
        "unbind",
    ),
}
_KIND_OF = {name: kind for kind, operations in _KINDS.items() for name in operations}
_PRODUCTS = ("matmul", "weight_only", "conv", "depthwise", "attention")
_COSTLY_BYTES = 1 << 23

_RAW = "raw."  # sums that `finished` turns into what describes the launches
_WEIGHED = ("registers", "resident_warps", "shared_bytes", "tail", "blocks_busy")  # means over launches, by their bytes


def bits_suffix(bits: int) -> str:
    """How a bit width stands in the name of a count; 32 does not."""
    return "" if bits == 32 else f".{bits}"


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_bytes(item) for item in value)
    return 0


def _bits(name: str, operands: Sequence[Any]) -> int:
    """Of the narrowest operand that a product multiplies (not its bias, nor a mask)."""
    if "int4" in name:  # packed: the type of the tensor does not tell
        return 4
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    factors = tensors[1:3] if name in ("addmm", "baddbmm", "addmv") else tensors[:2]
    return 8 * min(factor.element_size() for factor in factors)


class _Operation(NamedTuple):
    """An operation of ATen that does work: its arithmetic, its bytes, and the shape of its outputs if a product."""

    kind: str
    macs: int
    bits: int
    moved: int
    outputs: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Launch:
    """A launch of a Triton kernel, and which call of a counted function it is part of (-1: of none)."""

    kernel: str
    spread: Spread
    moved: int
    bits: int
    resident_warps: int
    registers: int
    shared_bytes: int
    call: int


def _uninitialised(func: Any, args: Any, kwargs: Any) -> Any:
    """The results of an operation of ATen in shape alone: on "meta" tensors, then as memory nobody wrote to."""

    def like(tensor: Tensor, device: Any) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)

    device = next(t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    meta_args, meta_kwargs = tree_map_only(Tensor, lambda t: like(t, "meta"), (args, kwargs))
    return tree_map_only(Tensor, lambda t: like(t, device), func(*meta_args, **meta_kwargs))


class _Counter(TorchDispatchMode):
    """Counts what runs inside it, or, with `shapes_only`, would run."""

    def __init__(self, shapes_only: bool) -> None:
        super().__init__()
        self._shapes_only = shapes_only
        self.sums: dict[str, float] = {}
        self.operations: list[_Operation] = []
        self.calls: list[work.Work] = []

    def add(self, name: str, amount: float) -> None:
        """Add to a sum; one that is zero has no name."""
        if amount:
            self.sums[name] = self.sums.get(name, 0.0) + amount

    def heard(self, call: work.Work) -> None:
        """Take what a kernel says of a call."""
        self.calls.append(call)
        self.add(f"kernel.{call.kernel}{bits_suffix(call.bits)}.macs", call.macs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = (*args, *kwargs.values())
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        kind = _KIND_OF.get(name, "pointwise") if namespace == "aten" else f"{namespace}.{name}"
        # Shapes by way of "meta" tensors take some 100 microseconds, more than a small operation itself.
        computes = namespace == "aten" and kind != "view" and name != "_to_copy"
        worth = kind in _PRODUCTS or _bytes(inputs) > _COSTLY_BYTES
        if self._shapes_only and computes and worth and not func._schema.is_mutable and _bytes(inputs):
            output = _uninitialised(func, args, kwargs)
        else:
            output = func(*args, **kwargs)
        if kind == "conv" and args[1].shape[1] == 1 and args[8] > 1:
            kind = "depthwise"
        self.add(f"{kind}.calls", 1)
        if kind != "view":
            moved = _bytes(inputs) + _bytes(output)
            self.add(f"{kind}.bytes", moved)
            if namespace == "aten":
                macs = aten_macs(name, args, output)
                bits = _bits(name, args) if kind in _PRODUCTS else _narrowest(inputs)
                if not work.inside():
                    self.add(f"{kind}{bits_suffix(bits)}.macs", macs)
                self.operations.append(_Operation(kind, macs, bits, moved, _outputs(kind, output)))
        return output


def _narrowest(values: Sequence[Any]) -> int:
    return 8 * min((value.element_size() for value in values if isinstance(value, Tensor)), default=4)


def _outputs(kind: str, output: Any) -> tuple[int, int]:
    """Rows and columns of a product's result; a convolution is a product over its window."""
    if kind not in ("matmul", "conv") or not isinstance(output, Tensor) or not output.numel():
        return 0, 0
    columns = int(output.shape[-1 if kind == "matmul" else 1])
    return output.numel() // columns, columns


def _launch(gpu: GPU, call: int, kernel: str, grid: Sequence[int], dtype: str, arguments: Any, options: Any) -> _Launch:
    found = resources.resources_of(kernel, dtype, options)
    warps = int(options.get("num_warps", 4))
    registers, shared = (found.registers, found.shared_bytes) if found is not None else (0, 0)
    resident = occupancy(gpu.arch, warps, registers, shared)
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return _Launch(
        kernel,
        Spread.of(prod(grid), gpu.multiprocessors, resident),
        _bytes(tensors),
        _narrowest([tensor for tensor in tensors if tensor.is_floating_point()]),
        resident * warps,
        registers,
        shared,
        call,
    )


def count(
    module: nn.Module, inputs: Sequence[Any], gpu: GPU | None = None, on_gpu: bool = False
) -> tuple[dict[str, float], Any]:
    """Count one forward.

    Args:
        module: In evaluation mode, deployed.
        inputs: Its positional arguments.
        gpu: Count as for this GPU.
        on_gpu: Whether it runs there; elsewhere a GPU's forward is counted on shapes.

    Returns:
        Sums by name, and the forward's result. "<kind>.calls", "<kind>[.16|.8|.4].macs" by the bits of the narrowest
        factor, "<kind>.bytes" of operands and results, "kernel.<function>[.bits].macs" of what kernels of our own
        multiply, "modules". For a GPU also those of `gpus.launch_work` by kernel, "launches" (of anything),
        "arithmetic_ms" and "bandwidth_ms" (floors by the data sheet, each operation under the one that binds it), and
        what `finished` makes use of.
    """
    launches: list[_Launch] = []
    counter = _Counter(shapes_only=gpu is not None and not on_gpu)
    with contextlib.ExitStack() as stack:
        if gpu is not None:

            def watch(*seen: Any) -> None:
                launches.append(_launch(gpu, len(counter.calls) - 1 if work.inside() else -1, *seen))

            stack.enter_context(resources.watching(watch, gpu.name, on_gpu))
        stack.enter_context(work.watching(counter.heard))
        stack.enter_context(torch.no_grad())
        with counter:
            result = module(*inputs)
    counter.add("modules", sum(1 for _ in module.modules()))
    if gpu is not None:
        _add_gpu_work(counter, gpu, launches)
    return counter.sums, result


def _add_gpu_work(counter: _Counter, gpu: GPU, launches: Sequence[_Launch]) -> None:
    def floor(macs: float, moved: float, bits: int, busy: float) -> None:
        arithmetic, bandwidth = floors_ms(gpu, macs, moved, bits, busy)
        if arithmetic > bandwidth:
            counter.add("arithmetic_ms", arithmetic)
        else:
            counter.add("bandwidth_ms", bandwidth)

    together = [0] * len(counter.calls)  # bytes of the launches that a call makes; they share what it multiplies
    for launch in launches:
        if launch.call >= 0:
            together[launch.call] += launch.moved
    for launch in launches:
        macs, bits = 0.0, launch.bits
        if launch.call >= 0:
            call = counter.calls[launch.call]
            macs, bits = call.macs * launch.moved / max(together[launch.call], 1), call.bits
        for name, value in launch_work(launch.kernel, launch.spread, macs, launch.moved).items():
            counter.add(name, value)
        floor(macs, launch.moved, bits, launch.spread.busy)
        counter.add(f"{_RAW}moved", launch.moved)
        for name in ("registers", "resident_warps", "shared_bytes"):
            counter.add(f"{_RAW}{name}", getattr(launch, name) * launch.moved)
        counter.add(f"{_RAW}tail", launch.spread.tail * launch.moved)
        counter.add(f"{_RAW}blocks_busy", launch.spread.busy * launch.moved)
    for operation in counter.operations:
        busy = matmul_busy(*operation.outputs, gpu.multiprocessors) if all(operation.outputs) else 1.0
        if all(operation.outputs):
            counter.add(f"{operation.kind}.rounds.macs", operation.macs / busy)
        floor(operation.macs, operation.moved, operation.bits, busy)
    counter.add("launches", len(launches) + len(counter.operations))
    counter.add(f"{_RAW}every", sum(launch.moved for launch in launches))
    counter.add(f"{_RAW}every", sum(operation.moved for operation in counter.operations))


def finished(sums: Columns) -> Columns:
    """Counts from sums: of a GPU's, what describes the launches without being work, as means over them.

    The names of those begin with `model.ABOUT`. Sums of several operators are finished together, never one by one.
    """
    kept = [i for i, name in enumerate(sums.names) if not name.startswith(_RAW)]
    names = [sums.names[i] for i in kept]
    if len(kept) == len(sums.names):
        return sums
    multiplied = [i for i in kept if sums.names[i].endswith(".macs") and ".rounds." not in sums.names[i]]
    moved, every = sums.select([f"{_RAW}moved", f"{_RAW}every"]).T
    about = [sums.values[:, multiplied].sum(axis=1) / np.maximum(every, 1.0)]
    about += list((sums.select([f"{_RAW}{name}" for name in _WEIGHED]) / np.maximum(moved, 1.0)[:, None]).T)
    named = [f"{ABOUT}intensity", *(f"{ABOUT}{name}" for name in _WEIGHED)]
    return Columns((*names, *named), np.column_stack([sums.values[:, kept], *about]))
