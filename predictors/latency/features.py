"""What a unit does, counted: operations, multiply-accumulates and bytes by kind, from one real forward.

A unit is run once under a dispatch mode that sees every operation, so that a new operator needs nothing here. The
counts are the physics of the latency predictor.

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

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mixnas.kernels.tools import resources
from mixnas.predictors.latency.gpus import GPU, Spread, floors_ms, launch_work, matmul_busy, occupancy
from mixnas.predictors.latency.model import ABOUT
from mixnas.predictors.units import Key
from mixnas.search_space.network import BlockModule, Unit, build_unit, seeded, unit_cost

# Kinds of operation: what is fast at one is not at another. Anything not listed is "pointwise".
_KINDS = {
    "matmul": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_int_mm", "einsum", "mkldnn_linear"),
    "conv": ("convolution", "conv1d", "conv2d", "_convolution", "mkldnn_convolution", "convolution_overrideable"),
    "attention": (
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_attention_math",
    ),
    "reduce": (
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "_fused_rms_norm",
        "native_group_norm",
        "mean",
        "sum",
        "amax",
        "amin",
        "_softmax",
        "softmax",
        "avg_pool2d",
        "avg_pool1d",
        "max_pool2d",
        "cumsum",
        "adaptive_avg_pool2d",
        "linalg_vector_norm",
    ),
    "copy": ("clone", "copy_", "_to_copy", "contiguous", "cat", "stack", "pad", "constant_pad_nd", "embedding"),
    "view": (
        "view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "split",
        "split_with_sizes",
        "chunk",
        "as_strided",
        "detach",
        "alias",
        "_unsafe_view",
        "view_as",
        "movedim",
        "unbind",
    ),
}
_WITHOUT_MACS = ("norm_", "glu_", "epilogue_")  # kernels that only scale and add
_COSTLY_BYTES = 1 << 23
_KIND_OF = {name: kind for kind, operations in _KINDS.items() for name in operations}


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_bytes(item) for item in value)
    return 0


def _macs(kind: str, inputs: tuple[Any, ...], output: Any) -> int:
    tensors = [item for item in inputs if isinstance(item, Tensor)]
    if kind == "matmul" and isinstance(output, Tensor):
        left = max(tensors[:2], key=lambda t: t.dim()) if len(tensors) > 1 else tensors[0]
        inner = tensors[1].shape[-2] if len(tensors) == 3 and tensors[0].dim() < 2 else left.shape[-1]
        return output.numel() * int(inner)
    if kind in ("conv", "depthwise") and isinstance(output, Tensor):
        return output.numel() * tensors[1][0].numel()
    if kind == "attention":
        q, k = tensors[:2]
        return 2 * q.numel() * int(k.shape[-2])
    return 0


class _Operation(NamedTuple):
    """An operation of ATen that does work: its arithmetic, its bytes, and the shape of its outputs if a product."""

    kind: str
    macs: int
    moved: int
    element_bytes: int
    outputs: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Launch:
    """A launch of a Triton kernel."""

    kernel: str
    spread: Spread
    moved: int
    element_bytes: int
    resident_warps: int
    registers: int
    shared_bytes: int


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
        self.work: dict[str, float] = {}
        self.operations: list[_Operation] = []

    def _add(self, name: str, amount: float) -> None:
        if amount:
            self.work[name] = self.work.get(name, 0.0) + amount

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = (*args, *kwargs.values())
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        kind = _KIND_OF.get(name, "pointwise") if namespace == "aten" else f"{namespace}.{name}"
        # Shapes by way of "meta" tensors take some 100 microseconds, more than a small operation itself.
        computes = namespace == "aten" and kind != "view" and name not in ("to", "_to_copy")
        worth = kind in ("matmul", "conv", "attention") or _bytes(inputs) > _COSTLY_BYTES
        if self._shapes_only and computes and worth and not func._schema.is_mutable and _bytes(inputs):
            output = _uninitialised(func, args, kwargs)
        else:
            output = func(*args, **kwargs)
        if kind == "conv":
            weight = next(t for t in [a for a in args if isinstance(a, Tensor)][1:])
            kind = "depthwise" if weight.shape[1] == 1 else "conv"
        if name == "to" and isinstance(output, Tensor):
            unchanged = isinstance(args[0], Tensor) and output.data_ptr() == args[0].data_ptr()
            kind = "view" if unchanged else "copy"
        self._add(f"{kind}.calls", 1)
        if kind != "view":
            tensors = [item for item in inputs if isinstance(item, Tensor)]
            size = min((t.element_size() for t in tensors), default=4)
            macs, moved = _macs(kind, args, output), _bytes(inputs) + _bytes(output)
            bits = {4: "", 2: ".16", 1: ".8"}.get(size, "")
            self._add(f"{kind}{bits}.macs", macs)
            self._add(f"{kind}.bytes", moved)
            if namespace == "aten":
                self.operations.append(_Operation(kind, macs, moved, size, _outputs(kind, output)))
        return output


def _outputs(kind: str, output: Any) -> tuple[int, int]:
    """Rows and columns of a product's result; a convolution is a product over its window."""
    if kind not in ("matmul", "conv") or not isinstance(output, Tensor) or not output.numel():
        return 0, 0
    columns = int(output.shape[-1 if kind == "matmul" else 1])
    return output.numel() // columns, columns


def _launch(gpu: GPU, kernel: str, grid: Sequence[int], dtype: str, arguments: Any, options: Any) -> _Launch:
    found = resources.resources_of(kernel, dtype, options)
    warps = int(options.get("num_warps", 4))
    registers, shared = (found.registers, found.shared_bytes) if found is not None else (0, 0)
    resident = occupancy(gpu.arch, warps, registers, shared)
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return _Launch(
        kernel,
        Spread.of(prod(grid), gpu.multiprocessors, resident),
        _bytes(tensors),
        min((t.element_size() for t in tensors if t.is_floating_point()), default=4),
        resident * warps,
        registers,
        shared,
    )


