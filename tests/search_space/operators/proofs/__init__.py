"""What proves that an operator is the real one: numbers of an oracle after copying weights, and counts of published
models rebuilt from it.

A proof is a function that is registered here. `test_proofs.py` runs them all, and `benchmarks/operators.py` writes what
they find into `docs/operators.md`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixnas.search_space import registry
from mixnas.search_space.registry import Context

Answers = Callable[[torch.dtype], tuple[Tensor, Tensor]]

SINGLE, DOUBLE = 1e-5, 1e-7
"""Largest difference from an oracle, relative to its largest number, in float32 and in float64."""


@dataclass(frozen=True)
class Proof:
    """Numbers of an oracle.

    Attributes:
        axis, name: The operator's.
        oracle: Where the numbers come from.
        answers: `answers(dtype)` gives the operator's numbers and the oracle's, with the same weights.
        single: Largest difference in float32 where the oracle's own is computed in it.
        double: Largest difference in float64.
    """

    axis: str
    name: str
    oracle: str
    answers: Answers
    single: float = SINGLE
    double: float = DOUBLE

    def __str__(self) -> str:
        return f"{self.axis} {self.name}: {self.oracle}"

    def difference(self, dtype: torch.dtype) -> float:
        """The largest, over the oracle's largest number."""
        with torch.no_grad():
            found, expected = (tensor.detach().double() for tensor in self.answers(dtype))
        assert found.shape == expected.shape
        return float((found - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Count:
    """A published number of parameters, and the same number of what is rebuilt from the operator."""

    axis: str
    name: str
    model: str
    published: int
    rebuilt: Callable[[], int]

    def __str__(self) -> str:
        return f"{self.axis} {self.name}: {self.model}"


PROOFS: list[Proof] = []
COUNTS: list[Count] = []


def proof(axis: str, name: str, oracle: str, **limits: float) -> Callable[[Answers], Answers]:
    """Register a proof; see `Proof`."""

    def decorate(answers: Answers) -> Answers:
        PROOFS.append(Proof(axis, name, oracle, answers, **limits))
        return answers

    return decorate


def count(
    axis: str, name: str, model: str, published: int
) -> Callable[[Callable[[], int]], Callable[[], int]]:  # fmt: skip
    """Register a count; see `Count`. One function may be registered for several operators."""

    def decorate(rebuilt: Callable[[], int]) -> Callable[[], int]:
        COUNTS.append(Count(axis, name, model, published, rebuilt))
        return rebuilt

    return decorate


def register_all() -> None:
    """Import every module of this package: they register their proofs."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)


def make(axis: str, name: str, width: int, size: tuple[int, ...], kind: str = "", **knobs: Any) -> nn.Module:
    """An operator in evaluation mode, knobs at their defaults but for those given."""
    operator = registry.get(axis, name)
    context = Context(width, size, kind or ("image" if len(size) == 2 else "sequence"))
    values = {knob: found.default for knob, found in operator.knobs.items()} | knobs
    assert operator.check is None or operator.check(context, values) is None
    module: nn.Module = operator.build(context, **values)
    return module.eval()


def params(axis: str, name: str, width: int, size: tuple[int, ...] = (56, 56), kind: str = "", **knobs: Any) -> int:
    """Parameters of an operator."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make(axis, name, width, size, kind, **knobs).parameters())


def loaded(module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The module with these weights in this type; running statistics that are not given stay at 0 and 1."""
    missing, unexpected = module.to(dtype).load_state_dict(state, strict=False)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert not unexpected and all(name.endswith(statistics) for name in missing), (missing, unexpected)
    return module


def channels_last(x: Tensor) -> Tensor:
    """(B, C, ...) to (B, ..., C)."""
    return x.movedim(1, -1)


def channels_first(x: Tensor) -> Tensor:
    """(B, ..., C) to (B, C, ...)."""
    return x.movedim(-1, 1)
