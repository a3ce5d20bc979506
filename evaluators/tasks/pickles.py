"""Pickles of plain data and arrays of bytes, CIFAR's: nothing in them is run, and what they make is bounded."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixnas.search_space.errors import ConfigError, visible

_MOST_STEPS = 1_000_000  # CIFAR-100's training set has some 200,000
_MOST_IN_TUPLE, _DEEPEST, _MOST_TUPLES = 16, 3, 1000
_INTEGERS = ("INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2")
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
_TUPLES = ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")  # what they fill stays what it was
_STEPS = {
    *_INTEGERS, *_PUTS, *_GETS, *_TUPLES, *_FILLING,
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_LIST", "LIST", "EMPTY_DICT", "DICT",
    "GLOBAL", "STACK_GLOBAL", "REDUCE",
}  # fmt: skip
"""Steps of a pickle that plain data and arrays need."""


class _Dtype:
    """Stands for `numpy.dtype` in a pickle: its code and no more."""

    __slots__ = ("code",)

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = as_text(code)

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes do not have."""


class _Array:
    """Stands for an array: keeps what it is to hold."""

    __slots__ = ("dtype", "raw", "shape")

    def __init__(self, *_: Any) -> None:
        self.shape, self.dtype, self.raw = (), None, b""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, _, self.raw = state


class _Encode:
    """Stands for how newer versions write bytes: text that is turned back."""

    __slots__ = ()

    def __new__(cls, text: Any, *_: Any) -> Any:
        """The bytes."""
        return as_text(text).encode("latin-1")

    def __setstate__(self, state: Any) -> None:
        """So that there is one: else a pickle could set attributes of the class."""


# Classes without a place for attributes, so that a pickle can change nothing of them.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode,
}
"""What a pickle may name, and what stands there instead: nothing that it names is ever called."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`; only what `_ALLOWED` has."""
        if (module, name) not in _ALLOWED:
            raise ConfigError(f"it names {visible(module)}.{visible(name)}, which is not run")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """See `pickle.Unpickler`; there is none."""
        raise ConfigError("it names something outside of itself")


def unpickled(where: str, content: bytes) -> dict[str, Any]:
    """A pickle of a mapping of plain data and arrays of bytes; its keys as text. Nothing in it is run.

    Raises:
        ConfigError: It is damaged, names anything but arrays, or makes more of itself than CIFAR's do.
    """
    try:
        _check(content)
        plain = _Reader(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(plain, dict):
            raise ConfigError(f"it holds {type(plain).__name__}, no mapping")
        return {as_text(key): _array(value) if isinstance(value, _Array) else value for key, value in plain.items()}
    except Exception as error:  # a pickle goes wrong in any way
        reason = re.sub(r"\s+", " ", visible(str(error)))[:150] or type(error).__name__
        raise ConfigError(f"{where}: is no pickle of CIFAR's ({reason}). Download it again.") from error


def _check(content: bytes) -> None:
    """Look at a pickle's steps before any is done: each is known and bounded, and tuples, which as keys are walked
    through at every level, are few, short and flat.

    Raises:
        ConfigError: One is not.
    """
    stack: list[int | None] = []  # of each object how deep tuples lie in it, None for a mark
    kept: dict[int, int | None] = {}
    tuples = 0
    for number, (step, given, _) in enumerate(pickletools.genops(content)):
        name = step.name
        if number >= _MOST_STEPS:
            raise ConfigError(f"it has more than {_MOST_STEPS:,} steps")
        if name not in _STEPS:
            raise ConfigError(f"it has a step {name}, which neither plain data nor arrays need")
        if name in _INTEGERS and not -(1 << 63) <= int(given or 0) < 1 << 63:
            raise ConfigError("it has a whole number of more than 64 bits")
        if name in _PUTS:
            at = len(kept) if given is None else int(given)
            if not 0 <= at <= number:
                raise ConfigError(f"it keeps an object as number {at:,} after {number:,} steps")
            kept[at] = stack[-1]
            continue
        if name in _GETS:
            stack.append(kept[int(given or 0)])
            continue
        parts: list[int] = []
        before = step.stack_before
        if pickletools.markobject in before:
            while (part := stack.pop()) is not None:
                parts.append(part)
            before = before[: before.index(pickletools.markobject)]
        parts.extend(stack.pop() or 0 for _ in before)
        made = 0
        if name in _TUPLES:
            tuples, made = tuples + 1, 1 + max(parts, default=0)
            if len(parts) > _MOST_IN_TUPLE or made > _DEEPEST or tuples > _MOST_TUPLES:
                raise ConfigError(
                    f"it has more than {_MOST_TUPLES:,} tuples, one of more than {_MOST_IN_TUPLE}, or one that nests "
                    f"more than {_DEEPEST} deep"
                )
        elif name in _FILLING:
            made = parts[-1]
        stack += [None if kind is pickletools.markobject else made for kind in step.stack_after]


def as_text(key: Any) -> str:
    """Text of a pickle, that may be bytes.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(key, str | bytes):
        raise ConfigError(f"a key or a name is of type {type(key).__name__}, and must be text")
    return key.decode("latin-1") if isinstance(key, bytes) else key


def _array(found: _Array) -> NDArray[np.uint8]:
    code = getattr(found.dtype, "code", None)
    if code not in ("u1", "|u1") or not isinstance(found.raw, bytes):
        raise ConfigError(f"an array is of {code!r}, not of bytes")
    return np.frombuffer(found.raw, np.uint8).reshape(found.shape)