def example_input(unit: Key, batch_size: int, generator: torch.Generator, device: str = "cpu") -> Tensor:
    """Random input of a unit: normal (batch, *size, channels), or tokens (batch, length) where it reads tokens."""
    shape = (batch_size, *unit.before.size)
    if unit.detail == "tokens":
        return torch.randint(unit.before.width, shape, generator=generator).to(device)
    return torch.randn((*shape, unit.before.width), generator=generator).to(device)


def deployed_unit(unit: Key, device: str = "cpu") -> nn.Module:
    """A unit as it would be deployed: in evaluation mode, its weights stored as its quantization policy stores them."""
    module = build_unit(Unit("", *unit)).eval().requires_grad_(False).to(device)
    if isinstance(module, BlockModule):
        for branch in module.branches():
            module.quant.deploy(branch)  # type: ignore[operator]
    return module


def count_work(module: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Operations, multiply-accumulates and bytes by kind of one forward.

    Returns:
        Plain numbers by name: "<kind>.calls", "<kind>[.16|.8].macs" (by the narrowest operand's bits), "<kind>.bytes"
        (operands and results), and "modules", how many modules are called.
    """
    return _count(module, inputs).work


def _count(module: nn.Module, inputs: Tensor, shapes_only: bool = False) -> _Counter:
    counter = _Counter(shapes_only)
    with torch.inference_mode(), counter:
        module(inputs)
    recursion = getattr(module, "recursion", 1)
    counter.work["modules"] = float(sum(1 for _ in module.modules()) * recursion)
    return counter


def work_of(key: Key, batch_size: int, device: str = "cpu", gpu: GPU | None = None) -> dict[str, float]:
    """`count_work` of a unit that is built for it, with random weights and inputs.

    What an operator of our own multiplies cannot be seen from outside; it is the unit's exact count less what was seen.

    Args:
        key: The unit.
        batch_size: Inputs per forward.
        device: torch's, to run the forward on.
        gpu: Count as for this GPU, whatever `device` is.

    Returns:
        The counts; for a GPU also those of `gpus.launch_work` by kernel, "launches" (of anything), "arithmetic_ms" and
        "bandwidth_ms" (floors by the data sheet, each operation under the one that binds it), and what describes the
        launches without being work, each name beginning with `model.ABOUT`.
    """
    generator = torch.Generator().manual_seed(0)
    with seeded(generator):
        module = deployed_unit(key, device)
    inputs = example_input(key, batch_size, generator, device)
    launches: list[_Launch] = []
    with contextlib.ExitStack() as stack:
        if gpu is not None:
            on_device = device == "cuda"
            watch = resources.watching(lambda *seen: launches.append(_launch(gpu, *seen)), gpu.name, on_device)
            stack.enter_context(watch)
        counter = _count(module, inputs, shapes_only=gpu is not None and device != "cuda")
    work = counter.work
    if any(name.startswith("mixnas.") for name in work):
        seen = sum(value for name, value in work.items() if name.endswith(".macs"))
        unseen = batch_size * unit_cost(Unit("", *key)).macs - seen
        if unseen > 0:
            work["kernel.macs"] = float(unseen)
    if gpu is not None:
        _add_gpu_work(work, gpu, counter.operations, launches)
    return work


def _add_gpu_work(
    work: dict[str, float], gpu: GPU, operations: Sequence[_Operation], launches: Sequence[_Launch]
) -> None:
    def add(columns: Mapping[str, float]) -> None:
        for name, value in columns.items():
            work[name] = work.get(name, 0.0) + value

    def floor(macs: float, moved: float, element_bytes: int, busy: float) -> None:
        arithmetic, bandwidth = floors_ms(gpu, macs, moved, element_bytes, busy)
        add({"arithmetic_ms": arithmetic} if arithmetic > bandwidth else {"bandwidth_ms": bandwidth})

    moved = sum(launch.moved for launch in launches)
    macs, every = work.get("kernel.macs", 0.0), float(moved)
    multiplying = sum(launch.moved for launch in launches if not launch.kernel.startswith(_WITHOUT_MACS))
    for launch in launches:  # their multiply-accumulates are known together only; they are shared out by bytes
        own = 0.0 if launch.kernel.startswith(_WITHOUT_MACS) else macs * launch.moved / max(multiplying, 1)
        add(launch_work(launch.kernel, launch.spread, own, launch.moved))
        floor(own, launch.moved, launch.element_bytes, launch.spread.busy)
    for operation in operations:
        busy = matmul_busy(*operation.outputs, gpu.multiprocessors) if all(operation.outputs) else 1.0
        if all(operation.outputs):
            add({f"{operation.kind}.rounds.macs": operation.macs / busy})
        floor(operation.macs, operation.moved, operation.element_bytes, busy)
        macs, every = macs + operation.macs, every + operation.moved
    work["launches"] = float(len(launches) + len(operations))
    work[f"{ABOUT}intensity"] = macs / max(every, 1.0)
    for name in ("resident_warps", "registers", "shared_bytes"):
        work[f"{ABOUT}{name}"] = sum(getattr(each, name) * each.moved for each in launches) / max(moved, 1)
    work[f"{ABOUT}tail"] = sum(each.spread.tail * each.moved for each in launches) / max(moved, 1)
    work[f"{ABOUT}blocks_busy"] = sum(each.spread.busy * each.moved for each in launches) / max(moved, 1)
