"""What a task or an operator changes for the whole process is put back after each trial."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put back what the body changed of the process: one trial must not decide how later ones go.

    Gradients, threads, default type and device, determinism, random numbers (of Python, NumPy and torch), warnings, the
    environment's variables and the working folder. Torch only where it is imported already.
    """
    folder = os.getcwd()
    environment = dict(os.environ)
    python, numpy = random.getstate(), np.random.get_state()
    filters, show = list(warnings.filters), warnings.showwarning
    torch = _torch_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if list(warnings.filters) != filters:
            warnings.filters[:] = filters  # type: ignore[index]
            warnings._filters_mutated()  # type: ignore[attr-defined]
        warnings.showwarning = show
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        if torch is not None:
            _restore_torch(torch)
        with contextlib.suppress(OSError):  # removed meanwhile: whoever needs it says so
            if _cwd() != folder:
                os.chdir(folder)


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""


def _torch_state() -> dict[str, Any] | None:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    return {
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state(),
    }


def _restore_torch(before: dict[str, Any]) -> None:
    import torch

    now: Any = _torch_state()
    if now["gradients"] != before["gradients"]:
        torch.set_grad_enabled(before["gradients"])
    if now["threads"] != before["threads"]:
        torch.set_num_threads(before["threads"])
    if now["dtype"] != before["dtype"]:
        torch.set_default_dtype(before["dtype"])
    if now["device"] != before["device"]:
        torch.set_default_device(before["device"])
    if (now["deterministic"], now["warn_only"]) != (before["deterministic"], before["warn_only"]):
        torch.use_deterministic_algorithms(before["deterministic"], warn_only=before["warn_only"])
    if now["anomaly"] != before["anomaly"]:
        torch.autograd.set_detect_anomaly(before["anomaly"])
    if now["precision"] != before["precision"]:
        torch.set_float32_matmul_precision(before["precision"])
    torch.set_rng_state(before["random"].cpu())
