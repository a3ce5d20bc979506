"""Energy that a device takes for a forward, from the counters that it carries.

A GPU counts the millijoules that it has taken since its driver was loaded (NVML, "Device Queries":
`nvmlDeviceGetTotalEnergyConsumption`, Volta and later); a CPU those of each package, with its memory where that has a
counter (Linux "Power Capping Framework", `intel-rapl`; AMD's appear under the same name). Counters move in steps, some
every millisecond, some every hundred: a window begins and ends at a step, and lasts half a second at least.

It is all that the device takes meanwhile, what it would take at rest and what others do on it included.
"""

from __future__ import annotations

import ctypes
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixnas.predictors.measuring.measure import Call, measuring
from mixnas.search_space.errors import ConfigError, NasError

ENERGY = "energy_mj"
"""The metric: millijoules of one forward."""

Counter = Callable[[], float]
"""Millijoules since some beginning. Only differences count, of readings that lie no more than a minute apart."""

WINDOW_S = 0.5
"""A window lasts so long, at least: hundreds of steps of a counter that moves every millisecond."""

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")
_STILL_S = 5.0  # no counter that works stands still for so long
_WARMUP = 2


@dataclass(frozen=True, slots=True)
class Energy:
    """Of one forward.

    Attributes:
        mj: Mean over the passes, millijoules.
        se: Its standard error; nan of a single pass.
    """

    mj: float
    se: float


class Powercap:
    """The packages of this machine's CPU, and their memory; a `Counter`.

    Args:
        folder: Where Linux shows them.

    Raises:
        ConfigError: There are none, or they may not be read.
    """

    def __init__(self, folder: Path) -> None:
        packages = [p for p in _folders(folder) if _PACKAGE.fullmatch(p.name) and _name(p).startswith("package")]
        memories = [zone for p in packages for zone in _folders(p) if _name(zone) == "dram"]
        if not packages:
            raise ConfigError(
                f"{ENERGY}: this machine shows no energy counters of its CPU ({folder}/intel-rapl:0). Linux on an "
                "Intel or AMD processor has them (modprobe intel_rapl_msr), virtual machines and containers mostly do "
                "not. Leave the metric out, or search on a machine that has them."
            )
        self._folder = folder
        self._zones = [zone / "energy_uj" for zone in (*packages, *memories)]
        self._last = [self._read(zone) for zone in self._zones]
        self._ranges = [self._read(zone.parent / "max_energy_range_uj") for zone in self._zones]
        self._uj = 0

    def __call__(self) -> float:
        """See `Counter`: each zone begins at 0 again after its range, some minutes at full load."""
        for i, zone in enumerate(self._zones):
            now = self._read(zone)
            step = now - self._last[i]
            self._uj += step if step >= 0 else step + self._ranges[i]
            self._last[i] = now
        return self._uj * 1e-3

    def _read(self, path: Path) -> int:
        try:
            return int(path.read_text())
        except PermissionError:
            raise ConfigError(
                f"{ENERGY}: {path} may not be read: since 2020 Linux shows it to root alone. As root, until the next "
                f"start: chmod a+r {self._folder}/intel-rapl:*/energy_uj; or leave the metric out."
            ) from None
        except (OSError, ValueError) as error:  # the driver's module was taken away, or a processor was switched off
            raise ConfigError(
                f"{ENERGY}: {path} cannot be read ({error}). Look whether the counters are there (cat {path}; modprobe "
                "intel_rapl_msr), or leave the metric out."
            ) from None


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if (path / "energy_uj").exists())
    except OSError:
        return []


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


class Nvml:
    """An NVIDIA GPU; a `Counter`.

    Args:
        uuid: Which, as the driver names it: "GPU-...".
        library: NVML; the driver's if not given.

    Raises:
        ConfigError: The driver's library is not there, or this GPU has no such counter.
    """

    def __init__(self, uuid: str, library: Any = None) -> None:
        try:
            self._library = library or ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise ConfigError(
                f"{ENERGY}: the NVIDIA driver's library for its counters cannot be loaded ({error}). Install NVML with "
                "the driver (in a container: NVIDIA_DRIVER_CAPABILITIES=utility,compute), or leave the metric out."
            ) from None
        self._uuid = uuid
        self._handle = ctypes.c_void_p()
        self._check("nvmlInit_v2", self._library.nvmlInit_v2())
        found = self._library.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(uuid.encode()), ctypes.byref(self._handle))
        self._check("nvmlDeviceGetHandleByUUID", found)
        self()

    def __call__(self) -> float:
        """See `Counter`."""
        value = ctypes.c_ulonglong()
        found = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(value))
        self._check("nvmlDeviceGetTotalEnergyConsumption", found)
        return float(value.value)

    def _check(self, function: str, status: int) -> None:
        if not status:
            return
        why = {3: "it is not supported: GPUs before Volta, parts of one (MIG) and virtual ones have no such counter",
               4: "no permission"}.get(status, f"NVML's error {status}")  # fmt: skip
        raise ConfigError(f"{ENERGY}: {function} of {self._uuid}: {why}. Leave the metric out.")


def counter_of(device: str) -> Counter:
    """The counter of a torch device of this machine.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ConfigError: It has none, or it may not be read; the message says what to do.
    """
    if not device.startswith("cuda"):
        return Powercap(POWERCAP)
    import torch

    return Nvml(f"GPU-{torch.cuda.get_device_properties(torch.device(device)).uuid}")


def _wait(device: str) -> Callable[[], None]:
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return torch.cuda.synchronize


def measure_energy(
    calls: Sequence[Call],
    counter: Counter,
    *,
    device: str,
    passes: int,
    threads: int,
    rng: np.random.Generator,
    window_s: float = WINDOW_S,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Energy]:
    """Energy of forwards, one after the other as often as a window lasts, in shuffled passes over all of them.

    Args:
        calls: One forward each.
        counter: Of the device.
        device: "cpu", or a CUDA device, of which each forward is waited for.
        passes: Windows of each.
        threads: Threads inside an operator.
        rng: Shuffles.
        window_s: Length of a window, at least, in seconds.
        clock: Seconds.

    Raises:
        NasError: The counter stands still.
    """
    wait = _wait(device)
    found: list[list[float]] = [[] for _ in calls]
    with measuring(threads):
        for _ in range(passes):
            for i in rng.permutation(len(calls)):
                found[i].append(_window(calls[i], counter, wait, window_s, clock))
    return [
        Energy(float(np.mean(mj)), float(np.std(mj, ddof=1)) / math.sqrt(len(mj)) if len(mj) > 1 else math.nan)
        for mj in found
    ]


def _window(
    call: Call, counter: Counter, wait: Callable[[], None], window_s: float, clock: Callable[[], float]
) -> float:
    """Millijoules of one call: from a step of the counter to another, at least `window_s` later."""

    def run() -> None:
        call()
        wait()

    def until_a_step() -> tuple[float, int]:
        before, started, ran = counter(), clock(), 0
        while clock() - started < _STILL_S or not ran:
            run()
            ran += 1
            if (now := counter()) != before:
                return now, ran
        raise NasError(
            f"{ENERGY}: the device's energy counter has stood still for {_STILL_S:g} s of work: it does not count. "
            "Leave the metric out."
        )

    for _ in range(_WARMUP):
        run()
    began, _ = until_a_step()
    started, ran = clock(), 0
    while clock() - started < window_s:
        run()
        ran += 1
    ended, more = until_a_step()
    return (ended - began) / (ran + more)
