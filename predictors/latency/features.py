"""What a unit does, counted: the work of its operators, added up.

Each operator is counted once, by itself, for each context and policy that it stands under (`counting`), and what a unit
adds to its operators (the residual, the modules that hold them) once for each role and context. So a space of a hundred
operators and nine policies needs some thousand counts, whatever its number of units. The sum is what a forward of the
whole unit counts, as far as operators do not look at what stands beside them: a gate is counted round a mixer that
returns at once, on the floating-point type that the unit's mixer answers in, laid out contiguously. Where the mixer
answers in another layout a gate may do a copy more or less than is counted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixnas.predictors.latency.counting import count, finished
from mixnas.predictors.latency.gpus import GPU
from mixnas.predictors.latency.model import Columns
from mixnas.predictors.latency.unit_rows import POLICY, Filling, UnitRows, distinct
from mixnas.predictors.measuring.measure import fixed_threads
from mixnas.predictors.measuring.runtimes import built_on
from mixnas.search_space.architecture import Op
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import build_op, build_unit, check_op, deploy_unit, seeded
from mixnas.search_space.operators.folding import fold
from mixnas.search_space.operators.quantization.policy import policy_of
from mixnas.search_space.registry import BETWEEN, Context
from mixnas.search_space.units import Unit

log = logging.getLogger(__name__)


def example_input(unit: Unit, batch_size: int, generator: torch.Generator, device: str = "cpu") -> Tensor:
    """Random input of a unit: normal (batch, *size, channels), or tokens (batch, length) where it reads tokens."""
    shape = (batch_size, *unit.before.size)
    if unit.tokens:
        return torch.randint(unit.before.width, shape, generator=generator).to(device)
    return torch.randn((*shape, unit.before.width), generator=generator).to(device)


def _blank_input(unit: Unit, batch_size: int, device: str) -> Tensor:
    """An input of the shape and type of `example_input`, all zeros: no count depends on values."""
    shape = (batch_size, *unit.before.size)
    if unit.tokens:
        return torch.zeros(shape, dtype=torch.int64, device=device)
    return torch.zeros((*shape, unit.before.width), device=device)


def deployed_unit(unit: Unit, device: str = "cpu") -> nn.Module:
    """A unit as it would be deployed: in evaluation mode, its weights stored as its quantization policy stores them."""
    return built_on(device, lambda: deploy_unit(build_unit(unit).eval().requires_grad_(False)))


@dataclass(frozen=True)
class _Counted:
    """An operator's sums, the floating-point type it answers in, and why it cannot be built ("" where it can)."""

    sums: dict[str, float]
    answers_in: torch.dtype
    problem: str = ""


class _Stand(nn.Module):
    """Stands in an operator's place and does nothing: returns its input, the mixer's answer, or what it was given."""

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, mixer: Any = None) -> Tensor:
        """See the class."""
        if mixer is not None:
            return mixer(x)  # type: ignore[no-any-return]
        return x if self.answer is None else self.answer


