"""How much memory an inference takes at its peak: the weights as deployed, and the tensors that live together.

Exact for eager PyTorch on a CPU and one example: what lives is known by letting a unit make its tensors in their order
and drop them as Python does. Small units do so for real, large ones of float32 on shapes alone (`FakeTensorMode`),
which makes the same tensors. What ATen's own kernels need as scratch while they run is not part of it, nor what PyTorch
itself takes.

A network runs its units one after the other, and keeps its input and that of the unit that runs. The peak of a network
is therefore the largest of its units', beside the input: whoever asks about a space asks about its units.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixnas.kernels.dispatch import eager_alone
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost, unit_cost
from mixnas.search_space.network import build_unit, deploy_unit, seeded
from mixnas.search_space.registry import Context
from mixnas.search_space.units import IOSpec, Unit, plan

PEAK_MEMORY = "peak_memory_bytes"
"""What the metric is called."""

_IN_THE_INPUTS_PLACE = {torch.ops.aten.col2im.default, torch.ops.aten.im2col.default}
"""Their kernels on a CPU ask for as much as their input has, and then for what their output needs, if that is more.
Shapes alone do not show it: `fold`'s output is smaller than what it stands in."""

_BY_SHAPES_MACS = 20_000_000  # from so many on shapes alone are quicker, which take some 10 ms whatever the size


class LiveTensors(TorchDispatchMode):
    """Within it, the bytes of all that operations make are counted for as long as it lives.

    Views count as what they are views of, once. What was there before counts where it is told of (`hold`).

    Attributes:
        peak: The most bytes that lived together.
    """

    observes = True  # what runs is eager mode's (`dispatch.tracing`)

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def hold(self, tensor: Tensor) -> None:
        """Count what was there before."""
        self._add([tensor])

    @property
    def live(self) -> int:
        """Bytes that live now."""
        self._sweep()
        return sum(size for _, size in self._live.values())

    def _sweep(self) -> None:
        for key in [key for key, (storage, _) in self._live.items() if storage.expired()]:
            del self._live[key]

    def _add(self, tensors: Iterable[Tensor], least: int = 0) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live:
                self._live[storage._cdata] = StorageWeakRef(storage), max(storage.nbytes(), least)
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # A view of what was there before (a weight) is nothing new.
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_group_norm.default and isinstance(output[0], FakeTensor):
            # On shapes alone its answer is contiguous; torch's own lies as its input does.
            output = (torch.empty_like(args[0], memory_format=torch.preserve_format), *output[1:])
        self._sweep()
        least = args[0].nbytes if func in _IN_THE_INPUTS_PLACE else 0
        self._add((t for t in _tensors(output) if t.untyped_storage()._cdata not in given), least)
        return output


def _tensors(nested: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(nested):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf


@lru_cache(maxsize=1 << 16)
def unit_peak(unit: Unit) -> int:
    """Bytes that live together at most while a unit works on one example: its input, and all that it makes of it."""
    plain = unit.quant is None or unit.quant.name == "fp32"  # what is stored otherwise depends on the values
    if plain and unit_cost(unit).macs >= _BY_SHAPES_MACS:
        with contextlib.suppress(Exception):  # of an operator that looks at values, or runs otherwise in a trace, too
            return _peak(unit, shapes=True)
    return _peak(unit, shapes=False)


@torch.no_grad()
def _peak(unit: Unit, *, shapes: bool) -> int:
    with seeded(torch.Generator().manual_seed(0)), contextlib.ExitStack() as stack:
        if shapes:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(eager_alone())
        module = deploy_unit(build_unit(unit).eval())
        example = torch.zeros(1, *unit.before.size, dtype=torch.long) if unit.tokens else _features(unit.before)
        module(example)  # what a layer makes once and keeps is there from now on
        with LiveTensors() as live:
            live.hold(example)
            module(example)
    return live.peak


def _features(context: Context) -> Tensor:
    return torch.zeros(1, *context.size, context.width)


def input_bytes(io: IOSpec) -> int:
    """Of one example: integers have eight bytes, features four."""
    return math.prod(io.size) * (8 if io.tokens else 4 * io.in_features)


def placed_peak(unit: Unit, io: IOSpec) -> int:
    """Bytes of tensors that live together at most while a unit of a network runs: `unit_peak`, beside the input.

    A stem that first standardises what it reads holds its input three times at once, and then its result.
    """
    own, read = unit_peak(unit), input_bytes(io)
    if unit.role != "stem":
        return read + own
    return own if io.mean is None else read + max(2 * read, own)


def peak_memory_bytes(architecture: Architecture, io: IOSpec) -> int:
    """Peak memory of one inference: `Cost.weight_bytes`, and the most that its units need at once."""
    units = {unit for _, unit in plan(architecture, io)}
    return cost(architecture, io).weight_bytes + max(placed_peak(unit, io) for unit in units)
