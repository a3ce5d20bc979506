"""What a unit does, counted: operations, multiply-accumulates and bytes by kind, from one real forward.

A unit is run once under a dispatch mode that sees every operation, so that a new operator needs nothing here. The
counts are the physics of the latency predictor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


class _Counter(TorchDispatchMode):
    """Counts what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, float] = {}

    def _add(self, name: str, amount: float) -> None:
        if amount:
            self.work[name] = self.work.get(name, 0.0) + amount

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = (*args, *(kwargs or {}).values())
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        kind = _KIND_OF.get(name, "pointwise") if namespace == "aten" else f"{namespace}.{name}"
        if kind == "conv":
            weight = next(t for t in [a for a in args if isinstance(a, Tensor)][1:])
            kind = "depthwise" if weight.shape[1] == 1 else "conv"
        if name == "to" and isinstance(output, Tensor):
            unchanged = isinstance(args[0], Tensor) and output.data_ptr() == args[0].data_ptr()
            kind = "view" if unchanged else "copy"
        self._add(f"{kind}.calls", 1)
        if kind != "view":
            tensors = [item for item in inputs if isinstance(item, Tensor)]
            dtype = {4: "", 2: ".16", 1: ".8"}.get(min((t.element_size() for t in tensors), default=4), "")
            self._add(f"{kind}{dtype}.macs", _macs(kind, args, output))
            self._add(f"{kind}.bytes", _bytes(inputs) + _bytes(output))
        return output


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
    counter = _Counter()
    with torch.inference_mode(), counter:
        module(inputs)
    recursion = getattr(module, "recursion", 1)
    counter.work["modules"] = float(sum(1 for _ in module.modules()) * recursion)
    return counter.work


def work_of(key: Key, batch_size: int, device: str = "cpu") -> dict[str, float]:
    """`count_work` of a unit that is built for it, with random weights and inputs.

    What an operator of our own multiplies cannot be seen from outside; it is the unit's exact count less what was seen.
    """
    generator = torch.Generator().manual_seed(0)
    with seeded(generator):
        module = deployed_unit(key, device)
    work = count_work(module, example_input(key, batch_size, generator, device))
    if any(name.startswith("mixnas.") for name in work):
        seen = sum(value for name, value in work.items() if name.endswith(".macs"))
        unseen = batch_size * unit_cost(Unit("", *key)).macs - seen
        if unseen > 0:
            work["kernel.macs"] = float(unseen)
    return work
