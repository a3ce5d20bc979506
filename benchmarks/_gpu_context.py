"""What a step of `gpu.py` is given, and how it finds its device."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _gpu_results import DRY_DEVICE, Results, read_json


@dataclass(frozen=True, kw_only=True)
class Context:
    """A step's surroundings.

    Attributes:
        out: Where its file goes.
        work: Files that do not come back; lasts for one call.
        deadline: When it should have ended, on the clock of `time.monotonic`.
        dry: On a CPU, in small; no device's.
    """

    out: Path
    work: Path
    deadline: float
    dry: bool

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def torch_device(self) -> str:
        """torch's name of where things run."""
        return "cpu" if self.dry else "cuda"

    @property
    def device(self) -> str:
        """The device's standard name."""
        if self.dry:
            return DRY_DEVICE
        from mixnas.predictors.measuring.device import device_name

        return device_name("cuda")

    @property
    def machine(self) -> dict[str, Any]:
        """What the step "machine" found."""
        found: dict[str, Any] = read_json(self.out / "gpu.json").get("machine", {})
        return found

    @property
    def workers(self) -> int:
        """Processes that may work beside this one."""
        return 2 if self.dry else max(1, min(14, (os.cpu_count() or 2) - 2))

    def results(self, step: str, **about: Any) -> Results:
        """The step's file."""
        from mixnas.predictors.measuring.device import provenance

        record = provenance("cpu" if self.dry else "cuda") | {"checkout_commit": os.environ.get("MIXNAS_COMMIT", "")}
        if self.dry:
            record["device"] = DRY_DEVICE
        return Results(self.out / f"{step}.json", step, self.device, self.dry, {"provenance": record, **about})


EXIT_LOST = 3  # of a step whose GPU answers it no more: it goes on in a new process


def require_answers(context: Context) -> None:
    """End this process where the GPU answers it no more: whatever it would still try would fail."""
    if context.dry:
        return
    import torch

    try:
        torch.ones(1, device="cuda").item()
    except RuntimeError as error:
        print(f"the GPU answers this process no more: {first_line(error)}")
        raise SystemExit(EXIT_LOST) from error


def root() -> Path:
    """The checkout that is running: the package `mixnas`."""
    import mixnas

    return Path(mixnas.__path__[0])


def digest(paths: Iterable[Path]) -> str:
    """12 hexadecimal digits of some files."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]


def kernel_sources() -> str:
    """Digest of the kernels and their tables: what a check or a time of them depends on."""
    kernels = root() / "kernels"
    return digest([*kernels.glob("*.py"), *kernels.glob("*.json")])


def first_line(error: BaseException) -> str:
    """An error in short."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:240]
