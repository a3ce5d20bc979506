"""Which errors are the machine's fault, and how values are shown."""

from __future__ import annotations

import errno
import os

import pytest

from mixnas.search_space.errors import ConfigError, MachineError, machine_fault, nearest, shown, visible


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/cache")


def raised_from(cause: BaseException, error: BaseException) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (os_error(errno.ENOSPC), "/data/cache: No space left on device. Make room"),
        (os_error(errno.EDQUOT), "/data/cache: Disk quota exceeded. Make room"),
        (os_error(errno.EROFS), "/data/cache: Read-only file system. Make it writable"),
        (os_error(errno.EMFILE), "/data/cache: Too many open files. End other programs"),
        (MemoryError(), "this machine's memory is used up"),
        (RuntimeError("std::bad_alloc"), "this machine's memory is used up"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "this machine's memory is used up"),
        (RuntimeError("DataLoader worker is killed: insufficient shared memory (shm)"), "this machine's memory"),
        (RuntimeError("PytorchStreamWriter failed: No space left on device"), "No space left on device. Make room"),
        (RuntimeError("unable to open shared memory: Too many open files (24)"), "Too many open files. End other"),
        (raised_from(os_error(errno.ENOSPC), ValueError("cannot cache")), "/data/cache: No space left on device"),
        (raised_from(raised_from(MemoryError(), KeyError(1)), ValueError()), "this machine's memory is used up"),
        (ExceptionGroup("two", [ValueError(), os_error(errno.ENOSPC)]), "/data/cache: No space left on device"),
        (raised_from(os_error(errno.ENOSPC), ConfigError("table: cannot be read")), "/data/cache: No space left"),
    ],
)
def test_faults_of_the_machine(error, says):
    assert machine_fault(error).startswith(says)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("No space left on device"),  # a task's own words
        RuntimeError("CUDA out of memory"),  # of a GPU: of the architecture
        os_error(errno.ENOENT),
        ConfigError("No space left on device"),
        MachineError("Too many open files"),
        raised_from(ValueError(), KeyError()),
    ],
)
def test_what_is_no_fault_of_the_machine(error):
    assert machine_fault(error) == ""


def test_a_chain_that_goes_round_ends():
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first
    assert machine_fault(first) == ""


def test_what_is_shown_is_short_and_printable():
    assert shown("x" * 500) == f"'{'x' * 59}... (502 characters)"
    assert visible("a\x1b[31m\u202e") == "a\\x1b[31m\\u202e"
    assert len(nearest("x" * 500, ["x" * 600])) < 120
