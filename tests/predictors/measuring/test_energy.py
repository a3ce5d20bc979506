"""Energy counters on a folder and a library that stand for the machine's, and windows on a clock that is told."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest

from mixnas.predictors.measuring.energy import Nvml, Powercap, counter_of, measure_energy
from mixnas.search_space.errors import ConfigError, NasError

RANGE = 1000


def zone(path: Path, name: str, uj: int) -> Path:
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{uj}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return path / "energy_uj"


def test_packages_and_their_memory_are_added_and_nothing_twice(tmp_path):
    package = zone(tmp_path / "intel-rapl:0", "package-0", 100)
    core = zone(tmp_path / "intel-rapl:0" / "intel-rapl:0:0", "core", 50)
    memory = zone(tmp_path / "intel-rapl:0" / "intel-rapl:0:1", "dram", 10)
    zone(tmp_path / "intel-rapl:0:0", "core", 50)  # Linux shows the parts beside the packages too
    other = zone(tmp_path / "intel-rapl:1", "package-1", 7)
    whole = zone(tmp_path / "intel-rapl:2", "psys", 500)
    counter = Powercap(tmp_path)
    assert counter() == 0
    for path, uj in ((package, 400), (core, 300), (memory, 30), (other, 107), (whole, 900)):
        path.write_text(str(uj))
    assert counter() == pytest.approx((300 + 20 + 100) * 1e-3)
    package.write_text("50")  # past the end of its range, and on from 0
    assert counter() == pytest.approx((420 + 50 - 400 + RANGE) * 1e-3)


def test_no_counters_are_refused_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("mixnas.predictors.measuring.energy.POWERCAP", tmp_path / "powercap")
    with pytest.raises(ConfigError, match=r"shows no energy counters of its CPU.*intel_rapl_msr"):
        counter_of("cpu")
    zone(tmp_path / "powercap" / "intel-rapl:0", "psys", 1)
    with pytest.raises(ConfigError, match="shows no energy counters"):
        counter_of("cpu")


def test_counters_that_may_not_be_read_are_refused_with_how_to_allow_it(tmp_path, monkeypatch):
    hidden = zone(tmp_path / "intel-rapl:0", "package-0", 100)
    if os.geteuid():
        hidden.chmod(0)
    else:  # root may read everything
        read = Path.read_text

        def refusing(self: Path) -> str:
            if self == hidden:
                raise PermissionError(13, "Permission denied")
            return read(self)

        monkeypatch.setattr(Path, "read_text", refusing)
    with pytest.raises(ConfigError, match=r"energy_uj may not be read.*chmod a\+r .*intel-rapl:\*/energy_uj"):
        Powercap(tmp_path)


def test_a_counter_that_goes_away_is_named(tmp_path):
    package = zone(tmp_path / "intel-rapl:0", "package-0", 100)
    counter = Powercap(tmp_path)
    package.unlink()
    with pytest.raises(ConfigError, match=r"energy_mj: .*intel-rapl:0/energy_uj cannot be read \(.*No such file"):
        counter()
    package.write_text("")
    with pytest.raises(ConfigError, match=r"energy_uj cannot be read \(invalid literal"):
        counter()
    package.write_text("100")
    (package.parent / "max_energy_range_uj").unlink()
    with pytest.raises(ConfigError, match=r"max_energy_range_uj cannot be read"):
        Powercap(tmp_path)


class Library:
    """NVML of one GPU."""

    def __init__(self, status: int = 0) -> None:
        self.mj, self.status, self.asked = 5_000, status, b""

    def nvmlInit_v2(self) -> int:  # noqa: N802 - NVML's name
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: ctypes.c_char_p, handle: object) -> int:  # noqa: N802
        self.asked = uuid.value or b""
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, value: object) -> int:  # noqa: N802
        value._obj.value = self.mj  # type: ignore[attr-defined]
        return self.status


def test_a_gpu_is_asked_by_its_own_name():
    library = Library()
    counter = Nvml("GPU-1a", library)
    assert library.asked == b"GPU-1a" and counter() == 5_000
    library.mj += 2**33  # more than 32 bits hold
    assert counter() == 5_000 + 2**33


@pytest.mark.parametrize(("status", "said"), [(3, "not supported.*MIG"), (4, "no permission"), (999, "error 999")])
def test_a_gpu_without_the_counter_is_refused(status, said):
    with pytest.raises(ConfigError, match=f"nvmlDeviceGetTotalEnergyConsumption of GPU-1a: .*{said}"):
        Nvml("GPU-1a", Library(status))


class Device:
    """A device on which time passes and energy is taken by what is run; its counter moves in steps of time."""

    def __init__(self, step_s: float) -> None:
        self.now, self.mj, self._step, self._shown = 0.0, 0.0, step_s, 0.0
        self._due = step_s

    def run(self, seconds: float, watts: float) -> None:
        while self.now + seconds >= self._due:
            part = self._due - self.now
            self.mj += part * watts * 1e3
            self._shown, self.now, seconds = self.mj, self._due, seconds - part
            self._due += self._step
        self.now, self.mj = self.now + seconds, self.mj + seconds * watts * 1e3

    def counter(self) -> float:
        return self._shown

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("step_s", [0.001, 0.1])
def test_energy_of_a_forward_by_counters_that_move_in_steps(step_s):
    device = Device(step_s)
    calls = [lambda: device.run(0.002, 10.0), lambda: device.run(0.03, 50.0)]
    found = measure_energy(
        calls,
        device.counter,
        device="cpu",
        passes=3,
        threads=1,
        rng=np.random.default_rng(0),
        clock=device.clock,
    )
    # 2 ms at 10 W are 20 mJ; what is off is the part of a forward at either end of a window
    assert [one.mj for one in found] == [pytest.approx(20, rel=0.01), pytest.approx(1500, rel=0.07)]
    assert all(one.se < 0.05 * one.mj for one in found)


def test_a_counter_that_stands_still_is_no_counter():
    device = Device(1e9)
    with pytest.raises(NasError, match="has stood still for 5 s of work"):
        measure_energy(
            [lambda: device.run(0.5, 1.0)],
            device.counter,
            device="cpu",
            passes=1,
            threads=1,
            rng=np.random.default_rng(0),
            clock=device.clock,
        )