class Works:
    """Counts of units; what was counted is kept.

    Args:
        batch_size: Inputs per forward.
        device: torch's, to run the forwards on.
        gpu: Count as for this GPU, whatever `device` is.
    """

    def __init__(self, batch_size: int = 1, device: str = "cpu", gpu: GPU | None = None) -> None:
        self._batch_size, self._device, self._gpu = batch_size, device, gpu
        self._counted: dict[Any, _Counted] = {}
        self._types: dict[torch.dtype, int] = {torch.float32: 0}

    def of(self, unit: Unit) -> dict[str, float]:
        """Counts of one unit by name; see `counting.count` and `counting.finished`.

        Raises:
            ConfigError: It cannot be built.
        """
        units = UnitRows.of([unit])
        columns, buildable = self.of_all(units)
        if not buildable[0]:
            problems = [counted.problem for counted in self._counted.values() if counted.problem]
            raise ConfigError(f"a {unit.role} unit cannot be built: {problems[-1]}")
        return {name: float(v) for name, v in zip(columns.names, columns.values[0], strict=True) if v}

    @fixed_threads(1)  # no count depends on them, and where others work too several wait for each other at every step
    def of_all(self, units: UnitRows) -> tuple[Columns, np.ndarray]:
        """Counts of many units, and (units,) which of them can be built."""
        parts: list[list[dict[str, float]]] = []
        rows: list[np.ndarray] = []
        buildable = np.ones(len(units), dtype=bool)
        carried = np.zeros(len(units), dtype=np.int64)  # the type in which the operator before answered
        frame, *filled = units.rows.T
        for slot in range(POLICY + 1):
            last = slot == POLICY  # all operators are counted: the frame itself
            keys = np.stack([frame, carried] if last else [frame, carried, filled[slot], filled[POLICY]], axis=1)
            sizes = [len(units.frames), len(self._types), len(units.slots[slot]), len(units.slots[POLICY])]
            found, which = distinct(keys, sizes[: keys.shape[1]])
            types = list(self._types)
            if last:
                counted = [self._frame(units.frames[f], types[c]) for f, c in found]
            else:
                counted = [
                    self._operator(units.frames[f], units.slots[slot][i], units.slots[POLICY][q], types[c])
                    for f, c, i, q in found
                ]
            parts.append([each.sums for each in counted])
            rows.append(which)
            buildable &= np.array([not each.problem for each in counted], dtype=bool)[which]
            carried = np.array([self._type(each.answers_in) for each in counted], dtype=np.int64)[which]
        return finished(Columns.summed(parts, np.stack(rows, axis=1))), buildable

    def _type(self, dtype: torch.dtype) -> int:
        return self._types.setdefault(dtype, len(self._types))

    def _operator(self, frame: Unit, filling: Filling, policy: Filling, carried: torch.dtype) -> _Counted:
        """An operator in a frame, behind one that answers in the type `carried`."""
        if filling is None:
            return _Counted({}, carried)
        axis, op = filling
        quant = None if policy is None or axis == "norm" else policy[1]
        after = frame.after if axis in BETWEEN else frame.before
        key = (axis, op, quant, frame.before, after, frame.tokens, carried)
        if key not in self._counted:
            try:
                self._counted[key] = self._count(axis, op, quant, frame, carried)
            except ConfigError as error:
                self._counted[key] = _Counted({}, carried, str(error))
            except torch.cuda.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                self._counted[key] = _Counted({}, carried, f"{axis} {op}: {error}")
            if self._counted[key].problem:
                log.info("cannot be built: %s", self._counted[key].problem)
        return self._counted[key]

    def _count(self, axis: str, op: Op, quant: Op | None, frame: Unit, carried: torch.dtype) -> _Counted:
        before = frame.before
        where = f"{before.width} channels on {'x'.join(map(str, before.size))}"
        check_op(axis, op, before, where)
        if quant is not None:
            check_op("quant", quant, before, where)
        generator = torch.Generator().manual_seed(0)
        with seeded(generator):
            module = build_op(axis, op, before, frame.after if axis in BETWEEN else before, quant)
        module = fold(module.eval().requires_grad_(False)).to(self._device)
        if quant is not None:
            module = policy_of(quant).deploy(module)
        x = _blank_input(frame, self._batch_size, self._device)
        inputs: tuple[Any, ...] = (x if frame.tokens or axis == "gate" else x.to(carried),)
        if axis == "gate":
            inputs = (x, _Stand(x.to(carried)))
        sums, result = count(module, inputs, self._gpu, self._device == "cuda")
        return _Counted(sums, result.dtype)

    def _frame(self, frame: Unit, carried: torch.dtype) -> _Counted:
        """What a unit adds to its operators, which answer in the type `carried`."""
        key = (frame, carried)
        if key not in self._counted:
            x = _blank_input(frame, self._batch_size, self._device)
            stands: list[_Stand] = []

            def make(place: str, axis: str, op: Op, before: Context, after: Context, quant: Op | None) -> nn.Module:
                stands.append(_Stand(x.to(carried) if axis in ("mixer", "channel_mixer") else None))
                return stands[-1]

            axes = _AXES[frame.role]
            unit = Unit(frame.role, tuple((axis, Op("nothing")) for axis in axes), frame.before, frame.after)
            sums, _ = count(build_unit(unit, make), (x,), self._gpu, self._device == "cuda")
            self._counted[key] = _Counted(sums | {"modules": sums["modules"] - len(stands)}, carried)
        return self._counted[key]


_AXES = {
    "stem": ("stem",),
    "downsample": ("downsample",),
    "token": ("norm", "mixer", "gate"),
    "channel": ("norm", "channel_mixer"),
    "head": ("norm", "head"),
}
"""Of what a unit of each role consists, as in `Unit.ops`."""
