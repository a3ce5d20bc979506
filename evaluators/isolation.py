"""What a task or an operator changes for the whole process is put back: after each trial, a super-network's training,
a profile, the finishing of a candidate, and wherever else a stranger's code is called."""

from __future__ import annotations

import contextlib
import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

_Part = tuple[Callable[[], Any], Callable[[Any], object]]
"""What reads a part of the state, and what sets it."""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put back what the body changed of the process: one trial must not decide how later ones go. Also a decorator.

    Gradients, autocast, threads, default type and device, determinism, precision, denormals, random numbers (of Python,
    NumPy and torch), warnings, NumPy's treatment of errors, logging, the standard streams, signals and timers, garbage
    collection, the recursion limit, the locale, the environment's variables, the file mask and the working folder.
    Torch only where it is imported already. A process that the body forked never comes out of it.
    """
    process, parts = os.getpid(), [*_of_python(), *_of_torch()]
    before = [read() for read, _ in parts]
    random_numbers = [(put, read()) for read, put in _random()]
    try:
        yield
    finally:
        if os.getpid() != process:  # a child that the body forked and that came back: there is one search, not two
            os._exit(1)
        for (read, put), value in zip(parts, before, strict=True):
            with contextlib.suppress(OSError, ValueError, TypeError, locale.Error):  # as of a folder that was removed
                if read() != value:
                    put(value)
        for put, state in random_numbers:
            put(state)


def _of_python() -> Iterator[_Part]:
    yield _folder, os.chdir
    yield lambda: dict(os.environ), _set_environment
    yield lambda: list(warnings.filters), _set_filters
    yield lambda: warnings.showwarning, lambda show: setattr(warnings, "showwarning", show)
    yield np.geterr, lambda errors: np.seterr(**errors)
    yield lambda: logging.root.manager.disable, logging.disable
    yield sys.getrecursionlimit, sys.setrecursionlimit
    yield gc.isenabled, lambda on: gc.enable() if on else gc.disable()
    yield lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)
    yield _mask, os.umask
    for name in ("stdin", "stdout", "stderr"):
        yield partial(getattr, sys, name), partial(setattr, sys, name)
    if threading.current_thread() is threading.main_thread():  # nowhere else may they be set
        yield _running_timers, _stop_timers  # before the handlers: what nobody hears any more would end the process
        yield _handlers, _set_handlers


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed meanwhile: whoever needs it says so
        return ""


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _set_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _mask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


def _running_timers() -> list[bool]:
    return [signal.getitimer(timer)[0] > 0 for timer in _TIMERS]


def _stop_timers(running: list[bool]) -> None:
    for timer, ran in zip(_TIMERS, running, strict=True):
        if not ran:
            signal.setitimer(timer, 0)


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in _SIGNALS}


def _set_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:  # None was not set from Python
            signal.signal(number, handler)


def _random() -> Iterator[_Part]:
    yield random.getstate, random.setstate
    yield np.random.get_state, np.random.set_state
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        yield torch.get_rng_state, lambda state: torch.set_rng_state(state.cpu())
        if torch.cuda.is_initialized():
            yield torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all


def _of_torch() -> Iterator[_Part]:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    cudnn, autograd = torch.backends.cudnn, torch.autograd
    yield torch.is_grad_enabled, torch.set_grad_enabled
    yield torch.get_num_threads, torch.set_num_threads
    yield torch.get_default_dtype, torch.set_default_dtype
    yield torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)
    yield (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda mode: torch.use_deterministic_algorithms(mode[0], warn_only=mode[1]),
    )
    yield torch.is_anomaly_enabled, autograd.set_detect_anomaly
    yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield partial(torch.is_autocast_enabled, "cpu"), partial(torch.set_autocast_enabled, "cpu")
    yield partial(torch.is_autocast_enabled, "cuda"), partial(torch.set_autocast_enabled, "cuda")
    for name in ("enabled", "benchmark", "deterministic"):
        yield partial(getattr, cudnn, name), partial(setattr, cudnn, name)
    yield _flushes_denormals, torch.set_flush_denormal


def _flushes_denormals() -> bool:
    smallest = sys.float_info.min * sys.float_info.epsilon  # a denormal, or nothing
    return smallest == 0.0
