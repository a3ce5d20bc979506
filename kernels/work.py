"""What kernels multiply. Each public function that multiplies says so beside its fake implementation.

Nobody outside can see what runs inside a kernel, and the same function runs in other forms on other devices. So the
count belongs to the function: `@counted(macs)` names a function of the same arguments that returns the
multiply-accumulates, whatever path the call then takes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Work:
    """What one call multiplies.

    Attributes:
        kernel: Name of the function.
        macs: Multiply-accumulates.
        bits: Of the narrowest operand.
    """

    kernel: str
    macs: int
    bits: int


_told: Callable[[Work], None] | None = None
_inside = False


def counted(macs: Callable[..., int], bits: int | None = None) -> Callable[[_Function], _Function]:
    """Decorate a public kernel function: `macs(*args, **kwargs)` counts what a call with these arguments multiplies.

    Outside `watching` a call costs one comparison more.

    Args:
        macs: See above.
        bits: Of the narrowest operand, where the tensors' types do not tell: 4 of packed weights.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _told is None or _inside:
                return function(*args, **kwargs)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            narrowest = bits if bits is not None else 8 * min(t.element_size() for t in tensors)
            _told(Work(function.__name__, macs(*args, **kwargs), narrowest))
            with _within():
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


@contextlib.contextmanager
def _within() -> Iterator[None]:
    global _inside
    _inside = True
    try:
        yield
    finally:
        _inside = False


def inside() -> bool:
    """Whether a counted call is running: what it runs in turn is part of its count."""
    return _inside


@contextlib.contextmanager
def watching(told: Callable[[Work], None]) -> Iterator[None]:
    """Within it, `told` hears of every counted call that is not part of another."""
    global _told
    before, _told = _told, told
    try:
        yield
    finally:
        _told = before
